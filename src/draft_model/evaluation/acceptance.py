"""What decoding kept of the proposals, counted as vLLM counts it: by position, by category, by depth into the reply.

Cumulative and conditional acceptance are two numbers and named apart. Cumulative, at position k: the share of all
rounds that kept the k-th proposal, and so all before it. Conditional: the share of the rounds that kept the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from draft_model.evaluation.speculative import Reply

DEPTHS = (0, 16, 32, 64, 128, 256, 512, 1024)
"""Tokens of the reply before a round: where its bins begin."""


def acceptance(replies: Sequence[Reply], proposals: int) -> dict[str, Any]:
    """Acceptance over all rounds of all replies.

    Args:
        replies: decoded with a draft.
        proposals: K, the longest path that could be kept.

    Returns:
        acceptance_length (1 + accepted / rounds: tokens per forward pass of the target), rounds, drafted (rounds x K),
        accepted, tokens, acceptance_by_position (cumulative) and
        conditional_acceptance_by_position, [K] each; conditional is None where no round got that far.
    """
    accepted = [count for reply in replies for count in reply.accepted]
    rounds = max(1, len(accepted))
    reached = [sum(count >= place for count in accepted) for place in range(proposals + 1)]
    return {
        "acceptance_length": 1.0 + sum(accepted) / rounds,
        "rounds": len(accepted),
        "drafted": len(accepted) * proposals,
        "accepted": sum(accepted),
        "tokens": sum(len(reply.tokens) for reply in replies),
        "acceptance_by_position": [count / rounds for count in reached[1:]],
        "conditional_acceptance_by_position": [now / before if before else None for before, now in pairwise(reached)],
    }


def by_category(replies: Sequence[Reply], categories: Sequence[str]) -> list[dict[str, Any]]:
    """Acceptance length of each category of prompts, in their order of appearance.

    Args:
        replies: decoded with a draft.
        categories: of their prompts.

    Returns:
        Records of category, prompts, rounds and acceptance_length.
    """
    records = []
    for category in dict.fromkeys(categories):
        own = [reply for reply, its in zip(replies, categories, strict=True) if its == category]
        counts = [count for reply in own for count in reply.accepted]
        records.append({"category": category, "prompts": len(own), **_length(counts)})
    return records


def by_depth(replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """Acceptance length by the number of tokens that the reply had before the round.

    Args:
        replies: decoded with a draft.

    Returns:
        Records of from and to (tokens, both inclusive; to is None in the last bin), rounds and acceptance_length.
    """
    found: dict[int, list[int]] = {}
    for reply in replies:
        depth = 1  # the prompt's own pass gave the first token
        for count in reply.accepted:
            found.setdefault(sum(depth >= start for start in DEPTHS) - 1, []).append(count)
            depth += count + 1
    ends = [*(start - 1 for start in DEPTHS[1:]), None]
    return [{"from": DEPTHS[place], "to": ends[place], **_length(found[place])} for place in sorted(found)]


def _length(counts: Sequence[int]) -> dict[str, Any]:
    return {"rounds": len(counts), "acceptance_length": 1.0 + sum(counts) / len(counts) if counts else None}
