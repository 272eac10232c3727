"""A draft's gradients in one float32 buffer: accumulated over micro-batches, summed over processes in one message.

Measured against DistributedDataParallel and FSDP2 by `benchmarks/scaling.py --reduction`: the draft is small beside its
step, so there is nothing to gain from overlapping its one message with the backward pass, or from sharding it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from draft_model.training.ranks import Ranks


class Gradients:
    """The gradients of some parameters; `backward` adds to them.

    Args:
        parameters: float32, all on one device.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), device=parameters[0].device)
        for parameter, part in zip(parameters, self._flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def clear(self) -> None:
        """Starts a new step."""
        self._flat.zero_()

    def reduce(self, ranks: Ranks) -> None:
        """Sums them over all processes."""
        ranks.sum(self._flat)

    def finish(self, count: float, max_norm: float) -> float:
        """Makes sums means, and clips them.

        Args:
            count: what to divide by: the supervised tokens of the global batch.
            max_norm: the longest that the whole gradient may be.

        Returns:
            The norm before clipping.
        """
        self._flat.div_(max(count, 1.0))
        norm = float(torch.linalg.vector_norm(self._flat))
        if norm > max_norm:
            self._flat.mul_(max_norm / (norm + 1e-6))
        return norm
