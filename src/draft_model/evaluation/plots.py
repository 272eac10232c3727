"""The report's charts: matplotlib draws them, the page colours them.

Each chart is one inline SVG without a background. Its colours are the page's CSS variables, so one drawing
serves light and dark; it is drawn at 4.4 inches, so that its letters can be read when the page makes it 350
pixels wide. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

POSITION_COLOURS = 8
_MAX_POINTS = 200
_DASHES = (0, (4, 3))
_NAMES = (
    "ink", "muted", "grid", "surface", "trained", "untrained", "validation",
    *(f"position{i}" for i in range(POSITION_COLOURS)),
)  # fmt: skip
# matplotlib knows no CSS variables: colours it will not use by itself stand for them until the SVG is text.
_STAND_IN = {name: f"#0000{index + 1:02x}" for index, name in enumerate(_NAMES)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _STAND_IN["muted"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _STAND_IN["grid"],
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "text.color": _STAND_IN["ink"],
    "xtick.color": _STAND_IN["muted"],
    "ytick.color": _STAND_IN["muted"],
    "xtick.major.size": 2,
    "ytick.major.size": 0,
}

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """One entry of a legend, which the page writes as text.

    Attributes:
        label: what it stands for.
        colour: the CSS variable, without its dashes.
        mark: `line`, `dot`, `bar` or `diamond`.
    """

    label: str
    colour: str
    mark: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        title: what is shown.
        note: how to read it; may be empty.
        svg: the drawing.
        keys: its legend.
    """

    title: str
    note: str
    svg: Markup
    keys: tuple[Key, ...] = ()


def training_charts(
    log: Sequence[Entry], validation: Sequence[Entry], *, clip: float | None, measured: float | None
) -> list[Chart]:
    """Charts over the optimizer steps.

    Args:
        log: the training's log; values per draft position are lists.
        validation: the same of each validation; may be empty.
        clip: the norm that gradients were clipped to.
        measured: acceptance length that the evaluation measured, tokens per target pass.

    Returns:
        Loss and conditional acceptance per draft position, acceptance length, gradient norm, learning rate
        and throughput; none for an empty log.
    """
    if not log:
        return []
    positions = len(log[0]["loss"])
    keys = tuple(Key(f"position {i + 1}", _position(i, positions), "line") for i in range(positions))
    if validation:
        keys += (Key("validation", "ink", "dot"),)
    size = -(-len(log) // _MAX_POINTS)
    note = f"Each point is the mean of {size} log lines." if size > 1 else ""
    return [
        Chart("Loss by draft position (nats per token)", note, _steps("loss", log, validation, "loss"), keys),
        Chart(
            "Conditional acceptance by draft position",
            "Share of drafts accepted at a position, of those accepted up to it.",
            _steps("conditional", log, validation, "conditional_acceptance", share=True),
            keys,
        ),
        _length_chart(log, validation, measured),
        Chart(
            "Gradient norm before clipping",
            f"Dashed: clipped to {clip:g}." if clip else "",
            _steps("gradient", log, (), "grad_norm", level=clip or None),
        ),
        Chart("Learning rate", "", _steps("rate", log, (), "learning_rate")),
        Chart("Tokens per second", "", _steps("throughput", log, (), "tokens_per_second", from_zero=True)),
    ]


def _length_chart(log: Sequence[Entry], validation: Sequence[Entry], measured: float | None) -> Chart:
    keys = [Key("training", "trained", "line")]
    keys += [Key("validation", "trained", "dot")] if validation else []
    keys += [Key("measured by decoding", "validation", "line")] if measured is not None else []
    return Chart(
        "Acceptance length (tokens per target pass)",
        "Training and validation: simulated from the conditional acceptance.",
        _steps("length", log, validation, "acceptance_length", level=measured, level_colour="validation"),
        tuple(keys),
    )


def acceptance_charts(trained: Entry, untrained: Entry, simulated: Sequence[float] | None) -> tuple[Chart, Chart]:
    """Bars of acceptance by draft position, before and after training.

    Args:
        trained: the evaluation's counts with the trained draft.
        untrained: the same with the draft as it was initialised.
        simulated: conditional acceptance of the last validation, per position.

    Returns:
        The cumulative and the conditional chart.
    """
    keys = (Key("trained", "trained", "bar"), Key("untrained", "untrained", "bar"))
    cumulative = _bars("bars-cumulative", trained["acceptance_by_position"], untrained["acceptance_by_position"], None)
    name = "conditional_acceptance_by_position"
    conditional = _bars("bars-conditional", trained[name], untrained[name], simulated)
    return (
        Chart(
            "Cumulative: all drafts that got this far",
            "Share of target passes in which this position was accepted, and so all before it.",
            cumulative,
            keys,
        ),
        Chart(
            "Conditional: of drafts accepted up to here",
            "Share of drafts accepted at this position, of those accepted at the one before.",
            conditional,
            (*keys, Key("predicted by the last validation", "validation", "diamond")) if simulated else keys,
        ),
    )


def speed_chart(by_proposals: Sequence[Entry], hardware: str) -> Chart:
    """Predicted speed-up over the number of proposals.

    Args:
        by_proposals: the prediction's records of `proposals` and `speed_up`.
        hardware: that its costs were measured on.
    """

    def paint(axes: Any) -> None:
        axes.axhline(1, color=_STAND_IN["muted"], linewidth=1, linestyle=_DASHES)
        proposals = [item["proposals"] for item in by_proposals]
        speeds = [item["speed_up"] for item in by_proposals]
        axes.plot(proposals, speeds, marker="o", color=_STAND_IN["trained"])
        axes.set_xticks(proposals)
        axes.set_xlabel("tokens proposed at a time")
        axes.set_ylim(0, 1.1 * max(1, *speeds))
        axes.yaxis.set_major_locator(_ticks())

    note = f"One request at a time, on {hardware}. Dashed: the target alone."
    return Chart("Predicted speed-up", note, _svg("speed", paint))


def length_chart(histogram: Sequence[Entry], max_length: int) -> Chart:
    """The training conversations' lengths.

    Args:
        histogram: bins of the data set's report: `from`, `to` (tokens, inclusive) and `rows`.
        max_length: where longer ones were cut, tokens.
    """
    used = max((i + 1 for i, item in enumerate(histogram) if item["rows"]), default=1)
    shown = histogram[:used]

    def paint(axes: Any) -> None:
        axes.bar(
            [item["from"] - 1 for item in shown], [item["rows"] for item in shown],
            [item["to"] - item["from"] + 1 for item in shown],
            align="edge", color=_STAND_IN["trained"], edgecolor=_STAND_IN["surface"], linewidth=0.5,
        )  # fmt: skip
        axes.set_xlabel("tokens")
        axes.set_ylabel("conversations")
        axes.yaxis.set_major_locator(_ticks(integer=True))

    return Chart("Lengths of the training conversations", f"Cut at {max_length:,} tokens.", _svg("lengths", paint))


def coverage_chart(by_size: Sequence[Entry], chosen: int) -> Chart:
    """What draft vocabularies of other sizes would cover.

    Args:
        by_size: records of the data set's report: `size`, `train` and `validation` (shares).
        chosen: D, the size that was used.
    """
    with_validation = any(item["validation"] is not None for item in by_size)
    sizes = [item["size"] for item in by_size]

    def paint(axes: Any) -> None:
        axes.axvline(chosen, color=_STAND_IN["muted"], linewidth=1, linestyle=_DASHES)
        axes.plot(sizes, [item["train"] for item in by_size], marker="o", color=_STAND_IN["trained"])
        if with_validation:
            values = [item["validation"] for item in by_size]
            axes.plot(sizes, values, marker="o", color=_STAND_IN["validation"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [_short(size) for size in sizes])
        axes.tick_params(axis="x", which="minor", length=0)
        axes.set_xlabel("tokens in the draft vocabulary")
        axes.yaxis.set_major_formatter(_percent)

    keys = [Key("training", "trained", "line")]
    keys += [Key("validation", "validation", "line")] if with_validation else []
    note = f"Share of supervised tokens that are in it. Dashed: the {chosen:,} that were used."
    return Chart("Coverage by size of the draft vocabulary", note, _svg("coverage", paint), tuple(keys))


def _position(index: int, positions: int) -> str:
    spread = index * (POSITION_COLOURS - 1) / max(1, positions - 1)
    return f"position{math.floor(spread + 0.5)}"


def _short(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size / 1000:.0f}k"


def _percent(share: float, _tick: int) -> str:
    return f"{100 * share:g} %"


def _ticks(*, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _series(entries: Sequence[Entry], key: str) -> tuple[list[float], list[list[float]]]:
    """Steps, and a list of values per position; a long log is thinned to means, a missing value is a gap."""
    size = max(1, -(-len(entries) // _MAX_POINTS))
    bins = [entries[i : i + size] for i in range(0, len(entries), size)]
    rows = [[_numbers(entry[key]) for entry in part] for part in bins]
    steps = [_mean([entry["step"] for entry in part]) for part in bins]
    return steps, [[_mean([row[p] for row in part]) for part in rows] for p in range(len(rows[0][0]))]


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [math.nan if item is None else float(item) for item in values]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _steps(
    name: str,
    log: Sequence[Entry],
    validation: Sequence[Entry],
    key: str,
    *,
    share: bool = False,
    from_zero: bool = False,
    level: float | None = None,
    level_colour: str = "muted",
) -> Markup:
    """A value over the optimizer steps: lines of the training, dots of the validations, perhaps a level."""

    def paint(axes: Any) -> None:
        steps, lines = _series(log, key)
        several = len(lines) > 1
        for i, values in enumerate(lines):
            colour = _STAND_IN[_position(i, len(lines)) if several else "trained"]
            # A log of one line has no line to draw.
            axes.plot(steps, values, color=colour, marker="." if len(steps) == 1 else "")
        for i, values in enumerate(_series(validation, key)[1] if validation else []):
            colour = _STAND_IN[_position(i, len(lines)) if several else "trained"]
            axes.plot(
                [entry["step"] for entry in validation], values, "o", color=colour,
                markeredgecolor=_STAND_IN["surface"], markeredgewidth=0.6,
            )  # fmt: skip
        if level is not None:
            axes.axhline(level, color=_STAND_IN[level_colour], linewidth=1, linestyle=_DASHES)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(_ticks(integer=True))
        axes.yaxis.set_major_locator(_ticks())
        if share or from_zero:
            axes.set_ylim(bottom=0)
        if share:
            axes.yaxis.set_major_formatter(_percent)

    return _svg(name, paint)


def _bars(name: str, trained: Sequence[float], untrained: Sequence[float], simulated: Sequence[float] | None) -> Markup:
    def paint(axes: Any) -> None:
        positions = range(1, len(trained) + 1)
        for offset, series, values in ((-0.2, "trained", trained), (0.2, "untrained", untrained)):
            heights = [_mean([value]) if value is not None else math.nan for value in values]
            bars = axes.bar([p + offset for p in positions], heights, 0.36, color=_STAND_IN[series], linewidth=0)
            if len(trained) <= 5:
                labels = ["" if math.isnan(height) else f"{100 * height:.0f} %" for height in heights]
                axes.bar_label(bars, labels, padding=2)
        if simulated:
            shown = list(simulated)[: len(trained)]
            axes.plot(
                [p - 0.42 for p in positions][: len(shown)], shown, "D", color=_STAND_IN["validation"],
                markeredgecolor=_STAND_IN["surface"], markeredgewidth=0.8, markersize=5,
            )  # fmt: skip
        axes.set_xticks(list(positions))
        axes.set_xlim(0.5, len(trained) + 0.5)
        axes.set_xlabel("draft position")
        axes.set_ylim(0, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(_percent)

    return _svg(name, paint)


def _svg(name: str, paint: Callable[[Any], None]) -> Markup:
    """Draws on fresh axes, and makes of matplotlib's file an element of a page."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # "default" first: a matplotlibrc on the machine must not change the report.
    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        paint(figure.add_subplot())
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    # The groups' ids say nothing and would meet those of the next chart; what is referred to has a hashed id.
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"\s+", " ", text)
    # Coordinates to a hundredth of a point; the numbers between the tags are labels.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"#0000([0-9a-f]{2})\b", lambda match: f"var(--{_NAMES[int(match[1], 16) - 1]})", text)
    return Markup(text)  # noqa: S704 - matplotlib escapes the text it writes
