"""What the stage counts: per piece, so that pods can count apart, and added up for a split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.encode import Encoded

_BINS = 32
_SHOWN = 10
SAMPLES = 3


@dataclass(frozen=True)
class SplitSummary:
    """What became of one split.

    Attributes:
        rows_in: non-blank lines of the files; rows_kept + rows_rejected.
        rows_kept: conversations in the data set.
        rows_rejected: lines in rejected.jsonl.
        rows_truncated: kept conversations that were cut to max_length.
        tokens: of all kept conversations.
        supervised_tokens: those of the assistant's turns.
        coverage: the share of supervised tokens that the draft vocabulary has.
    """

    rows_in: int
    rows_kept: int
    rows_rejected: int
    rows_truncated: int
    tokens: int
    supervised_tokens: int
    coverage: float


@dataclass
class Tally:
    """Counts over a piece or a split, chunk by chunk; its size does not depend on the file's.

    Attributes:
        supervised: how often each target token is supervised, int64 [V].
        lengths: how many kept rows have each length in tokens, int64 [max_length + 1].
        turns: kept rows by their number of assistant turns.
        truncated: kept rows that were cut.
        reasons: rejected lines by reason.
        first_rejected: the first ten of them, in words.
        samples: ids and mask of the first three kept rows.
    """

    supervised: NDArray[np.int64]
    lengths: NDArray[np.int64]
    turns: Counter[int] = field(default_factory=Counter)
    truncated: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_rejected: list[str] = field(default_factory=list)
    samples: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = field(default_factory=list)

    @classmethod
    def empty(cls, vocab_size: int, max_length: int) -> Tally:
        """A tally of nothing yet."""
        return cls(np.zeros(vocab_size, np.int64), np.zeros(max_length + 1, np.int64))

    def add(self, rows: Encoded) -> None:
        """Counts one chunk; its rejected lines are told by `reject`."""
        self.supervised += np.bincount(rows.ids[rows.mask], minlength=len(self.supervised))
        self.lengths += np.bincount(rows.lengths, minlength=len(self.lengths))
        self.turns.update(rows.turns.tolist())
        self.truncated += rows.truncated
        ends = np.cumsum(rows.lengths)
        for end, length in zip(ends, rows.lengths[: SAMPLES - len(self.samples)], strict=False):
            self.samples.append((rows.ids[end - length : end].copy(), rows.mask[end - length : end].copy()))

    def reject(self, where: str, reason: str, detail: str) -> None:
        """Counts one rejected line."""
        self.reasons[reason] += 1
        if len(self.first_rejected) < _SHOWN:
            self.first_rejected.append(f"{where}: {reason} ({detail})")

    def to_json(self) -> dict[str, Any]:
        """The counts of a piece, without its rejected lines."""
        ids, lengths = np.flatnonzero(self.supervised), np.flatnonzero(self.lengths)
        return {
            "supervised": [ids.tolist(), self.supervised[ids].tolist()],
            "lengths": [lengths.tolist(), self.lengths[lengths].tolist()],
            "turns": [list(self.turns), list(self.turns.values())],
            "truncated": self.truncated,
            "samples": [[ids.tolist(), mask.astype(int).tolist()] for ids, mask in self.samples],
        }

    def add_json(self, counts: Mapping[str, Any]) -> None:
        """Adds the counts of a piece."""
        for array, (places, numbers) in ((self.supervised, counts["supervised"]), (self.lengths, counts["lengths"])):
            np.add.at(array, np.array(places, np.int64), np.array(numbers, np.int64))
        self.turns.update(dict(zip(*counts["turns"], strict=True)))
        self.truncated += counts["truncated"]
        for ids, mask in counts["samples"][: SAMPLES - len(self.samples)]:
            self.samples.append((np.array(ids, np.int32), np.array(mask, np.bool_)))

    @property
    def kept(self) -> int:
        """Rows in the data set."""
        return int(self.lengths.sum())

    @property
    def rejected(self) -> int:
        """Lines put aside."""
        return self.reasons.total()

    def summary(self, coverage: float) -> SplitSummary:
        """The split in seven numbers."""
        return SplitSummary(
            rows_in=self.kept + self.rejected,
            rows_kept=self.kept,
            rows_rejected=self.rejected,
            rows_truncated=self.truncated,
            tokens=int((self.lengths * np.arange(len(self.lengths))).sum()),
            supervised_tokens=int(self.supervised.sum()),
            coverage=coverage,
        )

    def details(self) -> dict[str, Any]:
        """What the report adds to the summary."""
        ends = np.cumsum(self.lengths)
        quantiles = {f"p{q}": int(np.searchsorted(ends, np.ceil(ends[-1] * q / 100))) for q in (50, 90, 99, 100)}
        width = -(-(len(self.lengths) - 1) // _BINS)
        bins = np.bincount(np.maximum(0, np.arange(len(self.lengths)) - 1) // width, weights=self.lengths)
        return {
            "rejected_reasons": dict(sorted(self.reasons.items())),
            "length_quantiles": quantiles,
            "length_histogram": [
                {"from": i * width + 1, "to": min((i + 1) * width, len(self.lengths) - 1), "rows": int(rows)}
                for i, rows in enumerate(bins)
            ],
            "assistant_turns": {str(turns): rows for turns, rows in sorted(self.turns.items())},
            "distinct_supervised_tokens": int(np.count_nonzero(self.supervised)),
        }


def to_bytes(counts: Mapping[str, Any]) -> bytes:
    """JSON, the same bytes for the same counts."""
    return json.dumps(counts, sort_keys=True, separators=(",", ":")).encode()
