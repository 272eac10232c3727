"""`run`: decode validation prompts with the trained draft, with an untrained one and without, and write the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.drafts import family_of
from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS, Parameters
from draft_model.tracking import Tracker, track

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation."""

    model: str  # URI of the imported target
    dataset: str  # URI of the data set
    final: str  # URI of the trained draft; the report, its data and the model card are added to it
    work: Path  # scratch folder on this machine
    parameters: Parameters


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation leaves."""

    final: str  # URI of the draft, with report.html, evaluation.json and README.md beside it
    report: Path  # on this machine
    card: Path  # on this machine
    measured: bool = False  # whether there were prompts to measure on
    acceptance_length: float = 0.0  # tokens per forward pass of the target, with the trained draft
    untrained_acceptance_length: float = 0.0  # with the same draft before training
    acceptance_by_position: Sequence[float] = ()  # share of rounds that kept the k-th proposal, [K]
    compared_tokens: int = 0  # tokens that were found equal to the target's own


def run(config: EvaluateConfig) -> EvaluateResult:
    """Evaluates a trained draft.

    Raises DraftModelError where an input is missing, nothing could be measured, or a decoded token is not the target's
    own. In the last two cases report and card are written all the same and say so.
    """
    from draft_model.evaluation.measure import check_engine

    p = config.parameters
    check_engine(p)
    with track("evaluate", p.mlflow_tracking_uri) as tracker:
        tracker.parameters(p.of_stage("evaluate"))
        result = _run(config, tracker)
        if p.register_model_name:
            tracker.register(p.register_model_name, config.final)
            if not tracker.active:
                logger.warning(
                    "register_model_name: %s is not registered: neither mlflow_tracking_uri nor MLFLOW_TRACKING_URI "
                    "is set",
                    p.register_model_name,
                )
        return result


def _run(config: EvaluateConfig, tracker: Tracker) -> EvaluateResult:
    from draft_model.evaluation.card import target_name, write_card
    from draft_model.evaluation.evaluate import evaluate
    from draft_model.evaluation.report import write_report

    config.work.mkdir(parents=True, exist_ok=True)
    model = storage.fetch(config.model, config.work / "model")
    dataset = storage.fetch(config.dataset, config.work / "dataset")
    final = storage.fetch(config.final, config.work / "final")
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    training["parameters"] = _all_parameters(config, training["parameters"])
    data = json.loads((dataset / "report.json").read_text(encoding="utf-8"))
    evaluation, failure = None, None
    not_measured = "neither dataset_validation_split nor evaluation_prompts was given"
    if (dataset / "validation").is_dir() or config.parameters.evaluation_prompts:
        try:
            evaluation = evaluate(config.parameters, model, dataset, final, training, config.work)
        except DraftModelError as error:
            not_measured, failure = str(error), error
    if evaluation is None:
        logger.warning("not measured, the report shows the training alone: %s", not_measured)
    hashes = _hashes(config)
    added = {name: config.work / name for name in ("report.html", "report.json", "README.md")}
    content = {
        "training": {name: value for name, value in training.items() if name != "dataset"},
        "dataset": data,
        "evaluation": evaluation,
        "not_measured": "" if evaluation else not_measured,
        "hashes": hashes,
    }
    write_report(added["report.html"], content)
    name = f"{target_name(training).rpartition('/')[2]}-{family_of(training['draft']).name}"
    write_card(added["README.md"], training, evaluation, data, name=name)
    added["report.json"].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if evaluation is not None or (final / "evaluation.json").exists():  # an earlier measurement is replaced by null
        added["evaluation.json"] = config.work / "evaluation.json"
        added["evaluation.json"].write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    storage.extend(config.final, added)
    tracker.inputs({it["of"]: (it["uri"], it["sha256"]) for it in hashes})
    tracker.references({"final": config.final, **{name: storage.join(config.final, name) for name in added}})
    if failure is not None:
        whole = f"evaluation: nothing was measured; the draft in {config.final} is whole and can be served"
        raise DraftModelError([*failure.problems, whole]) from failure
    if evaluation is None:
        return EvaluateResult(config.final, added["report.html"], added["README.md"])
    tracker.metrics(training["draft_step"], _tracked_metrics(evaluation))
    if different := evaluation["lossless"]["differences"]:
        first = different[0]
        margin = (
            "one reply goes on" if first["margin"] is None else f"margin of the two best tokens {first['margin']:.2g}"
        )
        raise DraftModelError(
            f"evaluation: speculative decoding changed the output of {len(different)} replies (first: prompt "
            f"{first['prompt']}, token {first['position']}, {margin}); the draft must not be served before that is "
            "understood: see report.html and evaluation.json beside it"
        )
    if not (agreement := evaluation["agreement"])["agrees"]:
        raise DraftModelError(
            f"evaluation: {evaluation['engine']} measures an acceptance length of {agreement['measured']:.2f}, the "
            f"training's own simulation on the same replies gives {agreement['simulated']:.2f} (allowed: "
            f"{agreement['bound']:.2f} apart): the engine computes another draft than was trained. Likely causes: "
            "feature layers counted otherwise, rotary settings, order of the norms, chat template; compare config.json "
            f"of {config.final} with what the engine's log says of the draft"
        )
    return EvaluateResult(
        config.final,
        added["report.html"],
        added["README.md"],
        measured=True,
        acceptance_length=evaluation["trained"]["acceptance_length"],
        untrained_acceptance_length=(evaluation["untrained"] or {}).get("acceptance_length", 0.0),
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
    measured = {name: evaluation[name] for name in ("trained", "untrained", "sampled") if evaluation[name]}
    trained = evaluation["trained"]
    return {
        **{f"{name}_acceptance_length": values["acceptance_length"] for name, values in measured.items()},
        "acceptance_by_position": trained["acceptance_by_position"],
        "conditional_acceptance_by_position": trained["conditional_acceptance_by_position"],
        **{f"speed_up_at_batch_size_{row['batch_size']}": row["speed_up"] for row in evaluation["speed"]},
        "lossless": float(evaluation["lossless"]["identical"]),
    }


def _all_parameters(config: EvaluateConfig, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The run's parameters, from the stages that read them, in the contract's order."""
    known: dict[str, Any] = {}
    for uri, stage in ((config.model, "import"), (config.dataset, "dataset")):
        known.update(storage.read_manifest(uri, stage=stage).properties.get("parameters", {}))
    # Of regenerated conversations, the ones that were given, and how they were regenerated.
    folder, _, split = known.get("dataset_train_split", "").rstrip("/").rpartition("/")
    with suppress(DraftModelError):  # they are the user's own
        given = storage.read_manifest(folder, stage="regenerate").properties["parameters"] if split == "train" else {}
        known.update({n: value for n, value in given.items() if n.startswith(("dataset_", "regenerate_"))})
    known = {**known, **trained, **config.parameters.of_stage("evaluate")}
    return {parameter.name: known[parameter.name] for parameter in PARAMETERS if parameter.name in known}
