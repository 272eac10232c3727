"""Small random training steps, computed by the code under test and by the naive reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts.batch import Batch, collate
from draft_model.drafts.counts import Counts
from draft_model.drafts.eagle3.config import DraftConfig
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.objective import Objective

from . import reference

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, THETA, EPS = 20, 28, 4, 2, 6, 50.0, 1e-5


@dataclass(frozen=True)
class Case:
    """A draft, a batch and what a target said about it."""

    draft: Eagle3Draft  # random float32 weights, large enough that every part of the layer matters
    batch: Batch  # B conversations
    states: list[Tensor]  # per conversation the target's features and final hidden states, [T_b, (n + 1) H]
    embedding: Tensor  # the target's, [V, H]
    head: Tensor  # the target's, [V, H]

    def on(
        self, device: str, steps: int, backend: str = "sdpa", dtype: torch.dtype = torch.float32, loss: str = "kl"
    ) -> tuple[Objective, list[Tensor]]:
        """The code under test, taught by this case's states instead of a model's, and these states."""
        head = self.head.to(device, dtype)
        target: Any = SimpleNamespace(
            embedding=self.embedding.to(device, dtype),
            logits=lambda hidden: hidden @ head.T,
            device=torch.device(device),
        )
        draft = copy.deepcopy(self.draft).to(device) if device != "cpu" else self.draft
        objective = Objective(draft, target, steps, backend, dtype, self.batch.tokens.shape[1], loss)
        return objective, [states.to(device, dtype) for states in self.states]

    def ours(
        self,
        steps: int,
        backend: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        loss: str = "kl",
    ) -> Outcome:
        """What it makes of the batch: loss, sums and the gradient of every parameter."""
        objective, states = self.on(device, steps, backend, dtype, loss)
        objective.draft.zero_grad()
        total, sums = objective(self.batch, states)
        total.backward()
        gradients = {name: weight.grad.clone() for name, weight in objective.draft.named_parameters()}
        return Outcome(total.detach(), sums, gradients)

    def theirs(self, steps: int, loss: str = "kl") -> tuple[reference.Sums, dict[str, Tensor]]:
        """The same by the reference, in float64."""
        weights = {name: w.detach().double().requires_grad_() for name, w in self.draft.named_parameters()}
        config = self.draft.config
        conversations = [
            reference.Conversation(
                tokens=self.batch.tokens[row, :length],
                features=self.states[row][:, : -config.hidden_size].double(),
                target_logits=self.states[row][:, -config.hidden_size :].double() @ self.head.double().T,
                predicted=self.batch.predicted[row, :length],
            )
            for row, length in enumerate(self.batch.lengths.tolist())
        ]
        shape = reference.Geometry(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
            config.rope_parameters["rope_theta"],
            config.norm_output,
        )
        sums = reference.training_step(
            weights, shape, conversations, self.embedding.double(), self.draft.target_ids, steps, loss
        )
        gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        if sums.total.requires_grad:
            found = torch.autograd.grad(sums.total, list(weights.values()), allow_unused=True)
            gradients |= {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        return sums, gradients

    def only(self, rows: Sequence[int]) -> Case:
        """The same with some of the conversations."""
        batch = self.batch
        index = torch.tensor(rows)
        width = int(batch.lengths[index].max())
        kept = Batch(
            batch.tokens[index, :width], batch.lengths[index], batch.predicted[index, :width], batch.keys[index]
        )
        return replace(self, batch=kept, states=[self.states[row] for row in rows])


@dataclass(frozen=True)
class Outcome:
    """Un-normalised loss, sums and gradients by checkpoint name."""

    loss: Tensor
    sums: Counts
    gradients: dict[str, Tensor]


def small_config(vocab: int, draft_vocab: int, **changes: object) -> DraftConfig:
    """A draft whose head_dim is not hidden / heads."""
    config = DraftConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=EPS,
        vocab_size=vocab,
        draft_vocab_size=draft_vocab,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        aux_layers=(2, 4, 5),
        target_model_type="llama",
    )
    return replace(config, **changes)


def random_draft(config: DraftConfig, generator: torch.Generator) -> Eagle3Draft:
    """Random weights of unit gain over a random, sorted part of the vocabulary."""
    vocab, known = config.vocab_size, config.draft_vocab_size
    ids = torch.randperm(vocab, generator=generator)[:known].sort().values
    t2d = torch.zeros(vocab, dtype=torch.bool)
    t2d[ids] = True
    draft = Eagle3Draft(config, t2d, ids - torch.arange(known))
    with torch.no_grad():
        for weight in draft.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / weight.shape[1] ** 0.5 if weight.dim() == 2 else 1 + 0.3 * noise)
    return draft


def random_case(
    seed: int,
    lengths: Sequence[int],
    *,
    vocab: int = 37,
    draft_vocab: int = 23,
    learnt: float | Callable[[int], Tensor] = 0.6,
    **changes: object,
) -> Case:
    """A random step.

    Args:
        seed: of everything.
        lengths: tokens of each conversation.
        vocab: V.
        draft_vocab: D.
        learnt: the loss mask of a conversation of so many tokens, or the share of tokens in it.
        changes: settings of the draft.
    """
    generator = torch.Generator().manual_seed(seed)
    draft = random_draft(small_config(vocab, draft_vocab, **changes), generator)
    hidden = draft.config.hidden_size

    def mask(length: int) -> Tensor:
        return learnt(length) if callable(learnt) else torch.rand(length, generator=generator) < learnt

    tokens = [torch.randint(vocab, (length,), generator=generator) for length in lengths]
    return Case(
        draft=draft,
        batch=collate([(ids, mask(len(ids))) for ids in tokens]),
        states=[torch.randn(length, draft.config.state_width, generator=generator) for length in lengths],
        embedding=torch.randn(vocab, hidden, generator=generator),
        head=torch.randn(vocab, hidden, generator=generator) / hidden**0.5,
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; 0 where both are zero."""
    difference = float((value.detach().double() - truth.detach().double()).norm())
    return difference / float(truth.detach().double().norm()) if difference else 0.0
