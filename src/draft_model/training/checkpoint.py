"""Checkpoints: a draft that can be served, with the state that training goes on from beside it.

    <output>/epoch_2/config.json, model.safetensors, ...     what engines load
    <output>/epoch_2/training_state/                          float32 weights and moments, position, identity
    <output>/epoch_2/manifest.json                            written last: without it the checkpoint is not there
    <output>/checkpoints.json                                 their names, oldest first

Only safetensors and JSON are read back, so a checkpoint from a stranger can run no code.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft_model import storage
from draft_model.eagle3.export import WEIGHTS, load_weights, save_draft
from draft_model.eagle3.model import Eagle3Draft
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

INDEX = "checkpoints.json"
STAGE = "checkpoint"
_STATE = "training_state"
_OPTIMIZER = ("exp_avg", "exp_avg_sq", "step")  # AdamW's own names; a step without supervised tokens counts for none


@dataclass(frozen=True)
class Position:
    """How far training is, and what it must agree on with whoever goes on.

    Attributes:
        step: optimizer steps done.
        epoch: epochs begun.
        seed: of the data order.
        global_batch: conversations per step.
        dataset: fingerprint of the data set.
        history: measured so far, a `History` as JSON.
    """

    step: int
    epoch: int
    seed: int
    global_batch: int
    dataset: str
    history: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read back.

    Attributes:
        uri: where it is.
        config: its config.json.
        tensors: the served weights and vocabulary, by checkpoint name.
        state: float32 weights and moments by name; None where the folder holds a served draft only.
        position: None likewise.
    """

    uri: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Tensor] | None
    position: Position | None


def optimizer_tensors(draft: Eagle3Draft, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Float32 weights, both moments and the updates so far of every parameter, by name."""
    tensors = {}
    for name, parameter in draft.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def restore(draft: Eagle3Draft, optimizer: torch.optim.Optimizer, state: dict[str, Tensor], uri: str) -> None:
    """Puts a saved state back, to the bit.

    Args:
        draft: of the same shape.
        optimizer: AdamW over its parameters, fresh.
        state: of `optimizer_tensors`.
        uri: what an error names.
    """
    weights = {name.removeprefix("weight."): tensor for name, tensor in state.items() if name.startswith("weight.")}
    load_weights(draft, weights, uri)
    for name, parameter in draft.named_parameters():
        optimizer.state[parameter] = {
            key: state[f"{key}.{name}"].to(parameter.device, copy=True)
            for key in _OPTIMIZER
            if f"{key}.{name}" in state
        }


class Checkpoints:
    """The checkpoints under one output URI.

    Args:
        output: the URI.
        work: scratch folder.
    """

    def __init__(self, output: str, work: Path) -> None:
        self.output, self.work = output, work
        self._index = storage.join(output, INDEX)

    def names(self) -> list[str]:
        """Names of the checkpoints, oldest first."""
        if not storage.exists(self._index):
            return []
        return list(json.loads(storage.read_bytes(self._index)))

    def clear(self) -> None:
        """Forgets the checkpoints of an earlier training, so that none of them is taken for one of this."""
        for name in [*self.names(), "final"]:
            storage.remove_manifest(storage.join(self.output, name))
        storage.write_bytes(self._index, b"[]")

    def save(
        self, name: str, draft: Eagle3Draft, optimizer: torch.optim.Optimizer, position: Position,
        complete: Callable[[Path], None],
    ) -> str:  # fmt: skip
        """Writes one and publishes it.

        Args:
            name: folder under the output, such as `epoch_2`.
            draft: the draft.
            optimizer: its AdamW.
            position: how far training is.
            complete: adds what a served draft has beside its weights (tokenizer, card) to the folder.

        Returns:
            Its URI.
        """
        from safetensors.torch import save_file

        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        save_draft(folder, draft)
        complete(folder)
        (folder / _STATE).mkdir()
        save_file(optimizer_tensors(draft, optimizer), folder / _STATE / "state.safetensors")
        (folder / _STATE / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
        uri = storage.join(self.output, name)
        storage.publish(folder, uri, stage=STAGE, properties={"step": position.step, "epoch": position.epoch})
        names = [other for other in self.names() if other != name] + [name]
        storage.write_bytes(self._index, json.dumps(names).encode())
        shutil.rmtree(folder)
        logger.info("checkpoint %s: step %d, %s", name, position.step, uri)
        return uri

    def newest(self) -> Loaded | None:
        """The newest whole checkpoint; a damaged one is named and the one before it taken."""
        for name in reversed(self.names()):
            uri = storage.join(self.output, name)
            try:
                return read_checkpoint(uri, self.work / "resumed")
            except DraftModelError as error:
                logger.warning("checkpoint %s is passed over: %s", uri, error)
        return None


def read_checkpoint(uri: str, work: Path) -> Loaded:
    """Reads a checkpoint, or a served draft without training state.

    Args:
        uri: its folder; one with a manifest is verified, another is taken as it is.
        work: scratch folder.

    Raises:
        DraftModelError: when it is missing, damaged or no draft.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shutil.rmtree(work, ignore_errors=True)
    whole = storage.exists(storage.join(uri, storage.MANIFEST))
    folder = storage.fetch(uri, work) if whole else storage.fetch_tree(uri, work)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if not (folder / _STATE).is_dir():
            return Loaded(uri, config, tensors, None, None)
        state = load_file(folder / _STATE / "state.safetensors")
        position = Position(**json.loads((folder / _STATE / "position.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DraftModelError(f"{uri} is no checkpoint of a draft that can be read: {error}") from error
    return Loaded(uri, config, tensors, state, position)
