"""Small random training steps of a block draft, by the code under test and by the naive reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts.batch import Batch, collate
from draft_model.drafts.dspark.blocks import place_blocks
from draft_model.drafts.dspark.config import BlockConfig
from draft_model.drafts.dspark.model import BlockDraft
from draft_model.drafts.dspark.objective import Objective

from . import reference

HIDDEN, VOCABULARY, FEATURES = 20, 37, 4


def small_config(**changes: Any) -> BlockConfig:
    """A DSpark draft of two layers whose head_dim is not hidden / heads."""
    config = BlockConfig(
        hidden_size=HIDDEN, intermediate_size=28, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        rms_norm_eps=1e-5, vocab_size=VOCABULARY, draft_vocab_size=VOCABULARY, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0}, aux_layers=(2, 3, 4, 5),
        target_model_type="llama", num_hidden_layers=2, num_target_layers=7, block_size=4, sample_from_anchor=True,
        mask_token_id=36, markov_rank=5, enable_confidence_head=True,
    )  # fmt: skip
    return replace(config, **changes)


DFLASH = {"markov_rank": 0, "enable_confidence_head": False, "sample_from_anchor": False}


@dataclass(frozen=True)
class Case:
    """A draft, a batch and what a target said about it: features and final hidden states, [T_b, (n + 1) H]."""

    draft: BlockDraft
    batch: Batch
    states: list[Tensor]
    embedding: Tensor
    head: Tensor

    def objective(self, kind: str = "tv", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Objective:
        """The code under test."""
        head = self.head.to(device, dtype)
        target: Any = SimpleNamespace(
            embedding=self.embedding.to(device, dtype), head=head, logits=lambda hidden: hidden @ head.T,
            device=torch.device(device),
        )  # fmt: skip
        draft = self.draft if device == "cpu" else copy.deepcopy(self.draft).to(device)
        return Objective(draft, target, 7, "flex_attention", dtype, self.batch.tokens.shape[1], kind)

    def ours(self, kind: str = "tv", backend: str = "sdpa", dtype: torch.dtype = torch.float32):
        """Its loss, sums and gradients."""
        objective = self.objective(kind, dtype)
        objective.backend = backend
        self.draft.zero_grad()
        loss, sums = objective(self.batch, [states.to(dtype) for states in self.states])
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), sums, {name: weight.grad for name, weight in self.draft.named_parameters()}

    def theirs(self, kind: str = "tv"):
        """Loss, sums of loss, agreement and overlap [3, K], and gradients, in float64, on the same anchors."""
        config, batch = self.draft.config, self.batch
        weights = {name: w.detach().double().requires_grad_() for name, w in self.draft.named_parameters()}
        blocks = place_blocks(batch, config.proposals, config.num_anchors)
        total, sums = torch.zeros((), dtype=torch.float64), torch.zeros(3, config.proposals, dtype=torch.float64)
        starts = (batch.lengths.cumsum(0) - batch.lengths).tolist()
        for anchor in blocks.anchors.tolist():
            row = max(index for index, start in enumerate(starts) if start <= anchor)
            length, states = int(batch.lengths[row]), self.states[row].double()
            loss, told = reference.block_loss(
                weights, config, kind, batch.tokens[row, :length], states[:, :-HIDDEN],
                states[:, -HIDDEN:] @ self.head.double().T, batch.predicted[row, :length].tolist(),
                self.embedding.double(), self.head.double(), anchor - starts[row],
            )  # fmt: skip
            total = total + loss
            for number, one in enumerate(told):
                sums[:, number] += torch.tensor(one, dtype=torch.float64)
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
        return total.detach(), sums, dict(zip(weights, gradients, strict=True))

    def only(self, rows: list[int]) -> Case:
        """The same with some of the conversations."""
        width = int(self.batch.lengths[rows].max())
        batch = self.batch
        kept = Batch(batch.tokens[rows, :width], batch.lengths[rows], batch.predicted[rows, :width], batch.keys[rows])
        return replace(self, batch=kept, states=[self.states[row] for row in rows])


def random_case(seed: int, lengths: list[int], *, learnt: float = 0.8, **changes: Any) -> Case:
    """A random step: weights of unit gain, conversations of these lengths, of which this share is supervised."""
    generator = torch.Generator().manual_seed(seed)
    config = small_config(**changes)
    everything = torch.ones(VOCABULARY, dtype=torch.bool), torch.zeros(VOCABULARY, dtype=torch.int64)
    draft = BlockDraft(config, *everything)
    with torch.no_grad():
        for weight in draft.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / weight.shape[1] ** 0.5 if weight.dim() == 2 else 1 + 0.3 * noise)
    rows = [
        (torch.randint(VOCABULARY, (length,), generator=generator), torch.rand(length, generator=generator) < learnt)
        for length in lengths
    ]
    return Case(
        draft, collate(rows),
        [torch.randn(length, (len(config.aux_layers) + 1) * HIDDEN, generator=generator) for length in lengths],
        torch.randn(VOCABULARY, HIDDEN, generator=generator),
        torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5,
    )  # fmt: skip


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; 0 where both are zero."""
    difference = float((value.double() - truth.double()).norm())
    return difference / float(truth.double().norm()) if difference else 0.0
