"""The training report: one HTML file that says first what the draft saves, then how that came about.

The file is a pure function of JSON objects, needs no script and asks nothing of the network. What a
manager needs stands on the first screen; what an engineer checks, and what should make one suspicious, stands
below. Saved are target passes, which is what was measured: no speed-up is claimed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from draft_model.evaluation import plots
from draft_model.parameters import PARAMETERS

NOTHING = "–"
MIN_COVERAGE = 0.98
MAX_TRUNCATED = 0.05
MAX_PREDICTION_ERROR = 0.2
_MAX_SHOWN_CHARACTERS = 8_000

Json = Mapping[str, Any]


def contents(training: Json, evaluation: Json | None, dataset: Json, hashes: Sequence[Json] = ()) -> dict[str, Any]:
    """The same data as `write_report` shows, as report.json holds it; docs/report.schema.json describes it."""
    return {
        "training": {name: value for name, value in training.items() if name != "dataset"},
        "dataset": dataset,
        "evaluation": evaluation,
        "hashes": list(hashes),
        "findings": [vars(finding) for finding in findings(training, evaluation, dataset)],
    }


def write_report(
    path: Path, training: Json, evaluation: Json | None, dataset: Json, hashes: Sequence[Json] = ()
) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        training: what the training stage tells of itself: parameters, log, validations, versions.
        evaluation: what decoding with the draft measured; None where there was nothing to decode.
        dataset: the data set's report.json.
        hashes: what went in and came out: records of `of`, `uri` and `sha256`.
    """
    validation = training["validation"]
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            training=training,
            evaluation=evaluation,
            dataset=dataset,
            target=target_name(training),
            passes=_passes(evaluation) if evaluation else [],
            simulated=_simulated(training),
            findings=findings(training, evaluation, dataset),
            training_charts=plots.training_charts(
                training["log"],
                validation,
                clip=training["parameters"].get("max_grad_norm"),
                measured=evaluation["trained"]["acceptance_length"] if evaluation else None,
            ),
            acceptance_charts=plots.acceptance_charts(
                evaluation["trained"],
                evaluation["untrained"],
                validation[-1]["conditional_acceptance"] if validation else None,
            )
            if evaluation
            else (),
            speed_chart=plots.speed_chart(
                evaluation["prediction"]["by_proposals"], evaluation["prediction"]["costs"]["hardware"]
            )
            if evaluation
            else None,
            hashes=hashes,
            length_chart=plots.length_chart(dataset["splits"]["train"]["length_histogram"], dataset["max_length"]),
            coverage_chart=plots.coverage_chart(dataset["coverage_by_size"], dataset["draft_vocab_size"]),
            conversation=_joined(_excerpt(dataset["samples"][0])),
            prompt=evaluation["sample"]["prompt"][-_MAX_SHOWN_CHARACTERS:] if evaluation else "",
            reply=_excerpt(evaluation["sample"]["reply"]) if evaluation else None,
            parameters=_parameter_rows(training["parameters"]),
        )
    )
    path.write_text(page, encoding="utf-8")


def environment() -> Environment:
    """Templates with the number formats of report and card; what goes into HTML is escaped."""
    made = Environment(
        loader=PackageLoader("draft_model", "evaluation/templates"),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "count": count, "decimal": decimal, "percent": percent, "magnitude": magnitude, "duration": duration,
        "compact": lambda value: json.dumps(value, ensure_ascii=False),
    }  # fmt: skip
    return made


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def count(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}" if value is not None and _known(value) else NOTHING


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point."""
    return f"{value:,.{digits}f}" if value is not None and _known(value) else NOTHING


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as per cent; never rounded up to all or down to nothing."""
    if share is None or not _known(share):
        return NOTHING
    text = f"{100 * share:.{digits}f}"
    least = 10.0**-digits
    if share < 1 and float(text) == 100:
        return f"> {100 - least:.{digits}f} %"
    if share > 0 and float(text) == 0:
        return f"< {least:.{digits}f} %"
    return f"{text} %"


def magnitude(value: float | None) -> str:
    """A number of parameters in words: 9.8 million."""
    if value is None or not _known(value):
        return NOTHING
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return count(value)


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes or seconds, whichever a reader would say."""
    if seconds is None or not _known(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def hub_source(training: Json) -> tuple[str, str]:
    """Id and revision of a target that came from the Hugging Face Hub; both empty for another.

    Args:
        training: as `write_report` takes it; in `target`, the import may have left the Hub's `revision`.
    """
    target = training["target"]
    commit = str(target.get("revision") or "")
    given = str(training["parameters"].get("huggingface_id") or (target["source"] if commit else ""))
    name, _, revision = given.partition("@")
    return name, commit or revision


def target_name(training: Json) -> str:
    """What to call the target: its Hub id, or the last part of its path."""
    source = str(training["target"]["source"])
    return hub_source(training)[0] or source.rstrip("/").rpartition("/")[2] or source


@dataclass(frozen=True)
class Passes:
    """One way of decoding, on the first screen.

    Attributes:
        label: which.
        colour: CSS variable of its bar.
        length: tokens per target pass.
        share: target passes per token.
    """

    label: str
    colour: str
    length: float
    share: float


def _passes(evaluation: Json) -> list[Passes]:
    lengths = [
        ("trained draft", "trained", evaluation["trained"]["acceptance_length"]),
        ("untrained draft", "untrained", evaluation["untrained"]["acceptance_length"]),
        ("no draft", "untrained", 1.0),
    ]
    return [Passes(label, colour, length, 1 / length) for label, colour, length in lengths]


def _simulated(training: Json) -> tuple[str, float] | None:
    """The best there is without decoding: where from, and the acceptance length in tokens per target pass."""
    for source, entries in (("validation", training["validation"]), ("training", training["log"])):
        if entries and _known(entries[-1]["acceptance_length"]):
            return source, entries[-1]["acceptance_length"]
    return None


@dataclass(frozen=True)
class Finding:
    """Something the reader should check.

    Attributes:
        title: what was found.
        advice: what it means and what to do.
    """

    title: str
    advice: str


def findings(training: Json, evaluation: Json | None, dataset: Json) -> list[Finding]:
    """What in a run should make one suspicious, the gravest first.

    Args:
        training: as `write_report` takes it.
        evaluation: the same.
        dataset: the same.
    """
    found = list(_result_findings(evaluation)) if evaluation else []
    return [*found, *_training_findings(training, evaluation), *_data_findings(dataset)]


def _result_findings(evaluation: Json) -> Iterable[Finding]:
    trained, untrained = (evaluation[key]["acceptance_length"] for key in ("trained", "untrained"))
    if not evaluation["lossless"]["identical"]:
        yield Finding(
            "Replies with the draft differ from the target's own",
            "Speculative decoding must not change them: do not serve this draft before that is understood.",
        )
    if trained <= untrained:
        yield Finding(
            f"Training did not help: {decimal(trained)} tokens per target pass, {decimal(untrained)} before",
            "Look at the loss below. Usual reasons are too few steps, and a learning_rate or chat_template "
            "that does not fit.",
        )
    predicted = evaluation["predicted_acceptance_length"]
    if _known(predicted) and abs(predicted - trained) > MAX_PREDICTION_ERROR:
        yield Finding(
            f"Validation predicts an acceptance length of {decimal(predicted)}, measured: {decimal(trained)}",
            "Validation follows the given replies, decoding the target's own. Where these differ much, train "
            "on replies that the target wrote.",
        )


def _training_findings(training: Json, evaluation: Json | None) -> Iterable[Finding]:
    bad = sum(not all(map(_known, entry["loss"])) for entry in training["log"])
    if bad:
        yield Finding(
            f"The loss was not a finite number in {count(bad)} of {count(len(training['log']))} log lines",
            "Training diverged. Lower learning_rate or max_grad_norm, or set compute_dtype to float32.",
        )
    drafted, unrolled = (training["parameters"].get(key) for key in ("num_speculative_tokens", "ttt_length"))
    if drafted and unrolled and drafted > unrolled:
        yield Finding(
            f"{drafted} tokens are drafted at a time, but training went through {unrolled}",
            "Acceptance falls where it was not trained. Raise ttt_length or lower num_speculative_tokens.",
        )
    if not training["validation"]:
        yield Finding(
            "No validation data",
            "Nothing here says how the draft does on conversations it was not trained on. Give "
            "dataset_validation_split.",
        )
    elif not evaluation:
        yield Finding("The draft was not decoded with", "Acceptance lengths below are simulated, not measured.")


def _data_findings(dataset: Json) -> Iterable[Finding]:
    for split, counts in dataset["splits"].items():
        name = "training" if split == "train" else split
        if counts["coverage"] < MIN_COVERAGE:
            yield Finding(
                f"The draft vocabulary has {percent(counts['coverage'])} of the {name} replies' tokens",
                "A token outside it ends a draft. Raise draft_vocab_size in draft_model_config; the coverage "
                "of other sizes is below.",
            )
        if counts["rows_truncated"] > MAX_TRUNCATED * counts["rows_kept"]:
            yield Finding(
                f"{percent(counts['rows_truncated'] / counts['rows_kept'])} of the {name} conversations were "
                f"cut at {count(dataset['max_length'])} tokens",
                "The draft never sees their ends. Raise max_length, if memory allows.",
            )
        if counts["rows_rejected"]:
            yield Finding(
                f"{count(counts['rows_rejected'])} of {count(counts['rows_in'])} {name} lines were rejected",
                "The reasons are below, the lines in rejected.jsonl of the data set.",
            )


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a text that is marked in places.

    Attributes:
        pieces: text, and whether it is marked.
        cut: whether there is more than is shown.
    """

    pieces: list[tuple[str, bool]]
    cut: bool


def _excerpt(pairs: Sequence[Sequence[Any]]) -> Excerpt:
    """As much as a reader will look at: a long text must not make a long file."""
    pieces: list[tuple[str, bool]] = []
    left = _MAX_SHOWN_CHARACTERS
    for text, mark in pairs:
        if left < len(text):
            return Excerpt(pieces, cut=True)
        pieces.append((text, bool(mark)))
        left -= len(text)
    return Excerpt(pieces, cut=False)


def _joined(excerpt: Excerpt) -> Excerpt:
    """Neighbours of the same mark as one piece."""
    groups = groupby(excerpt.pieces, key=lambda piece: piece[1])
    return Excerpt([("".join(text for text, _ in group), mark) for mark, group in groups], excerpt.cut)


def _parameter_rows(values: Json) -> list[dict[str, Any]]:
    """All parameters in the contract's order, with what this run had."""
    rows = []
    for parameter in PARAMETERS:
        value = values.get(parameter.name)
        if value is None:
            text = "not recorded"
        elif value == "" or (parameter.name == "total_steps" and value == 0):
            text = "not given"
        else:
            text = f"{value} {parameter.unit.removesuffix('s') if value == 1 else parameter.unit}".strip()
        changed = value is not None and value != parameter.default
        rows.append({"parameter": parameter, "text": text, "changed": changed})
    return rows
