"""What a training measured: sums over the log window under way, and the records that became of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from draft_model.drafts.counts import Counts


@dataclass
class History:
    """What a training measured; the report's curves."""

    # one record per `log_steps` steps; of a window in which nothing was supervised, none
    log: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)  # one record per validation
    # steps whose loss or gradient was not finite, with their conversations' lines in the data
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of training, validations and checkpoints included, earlier attempts too
    tokens: int = 0  # that went through the draft
    # what the log window under way has summed, where a checkpoint falls into one
    window: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any] | None:
        """The first validation of the highest acceptance length: step, epoch, acceptance_length."""
        record = max(self.validation, key=lambda record: float(record["acceptance_length"]), default=None)
        return record and {key: record[key] for key in ("step", "epoch", "acceptance_length")}

    def validated(self, step: int) -> float | None:
        """The simulated acceptance length that the validation after a step gave, if there was one."""
        found = [record["acceptance_length"] for record in self.validation if record["step"] == step]
        return float(found[-1]) if found else None

    def acceptance_length(self, step: int) -> float:
        """The simulated one of a step's draft; where it was not validated, the last of validation or training data."""
        records = self.validation or self.log
        return self.validated(step) or (float(records[-1]["acceptance_length"]) if records else 1.0)


class Window:
    """What happened since the last log line, summed; divided only when it is written.

    It begins with `nothing` (on the host), or with what `to_json` saved of a window that a checkpoint interrupted.
    """

    def __init__(self, nothing: Counts, saved: Mapping[str, Any]) -> None:
        self.sums = nothing
        self.tokens, self.seconds, self.norm = 0, 0.0, 0.0  # the norm is the last step's, before clipping
        sums = torch.tensor(saved.get("sums", []), dtype=torch.float64)
        if sums.shape == nothing.tensor().shape:
            self.sums = nothing.from_tensor(sums)
            self.tokens, self.seconds, self.norm = saved["tokens"], saved["seconds"], saved["norm"]

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON, exact."""
        return {**vars(self), "sums": self.sums.tensor().tolist()}

    def record(self, proposals: int, where: Mapping[str, Any]) -> dict[str, Any]:
        """The log record, of decoding simulated with so many proposals; `where` (step, epoch ...) comes first."""
        speed = self.tokens / max(self.seconds, 1e-9)
        return {**where, **self.sums.measures(proposals), "grad_norm": self.norm, "tokens_per_second": speed}


def in_words(record: Mapping[str, Any]) -> str:
    """Loss and acceptance of a log or validation record."""
    loss, conditional = (
        " ".join("-" if value is None else f"{value:.2f}" for value in record[name])
        for name in ("loss", "conditional_acceptance")
    )
    length = f"acceptance length {record['acceptance_length']:.2f} (simulated)"
    return f"loss {loss}, acceptance by position {conditional}, {length}"
