"""How many tokens to propose: speed-up over the target alone for K = 1..10, from what was measured on this hardware.

    speed-up(K) = L(K) / (v(K) + K c)

L(K) is the acceptance length, v(K) the time of a target pass over K + 1 tokens and c that of one pass of the draft,
both in units of a target pass over one token. Engines that serve many requests at once are bound by arithmetic, where v
grows with K: a K that is best for one request is too large for a full server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.evaluation.draft_cache import DraftCache, causal
from draft_model.target.model import Target

LONGEST = 10
"""The largest K that is predicted for."""
_REPEATS = 5


def expected_length(conditional: Sequence[float | None], proposals: int) -> float:
    """Acceptance length from conditional acceptance: 1 + a1 + a1 a2 + ...

    Args:
        conditional: by position; None where nothing got that far, which counts as 0.
        proposals: K.
    """
    length, reached = 1.0, 1.0
    for share in conditional[:proposals]:
        reached *= share or 0.0
        length += reached
    return length


@torch.no_grad()
def measure_costs(target: Target, draft: Eagle3Draft, prompt: Sequence[int]) -> dict[str, Any]:
    """Times the target's pass over 1..11 tokens and the draft's over one, each after the same prompt.

    Args:
        target: as decoding uses it.
        draft: its draft.
        prompt: token ids; how long the context is.

    Returns:
        target_seconds of a pass over one token, verify_cost for K = 1..10 and draft_cost, both in such passes, and
        context in tokens. Medians of five.
    """
    from transformers import DynamicCache

    device, length = target.device, len(prompt)
    cache = DynamicCache()
    tokens = torch.tensor([list(prompt)], device=device)
    target.decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
    features = target.features()

    def target_pass(width: int) -> None:
        final = target.decoder(input_ids=tokens[:, -1:].expand(1, width), past_key_values=cache, use_cache=True)
        target.logits(final.last_hidden_state).argmax(-1)
        cache.crop(-width)

    held = DraftCache(draft, target, length + 2)
    visible = torch.ones(1, length, dtype=torch.bool, device=device)
    positions = torch.arange(length, device=device).unsqueeze(0)
    hidden = torch.nn.functional.linear(features, held.weights.fc)
    last = held.step(hidden, tokens, positions, causal(visible, length))[:, -1:]
    mask = torch.ones(1, 1, length + 1, dtype=torch.bool, device=device)

    def draft_pass() -> None:
        step = held.step(last, tokens[:, -1:], positions[:, -1:] + 1, mask)
        held.logits(step).argmax(-1)
        held.cut(length)

    one = _seconds(lambda: target_pass(1), device)
    verify = [_seconds(lambda width=proposals + 1: target_pass(width), device) for proposals in range(1, LONGEST + 1)]  # type: ignore[misc]
    return {
        "context": length,
        "target_seconds": one,
        "verify_cost": [seconds / one for seconds in verify],
        "draft_cost": _seconds(draft_pass, device) / one,
    }


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])  # the first one warms up


def predict(measured: Sequence[float | None], trained: Sequence[float] | None, costs: dict[str, Any]) -> dict[str, Any]:
    """Speed-up over the target alone, for each K.

    Args:
        measured: conditional acceptance by position that decoding found, [10].
        trained: acceptance length for K = 1, 2, ... that the last validation simulated; None where it did not.
        costs: of `measure_costs`.

    Returns:
        costs, by_proposals (records of proposals, acceptance_length, predicted_acceptance_length and speed_up) and
        recommended: the K of the highest speed-up, 0 where none is above 1.
    """
    records = []
    for proposals in range(1, LONGEST + 1):
        length = expected_length(measured, proposals)
        cost = costs["verify_cost"][proposals - 1] + proposals * costs["draft_cost"]
        records.append(
            {
                "proposals": proposals,
                "acceptance_length": length,
                "predicted_acceptance_length": trained[proposals - 1]
                if trained and proposals <= len(trained)
                else None,
                "speed_up": length / cost,
            }
        )
    best = max(records, key=lambda record: record["speed_up"])
    return {
        "costs": costs,
        "by_proposals": records,
        "recommended": best["proposals"] if best["speed_up"] > 1 else 0,
    }
