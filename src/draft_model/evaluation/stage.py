"""Decodes validation prompts with the trained draft, with an untrained one and without, and writes the report."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from draft_model import drafts, storage
from draft_model.drafts.base import Draft, check_proposals
from draft_model.drafts.batch import collate
from draft_model.drafts.files import save_draft
from draft_model.engine import Measured, compare_replies
from draft_model.errors import DraftModelError
from draft_model.evaluation import EvaluateConfig, EvaluateResult, measure
from draft_model.evaluation.card import target_name, write_card
from draft_model.evaluation.measure import Candidate, Case
from draft_model.evaluation.report import write_report
from draft_model.parameters import PARAMETERS, Parameters
from draft_model.target.model import load_target
from draft_model.tracking import Tracker, track
from draft_model.training.checkpoint import RECORD, Loaded, load_draft, read_checkpoint
from draft_model.training.plan import read_config

logger = logging.getLogger(__name__)

MIN_ROUNDS, MIN_ROUNDS_PER_REPLY = 400, 20
"""With fewer, chance and the rounds in which replies end could set simulated and measured acceptance apart."""


def run(config: EvaluateConfig) -> EvaluateResult:
    """Evaluates a trained draft.

    Raises DraftModelError where an input is missing, nothing could be measured, or a decoded token is not the target's
    own. In the last two cases report and card are written all the same and say so.
    """
    p = config.parameters
    measure.check_engine(p)
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
    config.work.mkdir(parents=True, exist_ok=True)
    model = storage.fetch(config.model, config.work / "model")
    dataset = storage.fetch(config.dataset, config.work / "dataset")
    loaded = read_checkpoint(config.final, config.work / "final")
    training = json.loads((loaded.folder / RECORD).read_text(encoding="utf-8"))
    training["parameters"] = _all_parameters(config, training["parameters"])
    data = json.loads((dataset / "report.json").read_text(encoding="utf-8"))
    evaluation, failure = None, None
    not_measured = "neither dataset_validation_split nor evaluation_prompts was given"
    if (dataset / "validation").is_dir() or config.parameters.evaluation_prompts:
        try:
            evaluation = _evaluate(config.parameters, model, dataset, loaded, training, config.work)
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
    name = f"{target_name(training).rpartition('/')[2]}-{drafts.family_of(training['draft']).name}"
    write_card(added["README.md"], training, evaluation, data, name=name)
    added["report.json"].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    # An earlier measurement is replaced by null.
    if evaluation is not None or (loaded.folder / "evaluation.json").exists():
        added["evaluation.json"] = config.work / "evaluation.json"
        added["evaluation.json"].write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    storage.extend(config.final, added)
    tracker.inputs({it["of"]: (it["uri"], it["sha256"]) for it in hashes})
    tracker.references({"final": config.final, **{name: storage.join(config.final, name) for name in added}})
    if failure is not None:
        whole = f"evaluation: nothing was measured; the draft in {config.final} is whole and can be served"
        raise DraftModelError([*failure.problems, whole]) from failure
    if evaluation is None:
        return EvaluateResult(config.final)
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
    shares = enumerate(evaluation["trained"]["acceptance_by_position"], start=1)
    metrics = {
        "acceptance_length": evaluation["trained"]["acceptance_length"],
        "compared_tokens": evaluation["lossless"]["compared_tokens"],
        "untrained_acceptance_length": (evaluation["untrained"] or {}).get("acceptance_length", 0.0),
        **{f"acceptance_at_position_{k}": share for k, share in shares},
    }
    return EvaluateResult(config.final, metrics)


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


def _evaluate(
    p: Parameters, model: Path, dataset: Path, loaded: Loaded, training: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """Decodes the prompts with the trained draft, with an untrained one and with the target alone.

    Takes local folders and the draft with its training.json; returns what evaluation.json holds (docs/evaluation.md).
    """
    started = time.monotonic()
    draft = load_draft(loaded, read_config(str(model)))
    if note := check_proposals(draft.config, p.num_speculative_tokens):
        logger.warning(note)
    case = measure.open_case(p, model, dataset, "", draft.config.max_position_embeddings, work)
    timed = measure.timed_proposals(p, draft.config.proposals)
    candidates = [Candidate("the trained draft", draft, loaded.folder, timed), *_untrained(case, draft)]
    results = measure.measure(case, candidates)
    alone, (trained, *others) = results.alone, results.drafts
    assert trained is not None
    untrained = others[0] if others else None
    compared = [compare_replies(alone, found) for found in (trained, untrained) if found is not None]
    records = [asdict(difference) for _, found in compared for difference in found]
    foreseen = (training["validation"] or [{}])[-1].get("acceptance_length_by_proposals") or []
    tokens = case.prompts.tokens
    speed = results.speed[0]
    return {
        "engine": alone.engine,
        "hardware": alone.hardware,
        "dtype": alone.dtype,
        "num_speculative_tokens": p.num_speculative_tokens,
        "prompts": len(tokens),
        "prompts_source": case.prompts.source,
        "max_new_tokens": p.evaluation_max_new_tokens,
        "trained": trained.total.report() | {"tokens": sum(map(len, chain.from_iterable(trained.outputs)))},
        "untrained": untrained.total.report() if untrained else None,
        "by_category": measure.category_table(case, trained),
        "sampled": trained.sampled.report() | {"temperature": p.evaluation_temperature} if trained.sampled else None,
        # What the last validation of the training simulated for as many proposals, on the replies of the data.
        "predicted_acceptance_length": [*foreseen, *[None] * 16][p.num_speculative_tokens - 1],
        "agreement": _agreement(case, draft, alone.dtype, trained),
        "speed": [row for row in speed if row["num_speculative_tokens"] == p.num_speculative_tokens],
        "speed_by_proposals": speed,
        "recommended_num_speculative_tokens": measure.recommend(speed),
        "timing": results.timing,
        "not_measured": results.not_measured,
        "lossless": {
            "prompts": len(tokens),
            "compared_tokens": sum(count for count, _ in compared),
            "identical": all(record["tie"] for record in records),
            "ties": [record for record in records if record["tie"]],
            "differences": [record for record in records if not record["tie"]],
        },
        "sample": _sample(case, trained),
        "prompt_tokens": tokens,
        "seconds": time.monotonic() - started,
    }


def _agreement(case: Case, draft: Any, dtype: str, found: Measured) -> dict[str, Any]:
    """The trainer's simulated acceptance length on the replies that were just decoded, beside the measured one.

    Both walk through the same positions of the same replies, so that only another computation of the draft sets them
    apart, rounding, and the round in which a reply ends: hence enough rounds, and three standard errors.
    """
    counts, replies = found.total, [*chain.from_iterable(found.outputs)]
    measured, simulated = counts.acceptance_length, None
    block = draft.config.proposals
    if block and block != case.parameters.num_speculative_tokens:
        why = f"the trainer's figure is of blocks of {block}"
    elif counts.rounds < MIN_ROUNDS or counts.rounds < MIN_ROUNDS_PER_REPLY * len(replies):
        why = f"only {counts.rounds:,} rounds in {len(replies):,} replies were decoded"
    elif (device := _room(case, 2 if dtype == "float32" else 1)) is None:
        why = "the target does not fit in the memory that one process has here"
    else:
        why, type_ = "", getattr(torch, dtype)
        target = load_target(case.model, draft.config.aux_layers, type_, device)
        longest = max(len(prompt) + len(reply) for prompt, reply in zip(case.prompts.tokens, replies, strict=True))
        objective = drafts.family(draft.config.family).objective(
            draft.to(device), target, case.parameters.num_speculative_tokens, "sdpa", type_, longest, "kl"
        )
        sums = objective.no_counts()
        for prompt, reply in zip(case.prompts.tokens, replies, strict=True):
            mask = torch.arange(len(prompt) + len(reply)) >= len(prompt)
            batch = collate([(torch.tensor([*prompt, *reply]), mask)])
            with torch.no_grad():
                sums = sums + objective(batch, target.states(batch))[1]
        simulated = sums.acceptance_length(case.parameters.num_speculative_tokens)
    apart = abs((simulated or measured) - measured)
    bound = max(0.1, 0.05 * measured, 3 * counts.standard_error)
    return {
        "simulated": simulated, "measured": measured, "rounds": counts.rounds, "bound": bound,
        "agrees": apart <= bound, "not_compared": why,
    }  # fmt: skip


def _room(case: Case, factor: int) -> torch.device | None:
    """Where the target's weights, so many times as large as on disk, can be held by one process."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return torch.device("cuda") if 1.2 * factor * case.target_bytes < free else None
    return torch.device("cpu") if 1.2 * factor * case.target_bytes < psutil.virtual_memory().available else None


def _untrained(case: Case, trained: Draft) -> list[Candidate]:
    """The same draft before its first step; none where the target, from which it starts, is too large to load here."""
    if 1.2 * case.target_bytes > psutil.virtual_memory().available:
        logger.warning("the untrained draft is not measured: it starts from the target's weights, which are too large")
        return []
    target = load_target(case.model, trained.config.aux_layers, torch.bfloat16, torch.device("cpu"))
    draft = copy.deepcopy(trained)
    draft.initialise(case.parameters.seed, target)
    save_draft(case.work / "untrained", draft)
    return [Candidate("the untrained draft", draft, case.work / "untrained", required=False)]


def _sample(case: Case, trained: Measured) -> dict[str, Any]:
    """The reply of median length, token by token, and whether the draft proposed it where that is known."""
    replies = [*chain.from_iterable(trained.outputs)]
    middle = sorted(range(len(replies)), key=lambda index: len(replies[index]))[len(replies) // 2]
    drafted = [*chain.from_iterable(trained.drafted)][middle] if trained.drafted else [None] * 10**6
    return {
        "prompt": case.tokenizer.decode(case.prompts.tokens[middle]),
        "reply": [[case.tokenizer.decode([token]), its] for token, its in zip(replies[middle], drafted, strict=False)],
    }
