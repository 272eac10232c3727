"""evaluation.json: all that is measured of one trained draft."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from draft_model import drafts
from draft_model.drafts.base import Draft, check_proposals
from draft_model.drafts.batch import collate
from draft_model.engine import Measured
from draft_model.evaluation.measure import (
    Candidate,
    Case,
    category_table,
    differences,
    measure,
    open_case,
    recommend,
    timed_proposals,
)
from draft_model.parameters import Parameters
from draft_model.target.model import load_target

logger = logging.getLogger(__name__)

MIN_ROUNDS, MIN_ROUNDS_PER_REPLY = 400, 20
"""With fewer, chance and the rounds in which replies end could set simulated and measured acceptance apart."""


def evaluate(
    p: Parameters, model: Path, dataset: Path, final: Path, training: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """Decodes the prompts with the trained draft, with an untrained one and with the target alone.

    Takes local folders and the draft's training.json; returns what evaluation.json holds (docs/evaluation.md).
    """
    started = time.monotonic()
    draft = drafts.family_of(training["draft"]).load(final)
    if note := check_proposals(draft.config, p.num_speculative_tokens):
        logger.warning(note)
    case = open_case(p, model, dataset, "", draft.config.max_position_embeddings, work)
    timed = timed_proposals(p, draft.config.proposals)
    candidates = [Candidate("the trained draft", draft, final, timed), *_untrained(case, draft)]
    results = measure(case, candidates)
    alone, (trained, *others) = results.alone, results.drafts
    assert trained is not None
    untrained = others[0] if others else None
    compared = [differences(alone, found) for found in (trained, untrained) if found is not None]
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
        "by_category": category_table(case, trained),
        "sampled": trained.sampled.report() | {"temperature": p.evaluation_temperature} if trained.sampled else None,
        # What the last validation of the training simulated for as many proposals, on the replies of the data.
        "predicted_acceptance_length": [*foreseen, *[None] * 16][p.num_speculative_tokens - 1],
        "agreement": _agreement(case, draft, alone.dtype, trained),
        "speed": [row for row in speed if row["num_speculative_tokens"] == p.num_speculative_tokens],
        "speed_by_proposals": speed,
        "recommended_num_speculative_tokens": recommend(speed),
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
    drafts.family(draft.config.family).save(case.work / "untrained", draft)
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
