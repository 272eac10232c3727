"""evaluation.json: all that is measured of one trained draft."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from draft_model import drafts
from draft_model.drafts.base import Draft
from draft_model.engine import Measured
from draft_model.evaluation.measure import Candidate, Case, category_table, differences, measure, open_case, speed_table
from draft_model.parameters import Parameters
from draft_model.target.model import load_target

logger = logging.getLogger(__name__)


def evaluate(
    p: Parameters, model: Path, dataset: Path, final: Path, training: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """Decodes the prompts with the trained draft, with an untrained one and with the target alone.

    Args:
        p: of the run.
        model: folder of the target.
        dataset: folder of the data set.
        final: folder of the trained draft.
        training: its training.json.
        work: scratch folder.

    Returns:
        What evaluation.json holds; docs/evaluation.md describes it.
    """
    started = time.monotonic()
    draft = drafts.family_of(training["draft"]).load(final)
    case = open_case(p, model, dataset, "", draft.config.max_position_embeddings, work)
    candidates = [Candidate("the trained draft", draft, final), *_untrained(case, draft)]
    alone, trained, *untrained = measure(case, candidates)
    compared = [differences(alone, found) for found in (trained, *untrained)]
    records = [asdict(difference) for _, found in compared for difference in found]
    foreseen = (training["validation"] or [{}])[-1].get("acceptance_length_by_proposals") or []
    tokens = case.prompts.tokens
    written = sum(len(reply) for group in trained.outputs for reply in group)
    return {
        "engine": alone.engine,
        "hardware": alone.hardware,
        "dtype": alone.dtype,
        "num_speculative_tokens": p.num_speculative_tokens,
        "prompts": len(tokens),
        "prompts_source": case.prompts.source,
        "max_new_tokens": p.evaluation_max_new_tokens,
        "trained": trained.total.report() | {"tokens": written},
        "untrained": untrained[0].total.report() if untrained else None,
        "by_category": category_table(case, trained),
        "sampled": trained.sampled.report() | {"temperature": p.evaluation_temperature} if trained.sampled else None,
        # What the last validation of the training simulated for as many proposals.
        "predicted_acceptance_length": [*foreseen, *[None] * 16][p.num_speculative_tokens - 1],
        "speed": speed_table(alone, trained),
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


def _untrained(case: Case, trained: Draft) -> list[Candidate]:
    """The same draft before its first step; none where the target, from which it starts, is too large to load here."""
    import psutil

    size = sum(path.stat().st_size for path in case.model.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if 1.2 * size > free:
        logger.warning(
            "the untrained draft is not measured: it starts from the target's weights, %.0f GB, and %.0f GB of memory "
            "are free", size / 1e9, free / 1e9,
        )  # fmt: skip
        return []
    target = load_target(case.model, trained.config.aux_layers, torch.bfloat16, torch.device("cpu"))
    draft = copy.deepcopy(trained)
    draft.initialise(case.parameters.seed, target)
    drafts.family(draft.config.family).save(case.work / "untrained", draft)
    return [Candidate("the untrained draft", draft, case.work / "untrained")]


def _sample(case: Case, trained: Measured) -> dict[str, Any]:
    """The reply of median length, token by token, and whether the draft proposed it where that is known."""
    replies = [reply for group in trained.outputs for reply in group]
    middle = sorted(range(len(replies)), key=lambda index: len(replies[index]))[len(replies) // 2]
    drafted = [own for group in trained.drafted for own in group][middle] if trained.drafted else [None] * 10**6
    return {
        "prompt": case.tokenizer.decode(case.prompts.tokens[middle]),
        "reply": [[case.tokenizer.decode([token]), its] for token, its in zip(replies[middle], drafted, strict=False)],
    }
