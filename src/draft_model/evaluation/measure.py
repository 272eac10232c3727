"""Decodes all prompts, with a draft and without, and holds the replies against the target's own."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from draft_model.evaluation.speculative import Reply, SpeculativeDecoder, greedy_replies, margin_at
from draft_model.target.model import Target

TIE_MARGIN = 1e-4  # logits; float32 sums in another order differ by less
BATCH = 16  # prompts decoded at once; a CPU does 16 rows in about the time of one


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of prompts of like length, `size` at a time."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def batch_size(target: Target) -> int:
    """Prompts at once: one for targets with sliding-window layers, whose caches must have no masked columns."""
    return 1 if slides(target) else BATCH


def slides(target: Target) -> bool:
    """Whether a target has layers that do not see the whole context."""
    layers = getattr(target.config, "layer_types", None) or []
    return any(kind != "full_attention" for kind in layers)


def _bar(what: str, prompts: int) -> Any:
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(total=prompts, desc=what, unit="prompt", mininterval=interval, dynamic_ncols=True)


def reference(
    target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_tokens: Sequence[int]
) -> tuple[list[list[int]], float]:
    """The target's own greedy reply to each prompt, and the seconds that they took."""
    replies: list[list[int]] = [[] for _ in prompts]
    started = time.perf_counter()
    with _bar("target alone", len(prompts)) as bar:
        for indices in batches(prompts, batch_size(target)):
            batch = greedy_replies(target, [prompts[index] for index in indices], max_new_tokens, end_tokens)
            for index, reply in zip(indices, batch, strict=True):
                replies[index] = reply
            bar.update(len(indices))
    return replies, time.perf_counter() - started


def decode(
    decoder: SpeculativeDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, what: str
) -> tuple[list[Reply], float]:
    """The reply to each prompt with the draft's help, and the seconds that they took."""
    replies = [Reply() for _ in prompts]
    started = time.perf_counter()
    with _bar(what, len(prompts)) as bar:
        for indices in batches(prompts, batch_size(decoder.target)):
            batch = decoder.decode([prompts[index] for index in indices], max_new_tokens)
            for index, reply in zip(indices, batch, strict=True):
                replies[index] = reply
            bar.update(len(indices))
    return replies, time.perf_counter() - started


@dataclass(frozen=True)
class Comparison:
    """Decoded replies beside the target's own.

    Attributes:
        compared_tokens: tokens that were compared, up to a reply's end or first difference.
        ties: differences where the target's two best logits lie within 1e-4: prompt, position and margin.
        differences: other differences, likewise; any of them means that the draft changed the output.
    """

    compared_tokens: int
    ties: list[dict[str, Any]]
    differences: list[dict[str, Any]]

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.compared_tokens + other.compared_tokens,
            self.ties + other.ties,
            self.differences + other.differences,
        )


def compare(
    target: Target,
    prompts: Sequence[Sequence[int]],
    decoded: Sequence[Reply],
    expected: Sequence[Sequence[int]],
) -> Comparison:
    """Holds decoded replies against the target's own, token for token.

    Args:
        target: judges ties.
        prompts: token ids.
        decoded: with a draft.
        expected: without.
    """
    total = Comparison(0, [], [])
    for number, (prompt, reply, own) in enumerate(zip(prompts, decoded, expected, strict=True)):
        length = min(len(reply.tokens), len(own))
        place = next((i for i in range(length) if reply.tokens[i] != own[i]), length)
        total = total + Comparison(place, [], [])
        if place == len(reply.tokens) == len(own):
            continue
        margin = margin_at(target, [*prompt, *own[:place]])
        record = {"prompt": number, "position": place, "margin": margin}
        tie = place < length and margin < TIE_MARGIN
        total = total + Comparison(0, [record] if tie else [], [] if tie else [record])
    return total
