"""Markdown, for the pages that the KFP UI shows and for generated documentation; pages of templates, HTML too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from draft_model.errors import without_credentials


def cell(value: Any) -> str:
    """A value on one line, and never as markup."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", " ".join(str(value).split()))


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


def render(template: str, **content: Any) -> str:
    """A page of `package/name.j2`; those of HTML escape what is put in, those of Markdown where they say `md`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("draft_model", ""),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": partial(_number, digits=0),
        "decimal": _number,
        "percent": partial(_number, digits=1, kind="%"),
        "compact": lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
        "md": cell,
        "line": lambda text: " ".join(str(text).split()),
        "uri": lambda uri: cell(without_credentials(uri)),
    }
    return environment.get_template(template).render(**content)


def _number(value: float | None, digits: int = 2, kind: str = "f") -> str:
    return f"{value:,.{digits}{kind}}" if value is not None and math.isfinite(value) else "–"
