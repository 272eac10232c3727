"""What a training is made of: draft, frozen target, optimizer, data; fresh, or as a checkpoint has them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock

from draft_model import drafts, storage
from draft_model.dataset import vocabulary
from draft_model.dataset.tokens import Split
from draft_model.drafts.base import check_proposals
from draft_model.drafts.files import vocabulary_of
from draft_model.errors import DraftModelError
from draft_model.ranks import Ranks
from draft_model.target.parallel import load_share
from draft_model.training.checkpoint import Loaded, load_draft
from draft_model.training.config import TrainConfig
from draft_model.training.optimizer import make_optimizer
from draft_model.training.order import total_steps
from draft_model.training.plan import beside_target, draft_of, read_config
from draft_model.training.trainer import Training, check_position

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a training reads."""

    model: Path  # local folder of the target
    dataset: Path  # local folder of the data set
    source: dict[str, Any]  # what the target's manifest says of it
    fingerprint: str  # of the data set


def fetch_inputs(config: TrainConfig) -> Inputs:
    """Fetches model and data set, verified once on each machine."""

    def fetch() -> dict[str, Any]:
        source = storage.read_manifest(config.model, stage="import").properties
        properties = storage.read_manifest(config.dataset, stage="dataset").properties
        return {
            "model": str(storage.fetch(config.model, config.work / "model")),
            "dataset": str(storage.fetch(config.dataset, config.work / "dataset")),
            "source": dict(source),
            "fingerprint": properties["fingerprint"],
        }

    known = once_on_machine(config.work, "inputs", fetch)
    return Inputs(Path(known["model"]), Path(known["dataset"]), known["source"], known["fingerprint"])


def once_on_machine(work: Path, name: str, fetch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `fetch` tells, which the first of torchrun's processes on a machine calls.

    It leaves a marker, `name`.json, that the others trust and a later start does not.
    """
    marker, start = work / f"{name}.json", ""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:  # all of them are children of one torchrun
        parent = psutil.Process(os.getppid())
        start = f"{parent.pid} {parent.create_time()} {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / f"{name}.lock"):
        known: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8")) if start and marker.exists() else {}
        if not start or known.get("start") != start:
            known = {**fetch(), "start": start}
            marker.write_text(json.dumps(known), encoding="utf-8")
    return known


def prepare(config: TrainConfig, ranks: Ranks, inputs: Inputs, resumed: Loaded | None, go_on: bool) -> Training:
    """Puts a training together; raises DraftModelError where its parts do not fit one another.

    `go_on`: whether it goes on from `resumed`, or starts from the weights of that.
    """
    p = config.parameters
    model, dataset = inputs.model, inputs.dataset
    dtype = torch.bfloat16 if p.compute_dtype == "bfloat16" else torch.float32
    target_config = read_config(str(model))
    if resumed is None:
        family = drafts.family(p.draft_architecture)
        shape = draft_of(target_config, p)
        t2d, d2t = vocabulary.load_vocabulary(dataset / vocabulary.FILE)
        if shape.draft_vocab_size == shape.vocab_size:  # all tokens, whichever the data set chose
            t2d, d2t = vocabulary_of({}, shape)
        if shape.draft_vocab_size != len(d2t):
            raise DraftModelError(
                f"draft_model_config: draft_vocab_size is {shape.draft_vocab_size}, but the data set was built for "
                f"{len(d2t)}: build it with the same draft_model_config"
            )
        draft: Any = family.create(shape, t2d, d2t)
    else:
        # The checkpoint's family, shape and vocabulary win: its head's rows mean them.
        draft = load_draft(resumed, target_config, f"resume_from_checkpoint: {resumed.uri}")
        shape, family = draft.config, drafts.family(draft.config.family)
        if family.name != p.draft_architecture:
            logger.info("draft_architecture: the draft is %s, as in %s", family.title, resumed.uri)
    if note := check_proposals(shape, p.num_speculative_tokens):
        logger.warning(note)
    train_split = Split(dataset / "train")
    validation = Split(dataset / "validation") if (dataset / "validation").is_dir() else None
    longest = int(max(train_split.lengths.max(), validation.lengths.max() if validation is not None else 0))
    total = p.total_steps or total_steps(len(train_split), p.draft_global_batch_size, p.num_epochs)
    if not total:
        raise DraftModelError(
            f"draft_global_batch_size: given {p.draft_global_batch_size}; {p.num_epochs} epochs of {len(train_split)} "
            f"conversations fill no optimizer step: use at most {len(train_split) * p.num_epochs}"
        )
    if validation is None and p.final_checkpoint == "best":
        raise DraftModelError(
            "final_checkpoint: given 'best', which the validation split decides, and the data set has none: use "
            "'last', or build it with dataset_validation_split"
        )
    target = load_share(model, shape.aux_layers, dtype, ranks, partial(beside_target, model, shape, p, longest))
    for name, parameter in target.model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not local.is_floating_point() or local.element_size() == 1 or not local.numel():
            continue  # of 8 bits: quantised, with scales apart
        if not all(bool(end.isfinite()) for end in torch.aminmax(local.detach())):
            raise DraftModelError(
                f"the target model: its weight {name} holds NaN or infinity, so no step could be learnt from: import "
                "it again from a sound copy"
            )
    draft = draft.to(ranks.device)
    if resumed is None:
        draft.initialise(p.seed, target)
    optimizer = make_optimizer(p.draft_optimizer, draft, p.learning_rate, p.momentum)
    torch.manual_seed(p.seed * ranks.world + ranks.rank)
    loss = family.default_loss if p.draft_loss == "default" else p.draft_loss
    objective = family.objective(draft, target, p.ttt_length, p.attention_backend, dtype, longest, loss)
    for name in family.unused:
        logger.info("%s: without effect on %s", name, family.title)
    training = Training(
        p, ranks, target, draft, optimizer, objective, train_split, validation, total, inputs.fingerprint
    )
    if resumed is not None and go_on:
        if problems := check_position(resumed, training.position(0)):
            raise DraftModelError(problems)
        training.go_on_from(resumed)
    elif resumed is not None:
        logger.info("the draft starts from the weights of %s", resumed.uri)
    return training
