"""A small random training step of any family: a draft, a batch and what a target said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from draft_model.drafts.batch import Batch


@dataclass(frozen=True)
class Step:
    """What the code under test and the reference are given."""

    draft: Any  # random float32 weights, large enough that every part of the layer matters
    batch: Batch  # B conversations
    states: list[Tensor]  # per conversation the target's features and final hidden states, [T_b, (n + 1) H]
    embedding: Tensor  # the target's, [V, H]
    head: Tensor  # the target's, [V, H]

    def target(self, device: str, dtype: torch.dtype) -> Any:
        """A stand-in for the target, which says what `states` hold."""
        embedding, head = self.embedding.to(device, dtype), self.head.to(device, dtype)
        return SimpleNamespace(
            embedding=embedding, head=head, logits=lambda hidden: hidden @ head.T, device=torch.device(device)
        )

    def exact_weights(self) -> dict[str, Tensor]:
        """The draft's in float64, by checkpoint name."""
        return {name: w.detach().double().requires_grad_() for name, w in self.draft.named_parameters()}

    def only(self, rows: Sequence[int]) -> Self:
        """The same with some of the conversations."""
        batch, index = self.batch, torch.tensor(rows)
        width = int(batch.lengths[index].max())
        kept = (batch.tokens[index, :width], batch.lengths[index], batch.predicted[index, :width], batch.keys[index])
        return replace(self, batch=Batch(*kept), states=[self.states[row] for row in rows])


def randomise(draft: Any, generator: torch.Generator) -> Any:
    """Gives a draft random weights of unit gain."""
    with torch.no_grad():
        for weight in draft.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / weight.shape[1] ** 0.5 if weight.dim() == 2 else 1 + 0.3 * noise)
    return draft


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; 0 where both are zero."""
    difference = float((value.detach().double() - truth.detach().double()).norm())
    return difference / float(truth.detach().double().norm()) if difference else 0.0
