"""What the stage counts, per shard and added up for a split; its size does not depend on the input's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.encode import Encoded

_BINS = 32
_FIRST = 10
_SAMPLES = 3


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split.

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


def count(rows: Encoded) -> dict[str, Any]:
    """Counts a shard's rows as JSON values, for `Tally.add`: pairs of values and how often each occurs."""
    ends = np.cumsum(rows.lengths)[:_SAMPLES]
    samples = [slice(end - length, end) for end, length in zip(ends, rows.lengths, strict=False)]
    return {
        "supervised": _frequencies(rows.ids[rows.mask]),
        "lengths": _frequencies(rows.lengths),
        "turns": _frequencies(rows.turns),
        "truncated": rows.truncated,
        "rejected": rows.rejected,
        "samples": [[rows.ids[sample].tolist(), rows.mask[sample].tolist()] for sample in samples],
    }


def _frequencies(values: NDArray[Any]) -> list[list[int]]:
    return [array.tolist() for array in np.unique(values, return_counts=True)]


@dataclass
class Tally:
    """Counts over a split.

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
        """Returns a tally of no rows."""
        return cls(np.zeros(vocab_size, np.int64), np.zeros(max_length + 1, np.int64))

    def add(self, counts: Mapping[str, Any]) -> None:
        """Adds what `count` returned; its rejected lines are added by `reject`."""
        for array, (values, numbers) in ((self.supervised, counts["supervised"]), (self.lengths, counts["lengths"])):
            array[values] += np.array(numbers, np.int64)
        self.turns.update(dict(zip(*counts["turns"], strict=True)))
        self.truncated += counts["truncated"]
        for ids, mask in counts["samples"][: _SAMPLES - len(self.samples)]:
            self.samples.append((np.array(ids, np.int32), np.array(mask, np.bool_)))

    def reject(self, where: str, reason: str, detail: str) -> None:
        """Counts one rejected line."""
        self.reasons[reason] += 1
        if len(self.first_rejected) < _FIRST:
            self.first_rejected.append(f"{where}: {reason} ({detail})")

    @property
    def kept(self) -> int:
        """Rows in the data set."""
        return int(self.lengths.sum())

    def summary(self, coverage: float) -> SplitSummary:
        """Sums the counts up."""
        return SplitSummary(
            rows_in=self.kept + self.reasons.total(),
            rows_kept=self.kept,
            rows_rejected=self.reasons.total(),
            rows_truncated=self.truncated,
            tokens=int((self.lengths * np.arange(len(self.lengths))).sum()),
            supervised_tokens=int(self.supervised.sum()),
            coverage=coverage,
        )

    def details(self) -> dict[str, Any]:
        """Returns what the report adds to the summary."""
        ends = np.cumsum(self.lengths)
        quantiles = {f"p{q}": int(np.searchsorted(ends, np.ceil(ends[-1] * q / 100))) for q in (50, 90, 99, 100)}
        longest = len(self.lengths) - 1
        width = -(-longest // _BINS)
        bins = np.bincount(np.maximum(0, np.arange(longest + 1) - 1) // width, weights=self.lengths)
        return {
            "rejected_reasons": dict(sorted(self.reasons.items())),
            "length_quantiles": quantiles,
            "length_histogram": [
                {"from": i * width + 1, "to": min((i + 1) * width, longest), "rows": int(rows)}
                for i, rows in enumerate(bins)
            ],
            "assistant_turns": {str(turns): rows for turns, rows in sorted(self.turns.items())},
            "distinct_supervised_tokens": int(np.count_nonzero(self.supervised)),
        }
