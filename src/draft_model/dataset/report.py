"""What the stage counts, per shard and added up for a split, and the page that shows it.

The counts' size does not depend on the input's. The page has no scripts, and text from the data is escaped.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.encode import Encoded
from draft_model.dataset.vocabulary import coverage_by_size
from draft_model.markdown import render

REPORT, REPORT_PAGE, REJECTED = "report.json", "report.html", "rejected.jsonl"
_SHOWN_CHARACTERS = 6000
_BINS = 32
_FIRST = 10
_SAMPLES = 3


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split."""

    rows_in: int  # non-blank lines of the files; rows_kept + rows_rejected
    rows_kept: int
    rows_rejected: int  # lines in rejected.jsonl
    rows_truncated: int  # kept conversations that were cut to max_length
    tokens: int
    supervised_tokens: int
    coverage: float  # share of the supervised tokens that the draft vocabulary has


def count(rows: Encoded) -> dict[str, Any]:
    """Counts a shard's rows as JSON values, for `Tally.add`: pairs of values and how often each occurs."""
    ends = np.cumsum(rows.lengths)[:_SAMPLES]
    samples = [slice(end - length, end) for end, length in zip(ends, rows.lengths, strict=False)]
    columns: dict[str, NDArray[Any]] = {"supervised": rows.ids[rows.mask], "lengths": rows.lengths, "turns": rows.turns}
    return {
        **{name: [a.tolist() for a in np.unique(column, return_counts=True)] for name, column in columns.items()},
        "truncated": rows.truncated,
        "rejected": rows.rejected,
        "samples": [[rows.ids[sample].tolist(), rows.mask[sample].tolist()] for sample in samples],
    }


@dataclass
class Tally:
    """Counts over a split."""

    supervised: NDArray[np.int64]  # how often each target token is supervised, [V]
    lengths: NDArray[np.int64]  # how many kept rows have each length in tokens, [max_length + 1]
    turns: Counter[int] = field(default_factory=Counter)  # kept rows by number of assistant turns
    truncated: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # rejected lines by reason
    first_rejected: list[str] = field(default_factory=list)  # in words
    samples: list[tuple[list[int], list[bool]]] = field(default_factory=list)  # ids, mask

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
        self.samples += counts["samples"][: _SAMPLES - len(self.samples)]

    def reject(self, where: str, reason: str, detail: str) -> None:
        """Counts one rejected line."""
        self.reasons[reason] += 1
        if len(self.first_rejected) < _FIRST:
            self.first_rejected.append(f"{where}: {reason} ({detail})")

    def summary(self, coverage: float) -> SplitSummary:
        """Sums the counts up."""
        kept, rejected, supervised = int(self.lengths.sum()), self.reasons.total(), int(self.supervised.sum())
        tokens = int((self.lengths * np.arange(len(self.lengths))).sum())
        return SplitSummary(kept + rejected, kept, rejected, self.truncated, tokens, supervised, coverage)

    def details(self) -> dict[str, Any]:
        """Returns what the report adds to the summary."""
        ends, longest = np.cumsum(self.lengths), len(self.lengths) - 1
        width = -(-longest // _BINS)
        bins = np.bincount(np.maximum(0, np.arange(longest + 1) - 1) // width, weights=self.lengths).astype(int)
        return {
            "rejected_reasons": dict(sorted(self.reasons.items())),
            "length_quantiles": {
                f"p{q}": int(np.searchsorted(ends, np.ceil(ends[-1] * q / 100))) for q in (50, 90, 99, 100)
            },
            "length_histogram": [
                {"from": i * width + 1, "to": min((i + 1) * width, longest), "rows": rows}
                for i, rows in enumerate(bins.tolist())
            ],
            "assistant_turns": {str(turns): rows for turns, rows in sorted(self.turns.items())},
            "distinct_supervised_tokens": int(np.count_nonzero(self.supervised)),
        }


def colour(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    """Returns a conversation as pairs of text and supervision, to check by eye; stops after some pages."""
    pairs: list[tuple[str, bool]] = []
    left = _SHOWN_CHARACTERS
    for supervised, run in itertools.groupby(zip(ids, mask, strict=True), key=itemgetter(1)):
        tokens = [token for token, _ in itertools.islice(run, left)]
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pairs.append((text[:left], supervised))
        if (left := left - len(text)) <= 0:
            break
    return pairs


def make_report(
    properties: Mapping[str, Any], sources: Mapping[str, Any], tallies: Mapping[str, Tally], samples: Any
) -> dict[str, Any]:
    """Returns what the page shows: the manifest's properties, names of each split's files, coloured conversations."""
    train, validation = tallies["train"], tallies.get("validation")
    return {
        **properties,
        "sources": sources,
        "splits": {split: counts | tallies[split].details() for split, counts in properties["splits"].items()},
        "coverage_by_size": coverage_by_size(train.supervised, validation.supervised if validation else None),
        "samples": samples,
    }


def write_report(package: str, report: Mapping[str, Any], folder: Path) -> None:
    """Writes a report as JSON, and as the page that a package's report.html.j2 makes of it; text in it is escaped."""
    (folder / REPORT_PAGE).write_text(render(f"{package}/report.html.j2", report=report), encoding="utf-8")
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
