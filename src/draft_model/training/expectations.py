"""What acceptance length to expect of a training, by the supervised tokens that it sees, epochs counted.

The chance p that the next proposal is kept grows with the logarithm of the tokens, and 1 + p + p^2 + ... + p^K is the
acceptance length of K proposals. Up to 0.4 million tokens the points were measured with the demo's target
(benchmarks/recipe.py); beyond, they are published ones of 8B to 20B targets: 1.89 after 5,000 conversations of the
target's own answers (1.45 to 1.49 on others' answers), and 2.26 to 2.60 on MT-bench after some 500,000.
"""

from __future__ import annotations

import math
from bisect import bisect
from typing import TYPE_CHECKING

from draft_model import drafts

if TYPE_CHECKING:
    from draft_model.parameters import Parameters

POINTS = ((1e4, 0.17), (4e4, 0.30), (1e5, 0.40), (2e5, 0.45), (4e5, 0.50), (2.5e6, 0.55), (2.5e8, 0.68))
"""Supervised tokens and p."""
SPREAD = 0.08
"""Of p, between recipes, targets and kinds of conversation."""
FOREIGN = 0.20
"""What p loses where the answers are not the target's own."""


def expected_acceptance_length(tokens: float, proposals: int, own_answers: bool = True) -> tuple[float, float]:
    """The range in which the acceptance length on held-out conversations of the same kind should lie.

    Args:
        tokens: supervised tokens that the training sees.
        proposals: tokens proposed per round.
        own_answers: whether the target wrote the answers.
    """
    xs, ps = [math.log(x) for x, _ in POINTS], [p for _, p in POINTS]
    at = min(max(math.log(max(tokens, 1)), xs[0]), xs[-1])
    after = min(max(bisect(xs, at), 1), len(xs) - 1)
    share = (at - xs[after - 1]) / (xs[after] - xs[after - 1])
    middle = ps[after - 1] + share * (ps[after] - ps[after - 1]) - (0 if own_answers else FOREIGN)
    low, high = (sum(max(p, 0) ** k for k in range(proposals + 1)) for p in (middle - SPREAD, middle + SPREAD))
    return low, high


def expectation(tokens: float, proposals: int) -> str:
    """The same in words, for the target's own answers and for others'."""
    own, others = (expected_acceptance_length(tokens, proposals, mine) for mine in (True, False))
    millions = f"{float(f'{tokens / 1e6:.2g}'):,g} M"
    return (
        f"{own[0]:.1f} to {own[1]:.1f} with {proposals} proposals after {millions} supervised tokens of the target's "
        f"own answers; {others[0]:.1f} to {others[1]:.1f} where others wrote them"
    )


def advice(p: Parameters) -> str:
    """Settings that give more accepted tokens for the same data than the contract's defaults; see docs/training.md."""
    wanted = {"draft_optimizer": "muon", "ttt_length": p.num_speculative_tokens}
    unused = drafts.family(p.draft_architecture).unused
    changes = [f"{name}={value}" for name, value in wanted.items() if getattr(p, name) != value and name not in unused]
    return ", ".join([*changes, "1 or 2 conversations per step and learning_rate 0.001 below a million tokens"])
