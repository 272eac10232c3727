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

from draft_model.ranks import Ranks
from draft_model.training.plan import context_problem
from draft_model.training.trainer import Training

logger = logging.getLogger(__name__)

_PACKAGES = ("pipeline-draft-model", "torch", "transformers", "tokenizers", "safetensors", "datasets")


def announce(training: Training) -> None:
    """Logs how the work is shared out, and how much there is."""
    p, world = training.parameters, training.ranks.world
    config, text = training.draft.config, training.target.config
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
        parameters_of(training) / 1e6, config.draft_vocab_size, config.vocab_size, list(config.aux_layers),
        text.num_hidden_layers, p.compute_dtype,
    )  # fmt: skip
    if problem := context_problem(text.to_dict(), p.max_length):
        logger.warning("%s", problem)


def parameters_of(training: Training) -> int:
    """Parameters that are trained."""
    return sum(parameter.numel() for parameter in training.draft.parameters())


def hardware(ranks: Ranks) -> str:
    """What a process computes on."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_name(ranks.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def record(training: Training, source: Mapping[str, Any], dataset: Path, step: int) -> dict[str, Any]:
    """training.json: what was trained, on what, with what result; the draft beside it has the weights of `step`."""
    target, history, done = training.target, training.history, training.done
    return {
        "parameters": training.parameters.of_stage("train"),
        "draft": training.draft.config.to_json(),
        "draft_parameters": parameters_of(training),
        "target": {
            **{name: source[name] for name in ("source", "revision", "licence", "architecture")},
            "parameters": source["parameter_count"],
            "hidden_size": target.config.hidden_size,
            "layers": target.config.num_hidden_layers,
        },
        "dataset": json.loads((dataset / "report.json").read_text(encoding="utf-8")),
        "steps": done,
        "draft_step": step,
        "acceptance_length": history.acceptance_length(step),
        "best": history.best,
        "epochs": done * training.parameters.draft_global_batch_size / len(training.train),
        "world_size": training.ranks.world,
        "tokens": history.tokens,
        "seconds": history.seconds,
        "tokens_per_second": history.tokens / max(history.seconds, 1e-9),
        "log": history.log,
        "validation": history.validation,
        "skipped": history.skipped,
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
        "hardware": hardware(training.ranks),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return "not installed"
