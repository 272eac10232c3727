"""One checkpoint: a draft that can be served, with the state that training goes on from beside it.

    epoch_2/config.json, model.safetensors, ...     what engines load
    epoch_2/training_state/                         float32 weights and moments, random states; position, identity
    epoch_2/manifest.json                           written last: without it the checkpoint is not there

Only safetensors and JSON are read back, so a checkpoint from a stranger can run no code. Every process holds the whole
draft, so one file serves any number of processes, and a change of their number reshards nothing.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft_model import drafts, storage
from draft_model.drafts.base import WEIGHTS, Draft, load_weights
from draft_model.drafts.files import save_draft, vocabulary_of
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

STATE = "training_state"
RECORD = "training.json"
_OPTIMIZER = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")  # AdamW's own names, and Muon's


@dataclass(frozen=True)
class Position:
    """How far training is, and what a run that goes on must agree on."""

    step: int  # optimizer steps done
    epoch: int  # epochs begun
    seed: int  # of the data order
    global_batch: int  # conversations per step
    dataset: str  # fingerprint
    world: int  # processes that trained; another number may go on
    history: dict[str, Any]  # measured so far, a `History` as JSON


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read back; a served draft has neither state nor position."""

    uri: str
    folder: Path  # of its files on this machine
    config: dict[str, Any]  # its config.json
    tensors: dict[str, Tensor]  # the served weights and vocabulary, by checkpoint name
    state: dict[str, Tensor] | None  # float32 weights and moments by name; `random`, a row for each process
    position: Position | None


def write_checkpoint(
    folder: Path, draft: Draft, optimizer: torch.optim.Optimizer, position: Position, random: list[Tensor]
) -> None:
    """Writes a checkpoint to this disk, in place of what the folder holds; `random` has each process's state."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    save_draft(folder, draft)
    (folder / STATE).mkdir()
    tensors = {**optimizer_tensors(draft, optimizer), "random": torch.stack(random)}
    save_file(tensors, folder / STATE / "state.safetensors")
    (folder / STATE / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")


def optimizer_tensors(draft: Draft, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Float32 weights, both moments and the updates so far of every parameter, by name."""
    tensors = {}
    for name, parameter in draft.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def restore(draft: Draft, optimizer: torch.optim.Optimizer, state: dict[str, Tensor], uri: str) -> None:
    """Puts what `optimizer_tensors` gave back to the bit, into a draft of the same shape and a fresh optimizer."""
    if any(key.startswith("momentum_buffer.") for key in state) != (optimizer.defaults.get("name") == "muon"):
        raise DraftModelError(
            f"draft_optimizer: the training in {uri} used the other optimizer, whose state means nothing to this one: "
            "use the same, or resume=false with resume_from_checkpoint"
        )
    weights = {name.removeprefix("weight."): tensor for name, tensor in state.items() if name.startswith("weight.")}
    load_weights(draft, weights, uri)
    for name, parameter in draft.named_parameters():
        saved = {key: state[f"{key}.{name}"] for key in _OPTIMIZER if f"{key}.{name}" in state}
        optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in saved.items()}


def read_checkpoint(uri: str, work: Path) -> Loaded:
    """Reads a checkpoint, or a served draft without training state, ours or another trainer's.

    Ours is checked against its manifest; another trainer's has none.

    Raises:
        DraftModelError: when it is missing, damaged, one of ours without its manifest, or no draft.
    """
    shutil.rmtree(work, ignore_errors=True)
    whole = storage.exists(storage.join(uri, storage.MANIFEST))
    return load_checkpoint(uri, storage.fetch(uri, work) if whole else storage.fetch_tree(uri, work), whole)


def load_checkpoint(uri: str, folder: Path, whole: bool = True) -> Loaded:
    """The same of a folder of this machine that its files were fetched to; `whole`: as the manifest has them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not whole:
            # Trainers that start from a draft of ours keep its keys; transformers adds its version as they save.
            saved_here = "target_model_type" in config and "transformers_version" not in config
            if saved_here or (folder / STATE).exists() or (folder / RECORD).exists():
                raise DraftModelError(
                    f"{uri} was written by this project and has no {storage.MANIFEST}, so a file of it may be cut or "
                    f"changed: copy the whole folder, {storage.MANIFEST} too"
                )
            logger.warning("%s has no %s: a draft of another trainer, taken unchecked", uri, storage.MANIFEST)
        config, tensors = drafts.family_of(config, uri).read(config, load_file(folder / WEIGHTS), uri)
        if not (folder / STATE).is_dir():
            return Loaded(uri, folder, config, tensors, None, None)
        state = load_file(folder / STATE / "state.safetensors")
        position = Position(**json.loads((folder / STATE / "position.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, SafetensorError) as error:
        raise DraftModelError(f"{uri} is no checkpoint of a draft that can be read: {error}") from error
    return Loaded(uri, folder, config, tensors, state, position)


def load_draft(loaded: Loaded, target: Mapping[str, Any], source: str = "") -> Any:
    """The draft of a checkpoint, in the shape that its configuration and the target's config.json give it.

    Raises:
        DraftModelError: when it is of another target, of other maths, or lacks tensors; names the source, or the URI.
    """
    family = drafts.family_of(loaded.config, loaded.uri)
    shape = family.adapt(family.default_shape(target), loaded.config, source or loaded.uri)
    draft = family.create(shape, *vocabulary_of(loaded.tensors, shape))
    load_weights(draft, loaded.tensors, loaded.uri)
    return draft
