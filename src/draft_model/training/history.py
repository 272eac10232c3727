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

    Args:
        nothing: counts of no position, on the host.
        saved: `to_json` of a window that a checkpoint interrupted.
    """

    def __init__(self, nothing: Counts, saved: Mapping[str, Any] | None = None) -> None:
        self.sums = nothing
        self.tokens, self.seconds, self.norm = 0, 0.0, 0.0
        sums = torch.tensor(saved["sums"] if saved else [], dtype=torch.float64)
        if saved and sums.shape == nothing.tensor().shape:
            self.sums = nothing.from_tensor(sums)
            self.tokens, self.seconds, self.norm = saved["tokens"], saved["seconds"], saved["norm"]

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON, exact."""
        return {**vars(self), "sums": self.sums.tensor().tolist()}

    @property
    def measured(self) -> bool:
        """Whether anything was supervised: without, there is no loss that could be written."""
        return bool(self.sums.divisor > 0)

    def add(self, sums: Counts, norm: float) -> None:
        """Adds one step's sums over all processes, and the norm of its gradient before clipping."""
        self.sums, self.norm = self.sums + sums, norm

    def spend(self, tokens: int, seconds: float) -> None:
        """Adds what one step cost."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def record(self, proposals: int, **where: Any) -> dict[str, Any]:
        """The log record.

        Args:
            proposals: tokens that the simulated decoding proposes per round.
            where: step, epoch and the like, which come first.
        """
        speed = self.tokens / max(self.seconds, 1e-9)
        return {**where, **self.sums.measures(proposals), "grad_norm": self.norm, "tokens_per_second": speed}
