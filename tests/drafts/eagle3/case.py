"""Small random training steps, computed by the code under test and by the naive reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draft_model.drafts.batch import collate
from draft_model.drafts.counts import Counts
from draft_model.drafts.eagle3.config import DraftConfig
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.objective import Objective
from drafts.step import Step, randomise

from . import reference

HIDDEN = 20


class Case(Step):
    """One of EAGLE-3's."""

    def on(
        self, device: str, steps: int, backend: str = "sdpa", dtype: torch.dtype = torch.float32, loss: str = "kl"
    ) -> tuple[Objective, list[Tensor]]:
        """The code under test, taught by this case's states instead of a model's, and these states."""
        draft = copy.deepcopy(self.draft).to(device) if device != "cpu" else self.draft
        target = self.target(device, dtype)
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
        weights, config = self.exact_weights(), self.draft.config
        conversations = [
            reference.Conversation(
                tokens=self.batch.tokens[row, :length],
                features=self.states[row][:, : -config.hidden_size].double(),
                target_logits=self.states[row][:, -config.hidden_size :].double() @ self.head.double().T,
                predicted=self.batch.predicted[row, :length],
            )
            for row, length in enumerate(self.batch.lengths.tolist())
        ]
        sums = reference.training_step(
            weights, config, conversations, self.embedding.double(), self.draft.target_ids, steps, loss
        )
        gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        if sums.total.requires_grad:
            found = torch.autograd.grad(sums.total, list(weights.values()), allow_unused=True)
            gradients |= {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        return sums, gradients


@dataclass(frozen=True)
class Outcome:
    """Un-normalised loss, sums and gradients by checkpoint name."""

    loss: Tensor
    sums: Counts
    gradients: dict[str, Tensor]


def small_config(vocab: int, draft_vocab: int, **changes: object) -> DraftConfig:
    """A draft whose head_dim is not hidden / heads."""
    config = DraftConfig(
        hidden_size=HIDDEN, intermediate_size=28, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        rms_norm_eps=1e-5, vocab_size=vocab, draft_vocab_size=draft_vocab, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0}, aux_layers=(2, 4, 5), target_model_type="llama",
    )  # fmt: skip
    return replace(config, **changes)


def random_draft(config: DraftConfig, generator: torch.Generator) -> Eagle3Draft:
    """Random weights of unit gain over a random, sorted part of the vocabulary."""
    vocab, known = config.vocab_size, config.draft_vocab_size
    ids = torch.randperm(vocab, generator=generator)[:known].sort().values
    t2d = torch.zeros(vocab, dtype=torch.bool)
    t2d[ids] = True
    return randomise(Eagle3Draft(config, t2d, ids - torch.arange(known)), generator)


def random_case(
    seed: int,
    lengths: Sequence[int],
    *,
    vocab: int = 37,
    draft_vocab: int = 23,
    learnt: float | Callable[[int], Tensor] = 0.6,
    **changes: object,
) -> Case:
    """A random step; `learnt`: the loss mask of a conversation of so many tokens, or the share of tokens in it."""
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
