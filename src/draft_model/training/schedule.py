"""The learning rate: a linear warm-up, then a cosine to zero."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """The rate of one step.

    Args:
        step: counted from 0.
        total: steps of the whole run.
        peak: the highest rate.
        warmup_ratio: the warm-up's share of the total steps.
    """
    warmup = int(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
