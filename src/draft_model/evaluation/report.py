"""The training report: one HTML page without scripts that asks nothing of the network.

The first screen says what the draft saves: acceptance length, by position and category, beside the untrained draft, and
whether the output is unchanged. What an engineer checks, and what should make one suspicious, is below.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draft_model.drafts import family_of
from draft_model.evaluation.card import target_name
from draft_model.evaluation.prompts import VALIDATION
from draft_model.markdown import render
from draft_model.parameters import PARAMETERS
from draft_model.training.plan import expectation

_SHOWN_CHARACTERS = 8_000
_POINTS = 200

Json = Mapping[str, Any]


def write_report(path: Path, content: Json) -> None:
    """Writes the page of report.json's content.

    That is `training` (training.json), `dataset` (its report.json), `evaluation` (evaluation.json, or None with the
    reason in `not_measured`) and `hashes` of what went in and came out.
    """
    evaluation, training, dataset = content["evaluation"], content["training"], content["dataset"]
    counts, proposals = dataset["splits"]["train"], training["parameters"].get("num_speculative_tokens") or 3
    supervised = training["tokens"] * counts["supervised_tokens"] / counts["tokens"]
    speed_chart, charts = _charts(training, evaluation)
    family = family_of(training["draft"])
    page = render(
        "evaluation/templates/report.html.j2",
        **content,
        target=target_name(training),
        family=family.title,
        findings=findings(training, evaluation, dataset),
        charts=charts,
        speed_chart=speed_chart,
        expected=expectation(supervised, proposals, family.name),
        simulated=next((e[-1] for e in (training["validation"], training["log"]) if e), None),
        conversation=_excerpt(dataset["samples"][0]),
        reply=_excerpt(evaluation["sample"]["reply"]) if evaluation else [],
        prompt=evaluation["sample"]["prompt"][-_SHOWN_CHARACTERS:] if evaluation else "",
        parameters=[(parameter, training["parameters"].get(parameter.name)) for parameter in PARAMETERS],
    )
    path.write_text(page, encoding="utf-8")


def _excerpt(pairs: Sequence[Sequence[Any]]) -> list[tuple[str, bool]]:
    """The beginning of a marked text; a long one must not make a long page."""
    shown: list[tuple[str, bool]] = []
    left = _SHOWN_CHARACTERS
    for text, mark in pairs:
        if (left := left - len(text)) < 0:
            return [*shown, ("…", False)]
        shown.append((text, bool(mark)))
    return shown


def findings(training: Json, evaluation: Json | None, dataset: Json) -> list[tuple[str, str]]:
    """What in a run should be checked and what to do about it; arguments as in `write_report`'s content."""
    diverged = sum(not all(x is not None and math.isfinite(x) for x in entry["loss"]) for entry in training["log"])
    content = {"training": training, "evaluation": evaluation, "dataset": dataset, "diverged": diverged}
    page = render("evaluation/templates/findings.txt.j2", **content, validation_split=VALIDATION)
    lines = [line.split(" => ", 1) for line in page.splitlines() if line]
    return [(title, advice) for title, advice in lines]


def _charts(training: Json, evaluation: Json | None) -> tuple[str, list[str]]:
    """Speed-up by batch size, empty where it was not timed, and training curves: data URIs of SVG."""
    log, validation = training["log"][:: max(1, len(training["log"]) // _POINTS)], training["validation"]
    curves = []
    for title, key in (("Loss (nats)", "loss"), ("Conditional acceptance", "conditional_acceptance"),
                       ("Acceptance length", "acceptance_length"), ("Learning rate", "learning_rate")):  # fmt: skip
        lines = []
        for entries, form in ((log, "-"), (validation, "o")):
            entries = [entry for entry in entries if entry.get(key) is not None]
            values = [entry[key] if isinstance(entry[key], list) else [entry[key]] for entry in entries]
            for index, column in enumerate(zip(*values, strict=True)):
                label = f"position {index + 1}" if form == "-" and len(values[0]) > 1 else None
                ys = [math.nan if y is None else y for y in column]
                lines.append(([entry["step"] for entry in entries], ys, form, index, label))
        curves.append(_draw(title, "optimizer step", lines))
    rows = evaluation["speed_by_proposals"] if evaluation else []
    lines = []
    for index, proposals in enumerate(sorted({row["num_speculative_tokens"] for row in rows})):
        its = [row for row in rows if row["num_speculative_tokens"] == proposals]
        xs, ys = [row["batch_size"] for row in its], [row["speed_up"] for row in its]
        lines.append((xs, ys, "o-", index, f"{proposals} proposed"))
    return _draw("Speed-up", "requests at once", lines, base=2) if rows else "", curves if log or validation else []


def _draw(title: str, below: str, lines: Sequence[tuple[Any, Any, str, int, str | None]], base: int = 0) -> str:
    """A chart of (xs, ys, form, colour, label); the same numbers give the same bytes. A base makes x logarithmic."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "axes.spines.top": False, "axes.spines.right": False}
    # Grey reads on a light page and on a dark one.
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#808080")
    with rc_context({**style, **grey, "font.size": 8}):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel=below)
        for xs, ys, form, colour, label in lines:
            axes.plot(xs, ys, form, color=f"C{colour % 10}", markersize=4, label=label)
        if base:
            axes.set_xscale("log", base=base)
            axes.set_xticks(sizes := sorted({x for xs, *_ in lines for x in xs}), map(str, sizes), minor=False)
            axes.axhline(1, color="#808080", linewidth=0.8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6, frameon=False, ncols=2)
        figure.savefig(buffer := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
