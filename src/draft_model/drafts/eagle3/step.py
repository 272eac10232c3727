"""One training step's maths, from conversations to the loss: plan, unroll, heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from draft_model.drafts.batch import Batch
from draft_model.drafts.counts import Counts
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.objective import Heads, Teacher
from draft_model.drafts.eagle3.plan import Plan, plan_unroll
from draft_model.drafts.eagle3.unroll import Unroll
from draft_model.drafts.kernels import choose_backend
from draft_model.drafts.rotary import Rotary

if TYPE_CHECKING:
    from draft_model.target.model import Target


class Objective:
    """The loss of a draft against its target.

    Args:
        draft: float32 parameters.
        target: the frozen target, in the compute type.
        steps: unroll length (ttt_length).
        attention_backend: `flex_attention` or `sdpa`.
        dtype: compute type.
        max_length: longest conversation, in tokens.
        loss: draft_loss.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        target: Target,
        steps: int,
        attention_backend: str,
        dtype: torch.dtype,
        max_length: int,
        loss: str = "kl",
    ) -> None:
        self.draft, self.target, self.steps, self.dtype, self.kind = draft, target, steps, dtype, loss
        self.backend = choose_backend(attention_backend, target.device, dtype)
        self.rotary = Rotary(draft.config, target.device).table(max_length + steps, dtype)
        self.target_ids = draft.target_ids
        self.draft_ids = torch.full((draft.config.vocab_size,), -1, device=target.device)
        self.draft_ids[self.target_ids] = torch.arange(len(self.target_ids), device=target.device)

    def __call__(self, batch: Batch, states: list[Tensor]) -> tuple[Tensor, Counts]:
        """The loss summed over supervised positions and steps, and sums per step; nothing here waits for the GPU."""
        plan = plan_unroll(batch, self.steps)
        outcome: list[Counts] = []
        packed = states[0] if len(states) == 1 else torch.cat(states)  # [T, 4H]
        loss: Tensor = _Loss.apply(self, plan, outcome, packed, *self.draft.parameters())  # type: ignore[no-untyped-call]
        return loss, outcome[0]

    def no_counts(self) -> Counts:
        """Sums over no position, on the device."""
        return Counts.zeros(self.steps, self.target.device)

    def teacher(self, final: Tensor, plan: Plan) -> Teacher:
        """The target's side of a batch, from its final hidden states [T, H]."""
        return Teacher(
            final.index_select(0, plan.teachers),
            self.target.logits,
            self.target_ids,
            self.draft_ids,
            self.draft.config.rms_norm_eps,
        )


class _Loss(torch.autograd.Function):
    """The whole step as one function of the draft's parameters, whose gradients it adds up itself."""

    @staticmethod
    def forward(
        ctx: Any, objective: Objective, plan: Plan, outcome: list[Counts], packed: Tensor, *parameters: Tensor
    ) -> Tensor:
        learn = any(ctx.needs_input_grad)
        ctx.objective, ctx.learnt, ctx.shape = objective, None, packed.shape
        if not len(plan.rows):
            outcome.append(objective.no_counts())
            return packed.new_zeros((), dtype=torch.float32)
        plan = plan.to(packed.device)
        weights = objective.draft.weights(objective.dtype)
        hidden = weights.config.hidden_size
        features, final = packed.split((packed.shape[1] - hidden, hidden), -1)
        unroll = Unroll(weights, objective.rotary, plan, objective.backend)
        embeddings = functional.embedding(plan.tokens, objective.target.embedding)
        outputs = unroll.forward(embeddings, features, learn)
        heads = Heads(objective.teacher(final, plan), weights.norm, weights.head, outputs, plan, learn, objective.kind)
        outcome.append(heads.step_sums())
        if learn:
            ctx.learnt = unroll, heads
        return heads.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        draft, learnt = ctx.objective.draft, ctx.learnt
        sums = draft.gradients()
        nothing = [None] * sum(1 for _ in draft.parameters())
        if learnt is None:
            return None, None, None, None, *nothing
        unroll, heads = learnt
        ctx.learnt = None  # its tensors are used up: a second backward would find zeros
        sums.head.addcmul_(heads.grad_head, grad)
        sums.norm.addcmul_(heads.grad_norm, grad)
        del heads.grad_head
        torch._foreach_mul_([heads.grads], grad.to(heads.grads.dtype))  # a plain mul_ by a GPU's scalar is slower
        d_packed = unroll.backward(heads.grads, sums, of_features=ctx.needs_input_grad[3])
        if ctx.needs_input_grad[3]:  # never in training: the target is frozen
            d_packed = functional.pad(d_packed, (0, ctx.shape[1] - d_packed.shape[1]))
        return None, None, None, d_packed, *nothing
