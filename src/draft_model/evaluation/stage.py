"""`run`: decode validation prompts with the trained draft, with an untrained one and without, and write the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS, Parameters
from draft_model.tracking import Tracker, track

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation.

    Attributes:
        model: URI of the imported target.
        dataset: URI of the data set.
        final: URI of the trained draft; the report, its data and the model card are added to it.
        work: scratch folder on this machine.
        parameters: of the run.
    """

    model: str
    dataset: str
    final: str
    work: Path
    parameters: Parameters


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation leaves.

    Attributes:
        final: URI of the draft, with report.html, evaluation.json and README.md beside it.
        report: the report on this machine.
        card: the model card on this machine.
        measured: whether there were validation prompts to measure on.
        acceptance_length: tokens per forward pass of the target, with the trained draft; 0 where not measured.
        untrained_acceptance_length: with the same draft before training.
        acceptance_by_position: share of rounds that kept the k-th proposal, [K].
        compared_tokens: tokens that were found equal to the target's own.
    """

    final: str
    report: Path
    card: Path
    measured: bool
    acceptance_length: float
    untrained_acceptance_length: float
    acceptance_by_position: list[float]
    compared_tokens: int


def run(config: EvaluateConfig) -> EvaluateResult:
    """Evaluates a trained draft.

    Args:
        config: what to evaluate.

    Raises:
        DraftModelError: when an input is missing, or a decoded token is not the target's own; the report is
            written all the same.
    """
    with track("evaluate", config.parameters.mlflow_tracking_uri) as tracker:
        tracker.parameters(config.parameters.of_stage("evaluate"))
        result = _run(config, tracker)
        if name := config.parameters.register_model_name:
            tracker.register(name, config.final)
            if not tracker.active:
                logger.warning(
                    "register_model_name: %s is not registered: neither mlflow_tracking_uri nor MLFLOW_TRACKING_URI "
                    "is set",
                    name,
                )
        return result


def _run(config: EvaluateConfig, tracker: Tracker) -> EvaluateResult:
    from draft_model.evaluation.card import write_card
    from draft_model.evaluation.report import contents, write_report

    config.work.mkdir(parents=True, exist_ok=True)
    model = storage.fetch(config.model, config.work / "model")
    dataset = storage.fetch(config.dataset, config.work / "dataset")
    final = storage.fetch(config.final, config.work / "final")
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    training["parameters"] = _all_parameters(config, training["parameters"])
    data = json.loads((dataset / "report.json").read_text(encoding="utf-8"))
    evaluation = None
    if (dataset / "validation").is_dir() or config.parameters.evaluation_prompts:
        from draft_model.evaluation.evaluate import evaluate

        evaluation = evaluate(config.parameters, model, dataset, final, training)
    else:
        logger.info(
            "neither dataset_validation_split nor evaluation_prompts was given: nothing is measured, the report shows "
            "the training alone"
        )
    report, card = config.work / "report.html", config.work / "README.md"
    hashes = _hashes(config)
    write_report(report, training, evaluation, data, hashes)
    write_card(card, training, evaluation, data, name=_name(training))
    added = {"report.html": report, "README.md": card}
    written = {"report.json": contents(training, evaluation, data, hashes)}
    if evaluation is not None:
        written["evaluation.json"] = evaluation
    for name, values in written.items():
        added[name] = config.work / name
        added[name].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    storage.extend(config.final, added)
    tracker.inputs({it["of"]: (it["uri"], it["sha256"]) for it in hashes})
    tracker.references({"final": config.final, **{name: storage.join(config.final, name) for name in added}})
    if evaluation is None:
        return EvaluateResult(config.final, report, card, False, 0.0, 0.0, [], 0)
    tracker.metrics(training["draft_step"], _tracked_metrics(evaluation))
    _refuse_differences(evaluation["lossless"])
    return EvaluateResult(
        final=config.final,
        report=report,
        card=card,
        measured=True,
        acceptance_length=evaluation["trained"]["acceptance_length"],
        untrained_acceptance_length=evaluation["untrained"]["acceptance_length"],
        acceptance_by_position=evaluation["trained"]["acceptance_by_position"],
        compared_tokens=evaluation["lossless"]["compared_tokens"],
    )


def _hashes(config: EvaluateConfig) -> list[dict[str, str]]:
    """What went in and came out, by the SHA-256 that the stages recorded."""
    target = storage.read_manifest(config.model, stage="import").properties
    dataset = storage.read_manifest(config.dataset, stage="dataset").properties
    draft = {file.path: file.sha256 for file in storage.read_manifest(config.final).files}
    return [
        {"of": "target", "uri": config.model, "sha256": target.get("digest", "")},
        {"of": "dataset", "uri": config.dataset, "sha256": dataset.get("fingerprint", "")},
        {"of": "draft", "uri": config.final, "sha256": draft["model.safetensors"]},
    ]


def _tracked_metrics(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    found = {f"{draft}_acceptance_length": evaluation[draft]["acceptance_length"] for draft in ("trained", "untrained")}
    return {
        **found,
        "acceptance_by_position": evaluation["trained"]["acceptance_by_position"],
        "conditional_acceptance_by_position": evaluation["trained"]["conditional_acceptance_by_position"],
        "wall_clock_speed_up": evaluation["wall_clock"]["speed_up"],
        "recommended_proposals": evaluation["prediction"]["recommended"],
        "lossless": float(evaluation["lossless"]["identical"]),
    }


def _name(training: Mapping[str, Any]) -> str:
    """What the model card calls the draft: its target's last name, without a revision."""
    source: str = training["target"]["source"]
    return f"{source.rstrip('/').rsplit('/', 1)[-1].partition('@')[0]}-eagle3"


def _all_parameters(config: EvaluateConfig, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The run's parameters, from the stages that read them, in the contract's order."""
    known: dict[str, Any] = {}
    for uri, stage in ((config.model, "import"), (config.dataset, "dataset")):
        known.update(storage.read_manifest(uri, stage=stage).properties.get("parameters", {}))
    known = {**known, **trained, **config.parameters.of_stage("evaluate")}
    return {parameter.name: known[parameter.name] for parameter in PARAMETERS if parameter.name in known}


def _refuse_differences(lossless: Mapping[str, Any]) -> None:
    if lossless["identical"]:
        return
    first = lossless["differences"][0]
    raise DraftModelError(
        f"evaluation: speculative decoding changed the output of {len(lossless['differences'])} replies (first: prompt "
        f"{first['prompt']}, token {first['position']}, margin of the target's two best logits {first['margin']:.2g}); "
        "the draft must not be served before that is understood: see report.html and evaluation.json beside it"
    )
