"""The report of a data set: one HTML page without scripts, whose text from the data is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.tally import Tally
from draft_model.dataset.vocabulary import coverage_by_size

_SHOWN_CHARACTERS = 6000


def colour(tokenizer: Any, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> list[tuple[str, bool]]:
    """Returns a conversation (ids int32 [T], mask bool [T]) as pairs of text and supervision, to check by eye.

    Tokens that only together make up a character share a pair. It stops after some pages.
    """
    pairs: list[tuple[str, bool]] = []
    waiting: list[int] = []
    left = _SHOWN_CHARACTERS
    for position, (token, supervised) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ends = position + 1 == len(ids) or mask[position + 1] != supervised
        if ends or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pairs.append((text, supervised))
            waiting = []
            left -= len(text)
        if left < 0:
            break
    return pairs


def write_report(
    properties: Mapping[str, Any], sources: Mapping[str, Any], tallies: Mapping[str, Tally], tokenizer: Any, path: Path
) -> dict[str, Any]:
    """Writes the page; returns what it shows, for report.json.

    Args:
        properties: the manifest's.
        sources: the names of each split's files.
        tallies: the counts of each split.
        tokenizer: the target's.
        path: the page to write.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    train, validation = tallies["train"], tallies.get("validation")
    report = {
        **properties,
        "sources": sources,
        "splits": {split: counts | tallies[split].details() for split, counts in properties["splits"].items()},
        "coverage_by_size": coverage_by_size(train.supervised, validation.supervised if validation else None),
        "samples": [colour(tokenizer, ids, mask) for ids, mask in train.samples],
    }
    loader = PackageLoader("draft_model", "dataset")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: "-" if share is None else f"{100 * share:.2f} %"
    page = environment.get_template("report.html.j2").render(report=report)
    path.write_text(page, encoding="utf-8")
    return report
