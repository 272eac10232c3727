"""Two drafts of one target side by side on the same prompts, whichever trainer they come from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.drafts.base import check_proposals
from draft_model.engine import compare_replies
from draft_model.errors import DraftModelError
from draft_model.evaluation.measure import Candidate, category_table, measure, open_case
from draft_model.model_import.sources import resolve
from draft_model.model_import.stage import prepare
from draft_model.parameters import Parameters
from draft_model.training.checkpoint import load_draft, read_checkpoint
from draft_model.training.plan import read_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareConfig:
    """One comparison."""

    model: str  # URI of the target, imported or a Transformers folder
    dataset: str  # URI of the data set whose validation split gives the prompts; empty where evaluation_prompts does
    drafts: tuple[str, ...]  # URIs of drafts of that target
    work: Path  # scratch folder
    parameters: Parameters  # of the evaluation; chat_template counts where there is no data set


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Decodes the same prompts with each draft.

    Returns a record per draft: draft, acceptance as in evaluation.json, by_category, speed, identical (to the target's
    own tokens) and hardware. Raises where there are no prompts, or a draft is not of the target or of other maths.
    """
    p = config.parameters
    if not config.dataset and not p.evaluation_prompts:
        raise DraftModelError("--dataset, --evaluation_prompts: neither is given; one must say what to decode")
    model = _target(config.model, config.work)
    dataset = storage.fetch(config.dataset, config.work / "dataset") if config.dataset else None
    candidates = [
        _candidate(uri, model, config.work / f"draft_{n}", p.num_speculative_tokens)
        for n, uri in enumerate(config.drafts)
    ]
    longest = min(candidate.draft.config.max_position_embeddings for candidate in candidates)
    case = open_case(p, model, dataset, p.chat_template, longest, config.work)
    results = measure(case, candidates)
    alone = results.alone
    return [
        {
            "draft": uri,
            **measured.total.report(),
            "by_category": category_table(case, measured),
            "speed": speed,
            "identical": all(difference.tie for difference in compare_replies(alone, measured)[1]),
            "hardware": f"{alone.hardware}, {alone.engine}, {alone.dtype}",
        }
        for uri, measured, speed in zip(config.drafts, results.drafts, results.speed, strict=True)
        if measured is not None
    ]


def table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The comparison as rows, the head first."""
    rows = [["", *(record["draft"] for record in records)]]
    rows.append(["acceptance length", *(f"{record['acceptance_length']:.3f}" for record in records)])
    for name, key in (("cumulative", "acceptance_by_position"), ("conditional", "conditional_acceptance_by_position")):
        for index in range(len(records[0][key])):
            values = (record[key][index] for record in records)
            rows.append([f"{name} acceptance at {index + 1}", *("-" if x is None else f"{x:.1%}" for x in values)])
    for index, category in enumerate(records[0]["by_category"]):
        lengths = (record["by_category"][index]["acceptance_length"] for record in records)
        rows.append([f"length, {category['category']}", *(f"{length:.3f}" for length in lengths)])
    for index, speed in enumerate(records[0]["speed"]):
        values = (record["speed"][index] for record in records)
        name = f"tokens per second, batch size {speed['batch_size']}"
        rows.append([name, *(f"{row['tokens_per_second']:.1f} ({row['speed_up']:.2f} x)" for row in values)])
    return [*rows, ["the target's own tokens", *("yes" if record["identical"] else "NO" for record in records)]]


def _target(uri: str, work: Path) -> Path:
    """A target's folder; of one that was not imported, what an import would make of it."""
    if storage.exists(storage.join(uri, storage.MANIFEST)):
        return storage.fetch(uri, work / "model")
    try:
        return prepare(resolve(Parameters(pytorch_model_path=uri), work), work, "")[0]
    except DraftModelError as error:
        problems = [problem.removeprefix("pytorch_model_path: ") for problem in error.problems]
        raise DraftModelError([f"--model: given {uri!r}: {problem}" for problem in problems]) from error


def _candidate(uri: str, model: Path, work: Path, proposals: int) -> Candidate:
    """A draft of any known format, in the shape that its configuration and the target's give it."""
    loaded = read_checkpoint(uri, work)
    draft = load_draft(loaded, read_config(str(model)))
    if note := check_proposals(draft.config, proposals):
        logger.warning("%s: %s", uri, note)
    return Candidate(uri, draft, loaded.folder, (proposals,))
