"""Small random training steps of a block draft, by the code under test and by the naive reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts.batch import collate
from draft_model.drafts.dspark.blocks import Blocks, place_blocks
from draft_model.drafts.dspark.config import BlockConfig
from draft_model.drafts.dspark.model import BlockDraft
from draft_model.drafts.dspark.objective import Objective
from drafts.step import Step, randomise

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


class Case(Step):
    """One of a block draft's."""

    def objective(self, kind: str = "tv", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Objective:
        """The code under test."""
        draft = self.draft if device == "cpu" else copy.deepcopy(self.draft).to(device)
        target = self.target(device, dtype)
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

    def by_reference(self, kind: str, blocks: Blocks, weights: dict[str, Tensor]) -> Iterator[tuple[Tensor, list[Any]]]:
        """Each block's weighted loss, and of each learnt proposal its loss, whether it agrees, and its overlap."""
        batch, head = self.batch, self.head.double()
        starts = (batch.lengths.cumsum(0) - batch.lengths).tolist()
        for anchor in blocks.anchors.tolist():
            row = max(index for index, start in enumerate(starts) if start <= anchor)
            length, states = int(batch.lengths[row]), self.states[row].double()
            yield reference.block_loss(
                weights, self.draft.config, kind, batch.tokens[row, :length], states[:, :-HIDDEN],
                states[:, -HIDDEN:] @ head.T, batch.predicted[row, :length].tolist(), self.embedding.double(), head,
                anchor - starts[row],
            )  # fmt: skip

    def theirs(self, kind: str = "tv"):
        """Loss, sums of loss, agreement and overlap [3, K], and gradients, in float64, on the same anchors."""
        config, weights = self.draft.config, self.exact_weights()
        total, sums = torch.zeros((), dtype=torch.float64), torch.zeros(3, config.proposals, dtype=torch.float64)
        blocks = place_blocks(self.batch, config.proposals, config.num_anchors)
        for loss, told in self.by_reference(kind, blocks, weights):
            total = total + loss
            for number, one in enumerate(told):
                sums[:, number] += torch.tensor(one, dtype=torch.float64)
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
        return total.detach(), sums, dict(zip(weights, gradients, strict=True))


def random_case(seed: int, lengths: list[int], *, learnt: float = 0.8, **changes: Any) -> Case:
    """A random step: weights of unit gain, conversations of these lengths, of which this share is supervised."""
    generator = torch.Generator().manual_seed(seed)
    config = small_config(**changes)
    everything = torch.ones(VOCABULARY, dtype=torch.bool), torch.zeros(VOCABULARY, dtype=torch.int64)
    draft = randomise(BlockDraft(config, *everything), generator)
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
