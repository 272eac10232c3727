"""The training loop: conversations to states of the target, states to the loss, sums over ranks, one step.

`train` reads top-down: load, go on from a checkpoint or start, step by step, an evaluation and a checkpoint at the ends
of epochs, the final draft. The gradient of a step is the sum over all ranks and micro-batches divided by the number of
supervised tokens in the global batch, so that how a batch is split changes speed and nothing else.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draft_model.dataset.tokens import Split
from draft_model.eagle3.batch import Batch, collate
from draft_model.eagle3.model import Eagle3Draft
from draft_model.eagle3.objective import StepSums
from draft_model.eagle3.step import Objective
from draft_model.eagle3.target import Target
from draft_model.parameters import Parameters
from draft_model.training.checkpoint import Checkpoints, Loaded, Position, restore
from draft_model.training.features import StateStore
from draft_model.training.order import Step, plan_steps, total_steps
from draft_model.training.progress import Progress
from draft_model.training.ranks import Ranks
from draft_model.training.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass
class History:
    """What a training measured; the report's curves.

    Attributes:
        log: one record per `log_steps` steps.
        validation: one record per validation.
        seconds: of training, validations and checkpoints included, earlier attempts too.
        tokens: that went through the draft.
        window: what the log window under way has summed, where a checkpoint falls into one.
    """

    log: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    window: dict[str, Any] = field(default_factory=dict)

    @property
    def acceptance_length(self) -> float:
        """The last simulated one: of the validation, else of the training data."""
        records = self.validation or self.log
        return float(records[-1]["acceptance_length"]) if records else 1.0


@dataclass
class Training:
    """One training under way.

    Attributes:
        parameters: of the run.
        ranks: this process among the others.
        target: frozen.
        draft: float32 parameters.
        optimizer: AdamW over them.
        objective: the loss.
        train: training split.
        validation: validation split, if given.
        total: optimizer steps.
        work: scratch folder of this process.
        dataset: fingerprint of the data set.
        done: optimizer steps done.
        history: measured so far.
    """

    parameters: Parameters
    ranks: Ranks
    target: Target
    draft: Eagle3Draft
    optimizer: torch.optim.Optimizer
    objective: Objective
    train: Split
    validation: Split | None
    total: int
    work: Path
    dataset: str
    done: int = 0
    history: History = field(default_factory=History)

    def position(self, epoch: int) -> Position:
        """Where a checkpoint of this moment stands."""
        return Position(
            step=self.done,
            epoch=epoch,
            seed=self.parameters.seed,
            global_batch=self.parameters.draft_global_batch_size,
            dataset=self.dataset,
            history=vars(self.history),
        )

    def go_on_from(self, loaded: Loaded) -> None:
        """Takes weights, moments, position and history from a checkpoint."""
        assert loaded.state is not None
        assert loaded.position is not None
        restore(self.draft, self.optimizer, loaded.state, loaded.uri)
        self.done = loaded.position.step
        self.history = History(**loaded.position.history)
        logger.info("resumed from %s at step %d of %d", loaded.uri, self.done, self.total)


def planned_steps(parameters: Parameters, conversations: int) -> int:
    """Optimizer steps of a run over so many conversations."""
    return parameters.total_steps or total_steps(
        conversations, parameters.draft_global_batch_size, parameters.num_epochs
    )


class Interrupted(Exception):
    """The machine was asked to stop (SIGTERM); the checkpoint of this step is saved."""


def train(training: Training, checkpoints: Checkpoints, complete: Any) -> None:
    """Trains from `training.done` to `training.total`, with checkpoints and validations on the way.

    Args:
        training: what is trained; changed in place.
        checkpoints: where they go; only rank 0 writes.
        complete: see `Checkpoints.save`.

    Raises:
        Interrupted: on SIGTERM, after the step under way was finished and saved.
    """
    p, ranks = training.parameters, training.ranks
    lengths = training.train.lengths
    plan = list(islice(plan_steps(lengths, p.draft_global_batch_size, p.seed), training.total))
    steps = plan[training.done :]
    store = _store(training, plan)
    stop = _catch_sigterm()
    window = _Window(p.ttt_length, training.history.window)
    with Progress(sum(int(lengths[step.conversations].sum()) for step in steps), ranks.first) as progress:
        for step in steps:
            started = time.monotonic()
            sums, norm = _learn(training, step, store)
            training.done += 1
            tokens = int(lengths[step.conversations].sum())
            training.history.tokens += tokens
            window.add(sums, norm, tokens, time.monotonic() - started)
            last = training.done == training.total
            progress.advance(tokens, f"step {training.done}/{training.total}", window.sums)
            if training.done % p.log_steps == 0 or last:
                training.history.log.append(record := window.record(training, step.epoch))
                progress.log(record)
                window = _Window(p.ttt_length)
            ended_epoch = step.epoch + 1 if step.last_of_epoch else 0
            if last or (ended_epoch and ended_epoch % p.eval_interval == 0):
                _validate(training, step.epoch, progress)
            training.history.seconds += time.monotonic() - started
            stopping = ranks.any(stop.is_set())
            if (last or stopping or (ended_epoch and ended_epoch % p.save_interval == 0)) and ranks.first:
                training.history.window = window.to_json()
                name = f"epoch_{step.epoch + 1}" if last or ended_epoch else f"step_{training.done}"
                checkpoints.save(name, training.draft, training.optimizer, training.position(step.epoch + 1), complete)
            if stopping and not last:
                raise Interrupted


class _Flag:
    def __init__(self) -> None:
        self._set = False

    def set(self, *_: object) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


def _catch_sigterm() -> _Flag:
    flag = _Flag()
    signal.signal(signal.SIGTERM, flag.set)
    return flag


def _store(training: Training, plan: list[Step]) -> StateStore:
    """The store of a whole training: a resumed one keeps the same states as one that was never interrupted."""
    visits = np.bincount(np.concatenate([step.conversations for step in plan]))
    width = 4 * training.draft.config.hidden_size
    dtype, device = training.objective.dtype, training.target.device
    groups = _target_batches(training, plan)
    return StateStore(training.work, training.train.lengths, width, dtype, int(visits.max()), device, groups)


def _target_batches(training: Training, plan: list[Step]) -> dict[int, tuple[int, ...]]:
    """For each conversation of this rank those that first go through the target with it."""
    ranks, size = training.ranks, training.parameters.training_batch_size
    batches: dict[int, tuple[int, ...]] = {}
    for step in plan:
        mine = dict.fromkeys(step.conversations[ranks.rank :: ranks.world].tolist())
        new = [index for index in mine if index not in batches]
        for start in range(0, len(new), size):
            part = tuple(new[start : start + size])
            batches.update(dict.fromkeys(part, part))
    return batches


def _conversations(split: Split, indices: NDArray[np.int64] | list[int], device: torch.device) -> Batch:
    rows = (split[int(index)] for index in indices)
    return collate([(torch.from_numpy(row.input_ids), torch.from_numpy(row.loss_mask)) for row in rows]).to(device)


def _target_states(training: Training, split: Split, indices: list[int]) -> list[Tensor]:
    """The target's states of some conversations, training_batch_size of them at a time."""
    size = training.parameters.training_batch_size
    states: list[Tensor] = []
    for start in range(0, len(indices), size):
        states += training.target.states(_conversations(split, indices[start : start + size], training.target.device))
    return states


def _micro_batches(training: Training, split: Split, indices: NDArray[np.int64]) -> Iterator[tuple[Batch, slice]]:
    size = training.parameters.draft_micro_batch_size
    for start in range(0, len(indices), size):
        part = slice(start, start + size)
        yield _conversations(split, indices[part], training.target.device), part


def _learn(training: Training, step: Step, store: StateStore) -> tuple[StepSums, float]:
    """One optimizer step; gives the sums over all ranks and the gradient's norm before clipping."""
    p, ranks, optimizer = training.parameters, training.ranks, training.optimizer
    mine = step.conversations[ranks.rank :: ranks.world]
    states = store.get(mine, lambda missing: _target_states(training, training.train, missing))
    sums = StepSums.zeros(p.ttt_length)
    for batch, part in _micro_batches(training, training.train, mine):
        loss, micro_sums = training.objective(batch, states[part])
        loss.backward()
        sums = sums + micro_sums
    parameters = list(training.draft.parameters())
    ranks.sum_gradients(parameters)
    sums = StepSums.from_tensor(ranks.sum(sums.tensor()).cpu())
    supervised = float(sums.supervised[0])
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(supervised, 1.0))
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, p.max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(training.done, training.total, p.learning_rate, p.warmup_ratio)
    if supervised:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm


@torch.no_grad()
def _validate(training: Training, epoch: int, progress: Progress) -> None:
    """The whole validation split, token-weighted, shared over the ranks."""
    split, ranks, p = training.validation, training.ranks, training.parameters
    if split is None:
        return
    sums = StepSums.zeros(p.ttt_length)
    order = np.argsort(-split.lengths, kind="stable")[ranks.rank :: ranks.world]
    for start in range(0, len(order), p.training_batch_size):
        indices = order[start : start + p.training_batch_size]
        states = _target_states(training, split, indices.tolist())
        sums = sums + training.objective(_conversations(split, indices, training.target.device), states)[1]
    sums = StepSums.from_tensor(ranks.sum(sums.tensor()).cpu())
    record = {"step": training.done, "epoch": epoch + 1, **_measures(sums, p)}
    training.history.validation.append(record)
    progress.log_validation(record)


def _measures(sums: StepSums, p: Parameters) -> dict[str, Any]:
    return {**sums.means(), "acceptance_length": sums.acceptance_length(p.num_speculative_tokens)}


class _Window:
    """What happened since the last log line, summed; divided only when it is written."""

    def __init__(self, steps: int, saved: Mapping[str, Any] | None = None) -> None:
        self.sums = StepSums.zeros(steps)
        self.tokens, self.seconds, self.norm = 0, 0.0, 0.0
        if saved and len(saved["sums"][0]) == steps:
            self.sums = StepSums.from_tensor(torch.tensor(saved["sums"], dtype=torch.float64))
            self.tokens, self.seconds, self.norm = saved["tokens"], saved["seconds"], saved["norm"]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "sums": self.sums.tensor().tolist()}

    def add(self, sums: StepSums, norm: float, tokens: int, seconds: float) -> None:
        self.sums = self.sums + sums
        self.tokens, self.seconds, self.norm = self.tokens + tokens, self.seconds + seconds, norm

    def record(self, training: Training, epoch: int) -> dict[str, Any]:
        return {
            "step": training.done,
            "epoch": epoch + 1,
            "learning_rate": training.optimizer.param_groups[0]["lr"],
            **_measures(self.sums, training.parameters),
            "grad_norm": self.norm,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }


def check_position(loaded: Loaded, current: Position) -> list[str]:
    """What keeps a checkpoint from being resumed by this run, a sentence each.

    Args:
        loaded: the checkpoint.
        current: this run's identity, at step 0.
    """
    if loaded.position is None:
        return [
            f"resume_from_checkpoint: {loaded.uri} holds a draft without training state; use resume=false to start "
            "from its weights"
        ]
    then = replace(loaded.position, step=0, epoch=0, history={})
    named = {"seed": "seed", "global_batch": "draft_global_batch_size", "dataset": "the data set"}
    return [
        f"resume: {words} is {getattr(current, key)!r} now and was {getattr(then, key)!r} in {loaded.uri}; the "
        "position in the data would mean nothing: use the same, or resume=false with resume_from_checkpoint"
        for key, words in named.items()
        if getattr(current, key) != getattr(then, key)
    ]
