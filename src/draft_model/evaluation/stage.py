"""`run`: decode validation prompts with the trained draft, with an untrained one and without, and write the report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS, Parameters

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
        measured: whether there were validation prompts to measure on.
        acceptance_length: tokens per forward pass of the target, with the trained draft; 0 where not measured.
        untrained_acceptance_length: with the same draft before training.
        acceptance_by_position: share of rounds that kept the k-th proposal, [K].
        compared_tokens: tokens that were found equal to the target's own.
    """

    final: str
    report: Path
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
    from draft_model.evaluation.card import write_card
    from draft_model.evaluation.report import write_report

    config.work.mkdir(parents=True, exist_ok=True)
    model = storage.fetch(config.model, config.work / "model")
    dataset = storage.fetch(config.dataset, config.work / "dataset")
    final = storage.fetch(config.final, config.work / "final")
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    training["parameters"] = _all_parameters(config, training["parameters"])
    data = json.loads((dataset / "report.json").read_text(encoding="utf-8"))
    evaluation = None
    if (dataset / "validation").is_dir():
        evaluation = _evaluate(config, model, dataset, final, training)
    else:
        logger.info("dataset_validation_split was not given: nothing is measured, the report shows the training alone")
    report = config.work / "report.html"
    write_report(report, training, evaluation, data)
    write_card(config.work / "README.md", training, evaluation, data, name=_name(training))
    added = {"report.html": report, "README.md": config.work / "README.md"}
    if evaluation is not None:
        added["evaluation.json"] = config.work / "evaluation.json"
        added["evaluation.json"].write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    storage.extend(config.final, added)
    if evaluation is None:
        return EvaluateResult(config.final, report, False, 0.0, 0.0, [], 0)
    _refuse_differences(evaluation["lossless"])
    return EvaluateResult(
        final=config.final,
        report=report,
        measured=True,
        acceptance_length=evaluation["trained"]["acceptance_length"],
        untrained_acceptance_length=evaluation["untrained"]["acceptance_length"],
        acceptance_by_position=evaluation["trained"]["acceptance_by_position"],
        compared_tokens=evaluation["lossless"]["compared_tokens"],
    )


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


def _evaluate(
    config: EvaluateConfig, model: Path, dataset: Path, final: Path, training: Mapping[str, Any]
) -> dict[str, Any]:
    import torch

    from draft_model.dataset.tokens import Split
    from draft_model.eagle3.export import load_draft
    from draft_model.eagle3.model import Eagle3Draft
    from draft_model.eagle3.target import load_target
    from draft_model.evaluation import measure
    from draft_model.evaluation.speculative import SpeculativeDecoder

    p, started = config.parameters, time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_draft(final).to(device)
    target = load_target(model, trained.config.aux_layers, torch.float32, device)
    end_tokens = _end_tokens(target.model)
    longest = trained.config.max_position_embeddings - p.evaluation_max_new_tokens - p.num_speculative_tokens - 1
    prompts = measure.choose_prompts(Split(dataset / "validation"), p.evaluation_conversations, longest)
    if not prompts:
        raise DraftModelError(
            f"dataset_validation_split: none of its conversations has a prompt of 2 to {longest} tokens to decode from"
        )
    untrained = Eagle3Draft(trained.config, trained.t2d, trained.d2t).to(device)
    untrained.initialise(p.seed, target)
    expected = measure.reference(target, prompts, p.evaluation_max_new_tokens, end_tokens)
    replies, compared = {}, measure.Comparison(0, [], [])
    for what, draft in (("trained", trained), ("untrained", untrained)):
        decoder = SpeculativeDecoder(target, draft, p.num_speculative_tokens, end_tokens)
        replies[what] = measure.decode(decoder, prompts, p.evaluation_max_new_tokens, f"with {what} draft")
        compared = compared + measure.compare(target, prompts, replies[what], expected)
    validation = training["validation"]
    return {
        "num_speculative_tokens": p.num_speculative_tokens,
        "prompts": len(prompts),
        "max_new_tokens": p.evaluation_max_new_tokens,
        "dtype": "float32",
        "seconds": time.monotonic() - started,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else training["hardware"],
        **{what: measure.acceptance(found, p.num_speculative_tokens) for what, found in replies.items()},
        "predicted_acceptance_length": validation[-1]["acceptance_length"] if validation else None,
        "lossless": {
            "prompts": len(prompts),
            "compared_tokens": compared.compared_tokens,
            "identical": not compared.differences,
            "ties": compared.ties,
            "differences": compared.differences,
        },
        "sample": _sample(model, prompts, replies["trained"]),
        "prompt_tokens": prompts,
    }


def _end_tokens(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else list(found or [])


def _sample(model: Path, prompts: Sequence[Sequence[int]], replies: Sequence[Any]) -> dict[str, Any]:
    """The reply of median length, token by token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    middle = sorted(range(len(replies)), key=lambda index: len(replies[index].tokens))[len(replies) // 2]
    reply = replies[middle]
    texts = [tokenizer.decode([token]) for token in reply.tokens]
    return {
        "prompt": tokenizer.decode(prompts[middle]),
        "reply": [list(pair) for pair in zip(texts, reply.drafted, strict=True)],
    }


def _refuse_differences(lossless: Mapping[str, Any]) -> None:
    if lossless["identical"]:
        return
    first = lossless["differences"][0]
    raise DraftModelError(
        f"evaluation: speculative decoding changed the output of {len(lossless['differences'])} replies (first: prompt "
        f"{first['prompt']}, token {first['position']}, margin of the target's two best logits {first['margin']:.2g}); "
        "the draft must not be served before that is understood: see report.html and evaluation.json beside it"
    )
