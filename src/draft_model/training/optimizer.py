"""What a step makes of its gradients: their sum over processes, the learning rate, AdamW or Muon.

The gradients lie in one float32 buffer, are summed in one message and applied without a wait. Measured against
DistributedDataParallel and FSDP2 by `benchmarks/scaling.py --reduction`: the draft is small beside its step, so there
is nothing to gain from overlapping that message with the backward pass, or from sharding it.

draft_optimizer=muon is Muon for the matrices of the draft's layers, with AdamW for its head and norms. Muon (Jordan
2024) moves a matrix by its momentum with all singular values made one, so that no few directions take the whole step.
Five iterations of Newton-Schulz in bfloat16 come close enough to that. The update is scaled to the size that AdamW's
would have (Moonlight, arXiv 2502.16982). `momentum` is Muon's, and AdamW's first beta.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draft_model.ranks import Ranks

if TYPE_CHECKING:
    from draft_model.drafts.base import Draft

RATIO = 20.0  # Muon's rate is so many times learning_rate; benchmarks/README.md has the measurement
_MATRICES = ("fc.", "midlayer.", "layers.")  # of every family; a head's matrix has a row per token, and is AdamW's


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, floor: float) -> float:
    """The rate of a step (from 0) of so many: linear warm-up over warmup_ratio of them, cosine to `floor` of peak."""
    warmup = int(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return peak * (floor + (1.0 - floor) * cosine)


class Gradients:
    """The gradients of float32 parameters, all on one device; `backward` adds to them."""

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
        """The norm of the mean gradient; `count`: what sums are divided by to be means. Scalars on the device."""
        norm: Tensor = torch.linalg.vector_norm(self._flat)
        return norm / count.clamp(min=1).float()

    def update(
        self, optimizer: torch.optim.Optimizer, count: Tensor, norm: Tensor, max_norm: float, useful: Tensor
    ) -> None:
        """One step of a fused optimizer on the mean gradient, whose division and clipping happen inside it.

        The whole gradient is at most max_norm long; where `useful`, a bool scalar, is false, nothing changes.
        """
        shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        optimizer.grad_scale = count.clamp(min=1).float() / shrink  # type: ignore[attr-defined]
        optimizer.found_inf = (~useful).float()  # type: ignore[attr-defined]
        optimizer.step()


def make_optimizer(name: str, draft: Draft, rate: float, momentum: float) -> torch.optim.Optimizer:
    """The optimizer that draft_optimizer names."""
    named = dict(draft.named_parameters())
    if name == "adamw":
        return _adamw([*named.values()], rate, momentum)
    matrices = [key for key, p in named.items() if p.dim() == 2 and key.startswith(_MATRICES)]
    others = [key for key in named if key not in matrices]
    return MuonAdamW([named[key] for key in matrices], [named[key] for key in others], rate, momentum)


def _adamw(parameters: Sequence[Tensor], rate: float, momentum: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=rate, betas=(momentum, 0.999), weight_decay=0.0, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices, AdamW for others; with `grad_scale` and `found_inf` as the fused AdamW reads them."""

    grad_scale: Tensor  # gradients are divided by it
    found_inf: Tensor  # where it is not 0, nothing changes

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[Tensor], rate: float, momentum: float) -> None:
        super().__init__(list(matrices), {"lr": rate, "name": "muon"})
        self._adamw, self._momentum = _adamw(others, rate, momentum), momentum
        self._adamw.state = self.state
        self.param_groups += self._adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the parameters' `.grad`; nothing waits for a GPU."""
        self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        useful = self.found_inf == 0
        for matrix in self.param_groups[0]["params"]:
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            gradient = torch.where(useful, matrix.grad / self.grad_scale, 0.0)
            momentum = state["momentum_buffer"].lerp_(gradient, torch.where(useful, 1 - self._momentum, 0.0))
            update = orthogonalise(gradient.lerp_(momentum, self._momentum))
            size = RATIO * self.param_groups[0]["lr"] * 0.2 * math.sqrt(max(matrix.shape))
            matrix.sub_(torch.where(useful, update, 0.0), alpha=size)


def orthogonalise(matrix: Tensor) -> Tensor:
    """A matrix with about the same singular vectors and singular values of about one, bfloat16 [m, n]."""
    x = matrix.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # x <- a x + b (x x') x + c (x x')^2 x
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
