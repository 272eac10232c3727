"""Markdown, for the pages that the KFP UI shows and for generated documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def cell(value: Any) -> str:
    """A value on one line, and never as markup."""
    text = " ".join(str(value).split())
    for character in "\\|*_`<>[]":
        text = text.replace(character, "\\" + character)
    return text


def table(
    rows: Mapping[str, Any] | Iterable[Iterable[Any]], heads: tuple[str, ...] = ("", ""), *, raw: bool = False
) -> str:
    """A Markdown table of names with their values, or of rows; cells may be Markdown already (`raw`)."""
    lines = rows.items() if isinstance(rows, Mapping) else rows
    cells = [heads, ["---"] * len(heads), *([str(value) if raw else cell(value) for value in line] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list; a sentence of several lines stays one point."""
    return "".join(f"- {cell(line)}\n" for line in lines)
