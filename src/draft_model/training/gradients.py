"""A draft's gradients in one float32 buffer, summed over processes in one message and applied without a wait.

Measured against DistributedDataParallel and FSDP2 by `benchmarks/scaling.py --reduction`: the draft is small beside its
step, so there is nothing to gain from overlapping its one message with the backward pass, or from sharding it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from draft_model.ranks import Ranks


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

    def norm(self, count: Tensor) -> Tensor:
        """The norm of the mean gradient, a scalar on the device.

        Args:
            count: what sums are divided by to be means: the supervised tokens of the global batch.
        """
        norm: Tensor = torch.linalg.vector_norm(self._flat)
        return norm / count.clamp(min=1).float()

    def update(
        self, optimizer: torch.optim.Optimizer, count: Tensor, norm: Tensor, max_norm: float, useful: Tensor
    ) -> None:
        """One step of a fused AdamW on the mean gradient, clipped; division and clipping happen inside it.

        Args:
            optimizer: `torch.optim.AdamW(fused=True)` over the parameters.
            count: of `norm`.
            norm: of `norm`.
            max_norm: the longest that the whole gradient may be.
            useful: bool scalar; where it is false, nothing changes.
        """
        shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        optimizer.grad_scale = count.clamp(min=1).float() / shrink  # type: ignore[attr-defined]
        optimizer.found_inf = (~useful).float()  # type: ignore[attr-defined]
        optimizer.step()
