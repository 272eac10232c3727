"""What the stage counts and tells: rows, lengths, reasons, coverage, and one conversation to look at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.encode import Encoded

_BINS = 32
_SHOWN = 10


@dataclass(frozen=True)
class SplitSummary:
    """What became of one split.

    Attributes:
        rows_in: non-blank lines of the file; rows_kept + rows_rejected.
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
    """Counts over one split, chunk by chunk; its size does not depend on the file's.

    Attributes:
        supervised: how often each target token is supervised, int64 [V].
        lengths: how many kept rows have each length in tokens, int64 [max_length + 1].
        truncated: kept rows that were cut.
        reasons: rejected lines by reason.
        first_rejected: the first ten of them, in words.
        first_row: ids and mask of the first kept row.
    """

    supervised: NDArray[np.int64]
    lengths: NDArray[np.int64]
    truncated: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_rejected: list[str] = field(default_factory=list)
    first_row: tuple[NDArray[np.int32], NDArray[np.bool_]] | None = None

    @classmethod
    def empty(cls, vocab_size: int, max_length: int) -> Tally:
        """A tally of nothing yet."""
        return cls(np.zeros(vocab_size, np.int64), np.zeros(max_length + 1, np.int64))

    def add(self, rows: Encoded) -> None:
        """Counts one chunk."""
        self.supervised += np.bincount(rows.ids[rows.mask], minlength=len(self.supervised))
        self.lengths += np.bincount(rows.lengths, minlength=len(self.lengths))
        self.truncated += rows.truncated
        for number, reason, detail in rows.rejected:
            self.reasons[reason] += 1
            if len(self.first_rejected) < _SHOWN:
                self.first_rejected.append(f"line {number}: {reason} ({detail})")
        if self.first_row is None and len(rows.lengths):
            first = slice(0, int(rows.lengths[0]))
            self.first_row = rows.ids[first].copy(), rows.mask[first].copy()

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
            "distinct_supervised_tokens": int(np.count_nonzero(self.supervised)),
        }


def sample(tokenizer: Any, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> list[tuple[str, bool]]:
    """A conversation as text, token by token, with what is supervised: to check the mask by eye.

    Args:
        tokenizer: the target's.
        ids: int32 [T].
        mask: bool [T].

    Returns:
        Pairs of text and supervision; tokens that only together make up a character share a pair.
    """
    pairs: list[tuple[str, bool]] = []
    waiting: list[int] = []
    for position, (token, supervised) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ends = position + 1 == len(ids) or mask[position + 1] != supervised
        if ends or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pairs.append((text, supervised))
            waiting = []
    return pairs
