"""What a training says of itself: the log's first lines, and training.json beside every draft."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from draft_model import storage
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.training.config import TrainConfig
from draft_model.training.ranks import Ranks
from draft_model.training.trainer import Training

logger = logging.getLogger(__name__)


def announce(training: Training) -> None:
    """Logs how the work is shared out, and how much there is."""
    p, world = training.parameters, training.ranks.world
    tokens = training.train.lengths.mean() * p.draft_global_batch_size
    logger.info(
        "%d process(es) on %s: tensor parallel %d, data parallel %d; %d conversations per step = %d processes x "
        "micro-batch %d x accumulation %d, about %d tokens",
        world, hardware(training.ranks), p.tp_size, training.ranks.dp, p.draft_global_batch_size, world,
        p.draft_micro_batch_size, p.accumulation_steps, tokens,
    )  # fmt: skip
    logger.info(
        "%d conversations, %.1f steps per epoch, %d steps in all; draft of %.1f M parameters, vocabulary %d of %d, "
        "features after layers %s of %d; computing in %s",
        len(training.train), len(training.train) / p.draft_global_batch_size, training.total,
        size(training.draft) / 1e6, training.draft.config.draft_vocab_size, training.draft.config.vocab_size,
        list(training.draft.config.aux_layers), training.target.config.num_hidden_layers, p.compute_dtype,
    )  # fmt: skip


def size(draft: Eagle3Draft) -> int:
    """Parameters of a draft."""
    return sum(parameter.numel() for parameter in draft.parameters())


def hardware(ranks: Ranks) -> str:
    """What a process computes on."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_name(ranks.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of what shapes a result, by package."""
    packages = ("pipeline-draft-model", "torch", "transformers", "tokenizers", "safetensors", "datasets")
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in packages}}


def record(training: Training, config: TrainConfig, dataset: Path, step: int) -> dict[str, Any]:
    """training.json: what was trained, on what, with what result.

    Args:
        training: as it is now.
        config: of the job.
        dataset: local folder of the data set.
        step: the one whose weights the draft beside has.
    """
    target = training.target
    source: Mapping[str, Any] = storage.read_manifest(config.model, stage="import").properties
    return {
        "parameters": training.parameters.of_stage("train"),
        "draft": training.draft.config.to_json(),
        "draft_parameters": size(training.draft),
        "target": {
            "source": source["source"],
            "revision": source["revision"],
            "licence": source["licence"],
            "architecture": source["architecture"],
            "parameters": source["parameter_count"],
            "hidden_size": target.config.hidden_size,
            "layers": target.config.num_hidden_layers,
        },
        "dataset": json.loads((dataset / "report.json").read_text(encoding="utf-8")),
        "steps": training.done,
        "draft_step": step,
        "epochs": training.done * training.parameters.draft_global_batch_size / len(training.train),
        "world_size": training.ranks.world,
        "tokens": training.history.tokens,
        "seconds": training.history.seconds,
        "tokens_per_second": training.history.tokens / max(training.history.seconds, 1e-9),
        "log": training.history.log,
        "validation": training.history.validation,
        "skipped": training.history.skipped,
        "versions": versions(),
        "hardware": hardware(training.ranks),
    }
