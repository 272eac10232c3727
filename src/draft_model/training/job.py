"""`run`: one process of a training job, from its inputs at URIs to the draft at a URI.

Every process fetches what it needs under a lock file of its machine, so that the first one downloads and the others
verify; nobody waits in a collective for a download.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from draft_model import storage
from draft_model.dataset import vocabulary
from draft_model.dataset.tokens import Split
from draft_model.eagle3.config import DraftConfig, draft_config_for, with_overrides
from draft_model.eagle3.export import load_weights, save_draft, vocabulary_of
from draft_model.eagle3.model import Eagle3Draft
from draft_model.eagle3.step import Objective
from draft_model.eagle3.target import Target, load_target
from draft_model.errors import DraftModelError
from draft_model.model_import import is_weight
from draft_model.training.checkpoint import Checkpoints, Loaded, read_checkpoint
from draft_model.training.config import TrainConfig, TrainResult
from draft_model.training.ranks import Ranks, start_ranks
from draft_model.training.trainer import Interrupted, Training, check_position, planned_steps, train

logger = logging.getLogger(__name__)

STAGE = "train"


def run(config: TrainConfig) -> TrainResult:
    """Trains a draft in this process, together with the others that torchrun started.

    Args:
        config: the same in every process.

    Returns:
        What was trained and where it is; the same in every process.

    Raises:
        DraftModelError: for what the user can put right; nothing is published then.
        Interrupted: on SIGTERM, after a checkpoint.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    with start_ranks(config.parameters.dist_timeout) as ranks:
        logging.getLogger("draft_model").setLevel(logging.INFO if ranks.first else logging.ERROR)
        work = config.work / f"rank_{ranks.rank}"
        work.mkdir(parents=True, exist_ok=True)
        config.work.mkdir(parents=True, exist_ok=True)
        with FileLock(config.work / "inputs.lock"):
            model = storage.fetch(config.model, config.work / "model")
            dataset = storage.fetch(config.dataset, config.work / "dataset")
        checkpoints = Checkpoints(config.output, work)
        resumed = _checkpoint(config, checkpoints, work)
        training = _prepare(config, ranks, model, dataset, resumed, work)
        _check_disk(training, work)
        if ranks.first and config.parameters.resume == "false":
            checkpoints.clear()
        _announce(training)

        def complete(folder: Path) -> None:
            _complete(folder, training, model, dataset, config)

        train(training, checkpoints, complete)
        final = storage.join(config.output, "final")
        if ranks.first:
            folder = work / "final"
            shutil.rmtree(folder, ignore_errors=True)
            save_draft(folder, training.draft)
            complete(folder)
            storage.publish(folder, final, stage=STAGE, properties={"step": training.done})
            shutil.rmtree(folder)
    last = training.history.log[-1] if training.history.log else {"loss": [0.0]}
    return TrainResult(
        output=config.output,
        final=final,
        steps=training.done,
        loss=last["loss"][0],
        acceptance_length=training.history.acceptance_length,
    )


def _checkpoint(config: TrainConfig, checkpoints: Checkpoints, work: Path) -> Loaded | None:
    """The checkpoint that the parameters resume and resume_from_checkpoint mean."""
    p = config.parameters
    if p.resume == "true" and (newest := checkpoints.newest()):
        return newest
    if p.resume_from_checkpoint:
        return read_checkpoint(p.resume_from_checkpoint, work / "resumed")
    if p.resume == "true":
        raise DraftModelError(
            f"resume: given 'true', but there is no whole checkpoint under {config.output}, and resume_from_checkpoint "
            "is not given: name one there, or use resume=false"
        )
    return None


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


def _prepare(
    config: TrainConfig, ranks: Ranks, model: Path, dataset: Path, resumed: Loaded | None, work: Path
) -> Training:
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
    target = load_target(model, shape.aux_layers, dtype, ranks.device)
    draft = Eagle3Draft(shape, t2d, d2t).to(ranks.device)
    draft.initialise(p.seed, target)
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=p.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    train_split = Split(dataset / "train")
    validation = Split(dataset / "validation") if (dataset / "validation").is_dir() else None
    total = planned_steps(p, len(train_split))
    if not total:
        raise DraftModelError(
            f"draft_global_batch_size: given {p.draft_global_batch_size}; {p.num_epochs} epochs of {len(train_split)} "
            f"conversations fill no optimizer step: use at most {len(train_split) * p.num_epochs}"
        )
    longest = int(max(train_split.lengths.max(), validation.lengths.max() if validation is not None else 0))
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
    if resumed is not None and p.resume == "true":
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


def _check_disk(training: Training, work: Path) -> None:
    """One checkpoint is written here before it is published: float32 weights, two moments, served weights."""
    needed = sum(parameter.numel() for parameter in training.draft.parameters()) * (3 * 4 + 2) + (64 << 20)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DraftModelError(
            f"disk: {work} has {free / 1e9:.2f} GB free and a checkpoint needs {needed / 1e9:.2f} GB: "
            "free some, or run in another folder"
        )


def _announce(training: Training) -> None:
    p, world = training.parameters, training.ranks.world
    tokens = training.train.lengths.mean() * p.draft_global_batch_size
    logger.info(
        "%d process(es) on %s: tensor parallel %d, data parallel %d; %d conversations per step = %d processes x "
        "micro-batch %d x accumulation %d, about %d tokens",
        world, _hardware(training.ranks), p.tp_size, world // p.tp_size, p.draft_global_batch_size, world,
        p.draft_micro_batch_size, p.accumulation_steps, tokens,
    )  # fmt: skip
    logger.info(
        "%d conversations, %.1f steps per epoch, %d steps in all; draft of %.1f M parameters, vocabulary %d of %d, "
        "features after layers %s of %d; computing in %s",
        len(training.train), len(training.train) / p.draft_global_batch_size, training.total,
        _size(training.draft) / 1e6, training.draft.config.draft_vocab_size, training.draft.config.vocab_size,
        list(training.draft.config.aux_layers), training.target.config.num_hidden_layers, p.compute_dtype,
    )  # fmt: skip


def _size(draft: Eagle3Draft) -> int:
    return sum(parameter.numel() for parameter in draft.parameters())


def _hardware(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_name(ranks.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of what shapes a result, by package."""
    packages = ("pipeline-draft-model", "torch", "transformers", "tokenizers", "safetensors", "datasets")
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in packages}}


def _record(training: Training, target: Target, config: TrainConfig, dataset: Path) -> dict[str, Any]:
    """training.json: what was trained, on what, with what result."""
    source: Mapping[str, Any] = storage.read_manifest(config.model, stage="import").properties
    return {
        "parameters": training.parameters.of_stage("train"),
        "draft": training.draft.config.to_json(),
        "draft_parameters": _size(training.draft),
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
        "epochs": training.done * training.parameters.draft_global_batch_size / len(training.train),
        "world_size": training.ranks.world,
        "tokens": training.history.tokens,
        "seconds": training.history.seconds,
        "tokens_per_second": training.history.tokens / max(training.history.seconds, 1e-9),
        "log": training.history.log,
        "validation": training.history.validation,
        "versions": versions(),
        "hardware": _hardware(training.ranks),
    }


def _complete(folder: Path, training: Training, model: Path, dataset: Path, config: TrainConfig) -> None:
    """Puts beside the weights what a served draft has: tokenizer files and the training's record."""
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name not in ("config.json", storage.MANIFEST) and not is_weight(path.name):
            shutil.copyfile(path, folder / path.name)
    record = _record(training, training.target, config, dataset)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """The job pod's door: `torchrun -m draft_model.training`, the configuration in DRAFT_MODEL_JOB."""
    from draft_model.doors import TERMINATED, exit_code

    def work() -> None:
        config = TrainConfig.from_json(os.environ["DRAFT_MODEL_JOB"])
        try:
            result = run(config)
        except Interrupted:
            raise SystemExit(TERMINATED) from None
        if int(os.environ.get("RANK", "0")) == 0:
            (config.work / "result.json").write_text(json.dumps(result.to_json()), encoding="utf-8")

    return exit_code(work)
