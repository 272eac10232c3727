"""The training loop: conversations to states of the target, states to the loss, sums over ranks, one step.

`train` reads top-down: step by step, an evaluation and a checkpoint at the ends of epochs. The gradient of a step is
the sum over all ranks and micro-batches divided by the number of supervised tokens in the global batch, so that how a
batch is split changes speed and nothing else.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from draft_model.dataset.tokens import Split
from draft_model.drafts.base import Draft, Objective
from draft_model.drafts.batch import Batch, collate
from draft_model.drafts.counts import Counts
from draft_model.drafts.layers import cast_once
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from draft_model.ranks import Ranks
from draft_model.target.model import Target
from draft_model.tracking import Tracker
from draft_model.training.checkpoint import Loaded, Position, restore
from draft_model.training.history import History, Window, in_words
from draft_model.training.optimizer import Gradients, learning_rate
from draft_model.training.order import Step, draw_keys, plan_steps

logger = logging.getLogger(__name__)

LOG_SECONDS = 15.0  # between two states of the bar where it goes to a log and not to a terminal
SKIPPED_IN_A_ROW = 5
"""So many steps without a finite loss and gradient end the training: one is a bad batch, five are no accident."""


@dataclass
class Training:
    """One training under way."""

    parameters: Parameters  # of the run
    ranks: Ranks  # this process among the others
    target: Target  # frozen
    draft: Draft  # float32 parameters
    optimizer: torch.optim.Optimizer  # AdamW over them
    objective: Objective  # the loss
    train: Split  # training split
    validation: Split | None  # validation split, if given
    total: int  # optimizer steps
    dataset: str  # fingerprint of the data set
    done: int = 0  # optimizer steps done
    history: History = field(default_factory=History)  # measured so far
    tracker: Tracker = field(default_factory=Tracker)  # is told what is measured

    def position(self, epoch: int) -> Position:
        """Where a checkpoint of this moment stands."""
        return Position(
            step=self.done,
            epoch=epoch,
            seed=self.parameters.seed,
            global_batch=self.parameters.draft_global_batch_size,
            dataset=self.dataset,
            world=self.ranks.world,
            history=vars(self.history),
        )

    def go_on_from(self, loaded: Loaded) -> None:
        """Takes weights, moments, random state, position and history from a checkpoint."""
        assert loaded.state is not None
        assert loaded.position is not None
        restore(self.draft, self.optimizer, loaded.state, loaded.uri)
        self.done = loaded.position.step
        self.history = History(**loaded.position.history)
        if loaded.position.world == self.ranks.world:
            set_random_state(loaded.state["random"][self.ranks.rank])
        logger.info("resumed from %s at step %d of %d", loaded.uri, self.done, self.total)


class Interrupted(Exception):
    """The machine was asked to stop (SIGTERM); the checkpoint of this step is saved."""


@dataclass
class _Pending:
    """A step that the device may still be computing."""

    step: Step  # its conversations
    number: int  # counted from 1
    numbers: Tensor  # sums, gradient norm and stop requests of all processes, [n + 2]; on their way to the host
    arrived: torch.cuda.Event | None  # when they are there; None where they are already


def train(training: Training, save: Callable[[str, int, list[Tensor]], None], stop: Callable[[], bool]) -> None:
    """Trains from `training.done` to `training.total`, with checkpoints and validations on the way.

    On a GPU the host runs one step ahead: a step's numbers are read while the next one is computed, so nothing waits.

    Args:
        training: what is trained; changed in place.
        save: is called in the first process when a checkpoint is due, with its name, the epochs begun and the random
            state of each process.
        stop: whether this process was asked to stop.

    Raises:
        Interrupted: when one was, after the step under way was finished and saved.
        DraftModelError: where losses or gradients are not finite, again and again.
    """
    p, ranks, history = training.parameters, training.ranks, training.history
    lengths = training.train.lengths
    steps = list(islice(plan_steps(lengths, p.draft_global_batch_size, p.seed), training.done, training.total))
    gradients = Gradients(training.draft.parameters())
    nothing = training.objective.no_counts().cpu()
    window = Window(nothing, history.window)
    pending: deque[_Pending] = deque()
    ahead = 1 if ranks.device.type == "cuda" else 0
    size = sum(int(lengths[step.conversations].sum()) for step in steps)
    with _target_thread(training) as thread, tqdm(
        total=size, unit="token", unit_scale=True, desc="training", disable=not ranks.first, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else LOG_SECONDS,
    ) as bar:  # fmt: skip
        passes = _ahead(_target_states(training, training.train, (step.conversations for step in steps)), thread)
        clock = time.monotonic()
        for step in steps:
            pending.append(_learn(training, step, passes, gradients, stop()))
            training.done += 1
            last = training.done == training.total
            ended_epoch = step.epoch + 1 if step.last_of_epoch else 0
            logs = training.done % p.log_steps == 0 or last
            validates = last or bool(ended_epoch and ended_epoch % p.eval_interval == 0)
            saves = last or bool(ended_epoch and ended_epoch % p.save_interval == 0)
            stopping = False
            while len(pending) > (0 if logs or validates or saves or stopping else ahead):
                done = pending.popleft()
                stopping |= _settle(training, done, window)
                tokens = int(lengths[done.step.conversations].sum())
                history.tokens += tokens
                now = time.monotonic()
                window.tokens, window.seconds = window.tokens + tokens, window.seconds + now - clock
                history.seconds += now - clock
                clock = now
                supervised = float(window.sums.supervised[0])
                loss = f", loss {float(window.sums.loss[0]) / supervised:.2f}" if supervised else ""
                bar.set_postfix_str(f"step {done.number}/{training.total}{loss}", refresh=False)
                bar.update(tokens)
            if logs and window.sums.divisor > 0:  # else nothing was supervised, and there is no loss to write
                rate = training.optimizer.param_groups[0]["lr"]
                where = {"step": training.done, "epoch": step.epoch + 1, "learning_rate": rate}
                history.log.append(record := window.record(p.num_speculative_tokens, where))
                logger.info(
                    "step %d, epoch %d: %s, learning rate %.1e, gradient norm %.1f, %.0f tokens/s", training.done,
                    step.epoch + 1, in_words(record), rate, record["grad_norm"], record["tokens_per_second"],
                )  # fmt: skip
                # The most GPU memory that this process has held; on a CPU the memory that it holds.
                on_gpu = ranks.device.type == "cuda"
                memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
                training.tracker.metrics(training.done, record | {"memory_gigabytes": memory / 1e9})
                window = Window(nothing, {})
            if validates:
                _validate(training, step.epoch, thread)
            if not ahead:  # on a GPU the requests of all processes come with the step's numbers
                stopping = ranks.any(stop())
            if saves or stopping:
                random = ranks.gather(random_state())
                if ranks.first:
                    history.window = window.to_json()
                    name = f"epoch_{step.epoch + 1}" if last or ended_epoch else f"step_{training.done}"
                    save(name, step.epoch + 1, random)
            if validates or saves:
                history.seconds += time.monotonic() - clock
                clock = time.monotonic()
            if stopping and not last:
                raise Interrupted
    if not history.log:
        raise DraftModelError(
            "training: not one position was supervised, so nothing was learnt: the target's own choices lie outside "
            "the draft vocabulary, or the assistant's replies are empty; see the data set's report"
        )


def _target_thread(training: Training) -> AbstractContextManager[ThreadPoolExecutor | None]:
    """On CPUs a thread for the target's passes, which fills the cores where an operation of the draft leaves them idle.

    Numbers do not change: an operation has as many threads as without it, and the passes keep their order.
    """
    alone = training.ranks.tp == 1 and not training.target.spread  # else its passes talk to other processes
    if training.ranks.device.type == "cuda" or not alone or torch.get_num_threads() == 1:
        return nullcontext()
    return ThreadPoolExecutor(1)


def random_state() -> Tensor:
    """The state of this process's random numbers, uint8. No step draws any today; an objective with dropout would."""
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return torch.cat([torch.get_rng_state(), *on_gpu])


def set_random_state(state: Tensor) -> None:
    """Goes on where `random_state` was taken; on another kind of device, with the CPU's part of it."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # PyTorch reads from the storage's begin, wherever a view begins
    if torch.cuda.is_available() and len(state) > size:
        torch.cuda.set_rng_state(state[size:].clone())


def _conversations(split: Split, indices: NDArray[np.int64], keys: list[int] | None = None) -> Batch:
    rows = (split[int(index)] for index in indices)
    return collate([(torch.from_numpy(row.input_ids), torch.from_numpy(row.loss_mask)) for row in rows], keys)


def _passes(training: Training, conversations: NDArray[np.int64]) -> int:
    """How often this process's group runs the target over these conversations."""
    ranks = training.ranks
    group = len(ranks.group_share(conversations))
    if training.target.spread:  # others may have a pass more, and they need this one's layers
        group = ranks.largest_group_share(len(conversations))
    return -(-group // training.parameters.training_batch_size)


def _target_states(training: Training, split: Split, steps: Iterable[NDArray[np.int64]]) -> Iterator[list[Tensor]]:
    """This process's own conversations' states by pass, as its group runs the target over training_batch_size each."""
    ranks, size = training.ranks, training.parameters.training_batch_size
    for conversations in steps:
        group = ranks.group_share(conversations)
        for start in range(0, _passes(training, conversations) * size, size):
            part = group[start : start + size]
            batch = _conversations(split, part if len(part) else conversations[:1])
            # No name for all of them, which would keep them through the step.
            own = enumerate(training.target.states(batch)[: len(part)], start)
            yield [state for place, state in own if ranks.owns(place)]


def _ahead(passes: Iterator[list[Tensor]], thread: ThreadPoolExecutor | None) -> Iterator[list[Tensor]]:
    """The same; with a thread, which must have one worker, two passes ahead of the draft."""
    if thread is None:
        yield from passes
        return
    coming = deque(thread.submit(next, passes, None) for _ in range(2))
    while (states := coming.popleft().result()) is not None:
        coming.append(thread.submit(next, passes, None))
        yield states


def _losses(
    training: Training,
    split: Split,
    conversations: NDArray[np.int64],
    passes: Iterator[list[Tensor]],
    size: int,
    step: int,
) -> Iterator[tuple[Tensor, Counts]]:
    """Loss and counts of this process's share, `size` conversations at a time; `step` as in `draw_keys`.

    Only as many states are held as a pass of the target and one of the draft need; on CPUs, of two passes more.
    """
    mine = training.ranks.share(conversations)
    states = chain.from_iterable(islice(passes, _passes(training, conversations)))
    with cast_once(training.draft, training.objective.dtype):
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            batch = _conversations(split, part, draw_keys(training.parameters.seed, step, part))
            yield training.objective(batch, list(islice(states, len(part))))
    for _ in states:  # a group whose last conversations are others' runs the target to the end all the same
        pass


def _learn(
    training: Training, step: Step, passes: Iterator[list[Tensor]], gradients: Gradients, stop: bool
) -> _Pending:
    """Starts one optimizer step; where its loss or gradient is not finite, nothing is learnt from it."""
    p, ranks, split = training.parameters, training.ranks, training.train
    sums: Counts = training.objective.no_counts()
    gradients.clear()
    size, number = p.draft_micro_batch_size, training.done + 1
    for loss, micro_sums in _losses(training, split, step.conversations, passes, size, number):
        loss.backward()
        sums = sums + micro_sums
    gradients.reduce(ranks)
    numbers = ranks.sum(torch.cat((sums.tensor().flatten(), sums.loss.new_full((1,), float(stop)))))
    sums = sums.from_tensor(numbers[:-1])
    norm = gradients.norm(sums.divisor)
    useful = norm.isfinite() & sums.loss.isfinite().all() & (sums.divisor > 0)
    rate = learning_rate(training.done, training.total, p.learning_rate, p.warmup_ratio, p.learning_rate_floor)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    gradients.update(training.optimizer, sums.divisor, norm, p.max_grad_norm, useful)
    numbers = torch.cat((numbers, norm.double().unsqueeze(0)))
    if ranks.device.type != "cuda":
        return _Pending(step, number, numbers, None)
    on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    on_host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Pending(step, number, on_host, event)


def _settle(training: Training, pending: _Pending, window: Window) -> bool:
    """Reads a step's numbers into the window; whether some process was asked to stop.

    A step that was not learnt from is counted. All ranks see the same sums, so all count it.
    """
    if pending.arrived is not None:
        pending.arrived.synchronize()
    *_, stops, norm = pending.numbers.tolist()
    sums = window.sums.from_tensor(pending.numbers[:-2])
    if math.isfinite(norm) and bool(torch.isfinite(sums.loss).all()):
        window.sums, window.norm = window.sums + sums, norm
        return bool(stops > 0)
    skipped, number = training.history.skipped, pending.number
    lines = sorted(training.train.line(int(index)) for index in pending.step.conversations)
    skipped.append({"step": number, "lines": lines})
    loss = (sums.loss / sums.supervised.clamp(min=1)).tolist()
    seen = f"loss {' '.join(f'{value:.2f}' for value in loss)}, gradient norm {norm:.1f}"
    logger.warning("step %d is skipped (%s); its conversations' lines: %s", number, seen, lines)
    row = [record["step"] for record in skipped[-SKIPPED_IN_A_ROW:]]
    if row == list(range(number + 1 - SKIPPED_IN_A_ROW, number + 1)):
        raise DraftModelError(
            f"training: steps {row[0]} to {row[-1]} had no finite loss and gradient (the last: {seen}; conversations "
            f"from lines {lines} of the training data): lower learning_rate, or set compute_dtype to float32, and "
            "resume from the last checkpoint"
        )
    return bool(stops > 0)


@torch.no_grad()
def _validate(training: Training, epoch: int, thread: ThreadPoolExecutor | None) -> None:
    """The whole validation split, token-weighted, shared over the ranks."""
    split, p = training.validation, training.parameters
    if split is None:
        return
    order = np.argsort(-split.lengths, kind="stable")
    passes = _ahead(_target_states(training, split, [order]), thread)
    sums: Counts = training.objective.no_counts()
    for _, batch_sums in _losses(training, split, order, passes, p.training_batch_size, 0):
        sums = sums + batch_sums
    sums = sums.from_tensor(training.ranks.sum(sums.tensor()).cpu())
    record = {"step": training.done, "epoch": epoch + 1, **sums.measures(p.num_speculative_tokens)}
    training.history.validation.append(record)
    logger.info("validation after step %d: %s", training.done, in_words(record))
    training.tracker.metrics(training.done, {f"validation_{name}": value for name, value in record.items()})


def check_position(loaded: Loaded, current: Position) -> list[str]:
    """What keeps a checkpoint from being resumed by a run (`current`, at step 0), a sentence each."""
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
