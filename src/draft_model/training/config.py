"""What a training job is given, and what it returns; both travel between processes as JSON."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.parameters import Parameters

logger = logging.getLogger(__name__)

INDEX = "checkpoints.json"
STAGE = "checkpoint"
_NAME = re.compile(r"(epoch|step)_\d{1,12}(_\d{1,4})?")


@dataclass(frozen=True)
class TrainConfig:
    """One training job.

    Another attempt (`again`) of a run that broke off goes on from the newest whole checkpoint that there is, whatever
    `resume` says of earlier runs; with a run_id it does so from that run's own anyway.
    """

    model: str  # URI of the imported target
    dataset: str  # URI of the data set
    output: str  # URI that `final/` goes under, and where no checkpoint_path is given the checkpoints
    work: Path  # scratch folder on this machine
    parameters: Parameters
    run_id: str = ""  # of the pipeline's run; empty for a training that was started by itself
    again: bool = False

    @property
    def checkpoints(self) -> str:
        """URI that the checkpoints go under: `epoch_N/` and `checkpoints.json`."""
        return self.parameters.checkpoint_path or self.output

    def to_json(self) -> str:
        """The configuration as one line of JSON."""
        return json.dumps({**vars(self), "work": str(self.work), "parameters": self.parameters.model_dump()})

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The inverse of `to_json`."""
        values = json.loads(text)
        parameters = Parameters.model_validate(values["parameters"])
        return cls(**{**values, "work": Path(values["work"]), "parameters": parameters})


@dataclass(frozen=True)
class TrainResult:
    """What a training job leaves."""

    output: str  # URI that the checkpoints are under
    final: str  # URI of the draft to serve
    steps: int  # optimizer steps of the whole training, resumed ones included
    loss: float  # mean of the first unroll step over the last logged window, nats
    acceptance_length: float  # of the final draft, simulated, on the validation split, else on the training data

    @classmethod
    def from_record(cls, output: str, final: str, record: Mapping[str, Any]) -> TrainResult:
        """The result that the training.json of a finished training tells."""
        log = record["log"]
        loss = log[-1]["loss"][0] if log else 0.0
        return cls(output, final, record["steps"], loss, float(record["acceptance_length"]))


def list_checkpoints(uri: str) -> list[str]:
    """Names of the checkpoints under a URI, oldest first; the last may be half-written.

    Where the index is missing or damaged, the checkpoints' own manifests say what is there.
    """
    data = storage.read_file(storage.join(uri, INDEX))
    with suppress(ValueError):
        listed = json.loads(data) if data is not None else None
        if isinstance(listed, list):
            return [name for name in listed if isinstance(name, str) and _NAME.fullmatch(name)]
    folders = {name.partition("/")[0] for name in storage.list_files(uri) if name.endswith(storage.MANIFEST)}
    found = {name: properties_of(storage.join(uri, name)) for name in folders if _NAME.fullmatch(name)}
    steps = {name: its["step"] for name, its in found.items() if its}
    names = sorted(steps, key=steps.__getitem__)
    if names or data is not None:
        state, whole = "is missing" if data is None else "is damaged", ", ".join(names) or "none"
        logger.warning("%s %s; whole checkpoints there: %s", storage.join(uri, INDEX), state, whole)
    return names


def properties_of(uri: str) -> dict[str, Any] | None:
    """What the manifest of a checkpoint says; None of one that is half-written or damaged."""
    try:
        return dict(storage.read_manifest(uri, stage=STAGE).properties)
    except StoreUnavailable:
        raise
    except DraftModelError:
        return None
