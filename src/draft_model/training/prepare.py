"""What a training is made of: draft, frozen target, optimizer, data; fresh, or as a checkpoint has them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from draft_model import storage
from draft_model.dataset import vocabulary
from draft_model.dataset.tokens import Split
from draft_model.drafts.eagle3.config import DraftConfig, draft_config_for, with_overrides
from draft_model.drafts.eagle3.export import load_weights, vocabulary_of
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.step import Objective
from draft_model.errors import DraftModelError
from draft_model.target.parallel import load_share
from draft_model.training.checkpoint import Loaded
from draft_model.training.config import TrainConfig
from draft_model.training.plan import beside_target
from draft_model.training.ranks import Ranks
from draft_model.training.trainer import Training, check_position, planned_steps

logger = logging.getLogger(__name__)


def draft_config(parameters: Any, model: Path, work: Path) -> DraftConfig:
    """The draft's shape: the target's default with the user's draft_model_config over it.

    Args:
        parameters: of the run.
        model: local folder of the target.
        work: scratch folder.
    """
    default = draft_config_for(json.loads((model / "config.json").read_text(encoding="utf-8")))
    if not parameters.draft_model_config:
        return default
    path = storage.fetch_file(parameters.draft_model_config, work / "draft_config")
    return with_overrides(default, json.loads(path.read_text(encoding="utf-8")))


def prepare(
    config: TrainConfig, ranks: Ranks, model: Path, dataset: Path, resumed: Loaded | None, go_on: bool, work: Path
) -> Training:
    """Puts a training together.

    Args:
        config: of the job.
        ranks: this process among the others.
        model: local folder of the target.
        dataset: local folder of the data set.
        resumed: a checkpoint to go on from, or to start from the weights of.
        go_on: which of the two.
        work: scratch folder of this process.

    Raises:
        DraftModelError: where the parts do not fit one another.
    """
    p = config.parameters
    dtype = torch.bfloat16 if p.compute_dtype == "bfloat16" else torch.float32
    properties = storage.read_manifest(config.dataset, stage="dataset").properties
    shape = draft_config(p, model, work)
    t2d, d2t = vocabulary.load_vocabulary(dataset / vocabulary.FILE)
    if resumed is not None:
        # The checkpoint's shape and vocabulary win: its head's rows mean them.
        shape = _checkpoint_shape(resumed, model)
        t2d, d2t = vocabulary_of(resumed.tensors, shape)
    elif shape.draft_vocab_size != len(d2t):
        raise DraftModelError(
            f"draft_model_config: draft_vocab_size is {shape.draft_vocab_size}, but the data set was built for "
            f"{len(d2t)}: build it with the same draft_model_config"
        )
    train_split = Split(dataset / "train")
    validation = Split(dataset / "validation") if (dataset / "validation").is_dir() else None
    longest = int(max(train_split.lengths.max(), validation.lengths.max() if validation is not None else 0))
    target = load_share(model, shape.aux_layers, dtype, ranks, lambda: beside_target(model, shape, p, longest))
    draft = Eagle3Draft(shape, t2d, d2t).to(ranks.device)
    draft.initialise(p.seed, target)
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=p.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    torch.manual_seed(p.seed * ranks.world + ranks.rank)
    total = planned_steps(p, len(train_split))
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
    objective = Objective(draft, target, p.ttt_length, p.attention_backend, dtype, longest)
    training = Training(
        p,
        ranks,
        target,
        draft,
        optimizer,
        objective,
        train_split,
        validation,
        total,
        work,
        properties["fingerprint"],
    )
    if resumed is not None and go_on:
        if problems := check_position(resumed, training.position(0)):
            raise DraftModelError(problems)
        training.go_on_from(resumed)
    elif resumed is not None:
        load_weights(draft, resumed.tensors, resumed.uri)
        logger.info("the draft starts from the weights of %s", resumed.uri)
    return training


def _checkpoint_shape(resumed: Loaded, model: Path) -> DraftConfig:
    default = draft_config_for(json.loads((model / "config.json").read_text(encoding="utf-8")))
    try:
        return with_overrides(default, resumed.config)
    except DraftModelError as error:
        said = [problem.removeprefix("draft_model_config: ") for problem in error.problems]
        raise DraftModelError([f"resume_from_checkpoint: {resumed.uri}: {problem}" for problem in said]) from error
