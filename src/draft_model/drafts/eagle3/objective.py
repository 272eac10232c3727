r"""What training minimises, at each step's positions: soft cross-entropy of the draft to the target, or the rejection.

    total = sum_i 0.8^i sum_t l_i(t)          l = -sum_v p(v) log q(v)          v in the draft vocabulary

with p the target's softmax over the draft vocabulary at a teacher position, z = W u the draft's logits there after the
final norm, u = RMSNorm(h), and q = softmax(z). As log q(v) = z(v) - logsumexp(z) and p sums to 1,

    l = logsumexp(z) - p.z          dl/dz = q - p          dl/dW = (q - p) u^T          dl/du = W^T (q - p)

so loss and gradients need z, p and q of one position at a time, and nothing of them has to be kept: the heads of all
steps run here after the unroll, a chunk of teacher positions at a time, each with one target head and one softmax p
for all steps, and their gradients leave as soon as they are known. Logits of the whole batch never exist. The backward
pass only multiplies by the gradient of the total. max_v z(v) = logsumexp(z) + log max_v q(v) gives l without a second
pass, and alpha = sum_v min(p, q) = 1 - |q - p|_1 / 2 the probability that sampling accepts. The rejection 1 - alpha,
which is the total variation of p and q, is a loss of its own (draft_loss=tv). LK (arXiv 2602.23881, draft_loss=lk) goes
from one to the other as a position gets better, by a weight w that counts as a constant:

    l_tv = 1 - alpha     dl_tv/dz = q (sum_{q < p} q - [q < p])     l_lk = w l + (1 - w) l_tv     w = exp(-3 alpha)

The sums stay sums. The training loop divides by the supervised tokens of the GLOBAL batch, so that splitting a batch
over ranks or micro-batches changes nothing. They also stay on the device until they are logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from draft_model.drafts import kernels
from draft_model.drafts.batch import Batch, move
from draft_model.drafts.counts import Counts
from draft_model.drafts.eagle3.model import Eagle3Draft, Weights
from draft_model.drafts.eagle3.plan import Plan, plan_unroll
from draft_model.drafts.eagle3.unroll import Unroll
from draft_model.drafts.layers import rotary_table

if TYPE_CHECKING:
    from draft_model.target.model import Target

STEP_DECAY = 0.8
CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
"""Teacher positions in one head. On a CPU one step at a time: 512 x 32,000 float32 logits are 64 MB; on a GPU all steps
at once: 7 x 2048 x 32,000 bfloat16 logits are 0.9 GB."""


class Objective:
    """The loss (kl, lk or tv) of a draft over `steps` of the unroll; the target is in the compute type `dtype`.

    attention_backend is flex_attention or sdpa; no conversation is longer than max_length tokens.
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
        self.backend = kernels.choose_backend(attention_backend, target.device, dtype)
        self.rotary = rotary_table(draft.config, target.device, max_length + steps, dtype)
        self.teacher_head = target.logits  # from the target's final hidden states [C, H] to logits [C, V]
        self.target_ids = draft.target_ids  # target id of each draft token, int64 [D]
        # Draft id of each target token, -1 where it has none, int64 [V].
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
        plan = move(plan, packed.device)
        weights = objective.draft.weights(objective.dtype)
        hidden = weights.config.hidden_size
        features, final = packed.split((packed.shape[1] - hidden, hidden), -1)
        unroll = Unroll(weights, objective.rotary, plan, objective.backend)
        embeddings = functional.embedding(plan.tokens, objective.target.embedding)
        outputs = unroll.forward(embeddings, features, learn)
        heads = Heads(objective, final, weights, outputs, plan, learn)
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


class Heads:
    """All steps' heads and losses over one batch: sums, agreements and, with `learn`, gradients.

    `final` are the target's final hidden states, [T, H]; `outputs` the layer's output of each step, [steps, N, H].
    """

    def __init__(
        self, objective: Objective, final: Tensor, weights: Weights, outputs: Tensor, plan: Plan, learn: bool
    ) -> None:  # fmt: skip
        self._objective, self._plan, self._learn, self._kind = objective, plan, learn, objective.kind
        self._norm, self._weight, self._eps = weights.norm, weights.head, weights.config.rms_norm_eps
        weight, states = weights.head, final.index_select(0, plan.teachers)
        self._outputs = outputs.flatten(0, 1)  # [steps * N, H]
        self._decay = STEP_DECAY ** torch.arange(plan.steps, device=weight.device, dtype=torch.float32)
        teachers = len(plan.teachers)
        # By step: loss, supervised, agree, overlap; and whether step and teacher agreed.
        self.sums = torch.zeros(4, plan.steps, device=weight.device, dtype=torch.float64)
        self.agree = torch.zeros(plan.steps, teachers, dtype=torch.bool, device=weight.device)
        if learn:
            self.grads = torch.zeros_like(outputs)
            self.grad_norm = torch.zeros_like(weights.norm, dtype=torch.float32)
            self.grad_head = torch.zeros_like(weight, dtype=torch.float32)
        size = min(CHUNK_ROWS[weight.device.type], teachers)
        fused = kernels.fused(weight)
        if not fused:
            # Made once: fresh matrices of this size would cost a page fault per 4 KB.
            self._p, self._q, self._z = (weight.new_empty(size, len(weight), dtype=torch.float32) for _ in range(3))
            self._typed = self._z if weight.dtype == torch.float32 else weight.new_empty(size, len(weight))
        for start in range(0, teachers, size):
            logits = objective.teacher_head(states[start : start + size])
            (self._teach_fused if fused else self._teach)(start, logits, plan.students[:, start : start + size])

    @property
    def loss(self) -> Tensor:
        """The sum over steps and supervised positions, float32 scalar."""
        return (self.sums[0] * self._decay.double()).sum().float()

    def _teach_fused(self, start: int, logits: Tensor, students: Tensor) -> None:
        """All steps at C teacher positions from `start` on, [steps, C] students; absent ones (-1) count for nothing."""
        from draft_model.drafts.eagle3 import triton_loss

        steps, count = students.shape
        taught = triton_loss.teach(logits, self._objective.target_ids, self._objective.draft_ids)
        del logits
        first = torch.arange(steps, device=students.device).unsqueeze(1) * len(self._plan.rows)
        rows = torch.where(students >= 0, students + first, -1).flatten()
        weights = torch.where(students >= 0, self._decay.unsqueeze(1), 0.0).flatten()
        teachers = torch.arange(count, device=students.device).repeat(steps)
        unit, scale = kernels.rms_norm(self._outputs, self._norm, self._eps, rows)
        z = unit @ self._weight.T  # [steps * C, D]
        sums = triton_loss.distill(z, taught, teachers, weights, self._learn, self._kind).view(steps, count, 4)
        self.sums += sums.sum(1, dtype=torch.float64).T
        self.agree[:, start : start + count] = sums[:, :, 2] > 0
        if not self._learn:
            return
        kernels.accumulate(self.grad_head, z.T, unit)
        _, grad_norm = kernels.rms_norm_backward(
            z @ self._weight, self._outputs, self._norm, scale, rows=rows, out=self.grads.flatten(0, 1)
        )
        self.grad_norm.add_(grad_norm)

    def _teach(self, start: int, logits: Tensor, students: Tensor) -> None:
        """The same, one step at a time, on the positions alone whose favourite the draft vocabulary has."""
        top = self._objective.draft_ids[logits.max(-1).indices]  # max is several times as fast as argmax in bfloat16
        known = (top >= 0).nonzero()[:, 0]
        if not len(known):
            return
        chosen = torch.index_select(logits, 1, self._objective.target_ids, out=self._typed[: len(logits)])
        chosen = chosen if len(known) == len(chosen) else chosen[known]
        p = torch.softmax(chosen, -1, dtype=torch.float32, out=self._p[: len(known)])  # [C, D]
        for step, rows in enumerate(students[:, known]):
            present = (rows >= 0).nonzero()[:, 0]
            if len(present) == len(rows):
                self._learn_step(step, rows, p, top[known], start + known)
            elif len(present):
                self._learn_step(step, rows[present], p[present], top[known][present], start + known[present])

    def _learn_step(self, step: int, rows: Tensor, p: Tensor, top: Tensor, teachers: Tensor) -> None:
        """One step's loss against the softmax p [C, D] of C teachers."""
        rows = rows + step * len(self._plan.rows)
        unit, scale = kernels.rms_norm(self._outputs, self._norm, self._eps, rows)
        z = torch.mm(unit, self._weight.T, out=self._typed[: len(unit)])
        z = z if z.dtype == torch.float32 else self._z[: len(unit)].copy_(z)
        q = torch.softmax(z, -1, out=self._q[: len(unit)])  # [C, D]
        highest, favourite = q.max(-1)
        # -log q of the favourite is logsumexp(z) - max(z), and p sums to 1, so the cross-entropy needs no log q.
        normaliser = z.gather(-1, favourite.unsqueeze(-1)).squeeze(-1) - highest.log()
        losses = normaliser - torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).flatten()
        agrees = favourite == top
        rejection = None
        if self._learn and self._kind != "kl":  # the gradient of 1 - sum min(p, q); z is used up
            lower = q < p
            below = torch.mul(q, lower, out=z).sum(-1, keepdim=True)
            rejection = torch.where(lower, below - 1.0, below, out=z).mul_(q)
        difference = q.sub_(p)
        overlap = 1.0 - 0.5 * torch.linalg.vector_norm(difference, 1, dim=-1)  # sum min(p, q)
        if self._kind != "kl":
            share = torch.exp(-kernels.LK_DECAY * overlap) if self._kind == "lk" else torch.zeros_like(overlap)
            losses = share * losses + (1 - share) * (1 - overlap)
            if rejection is not None:
                difference.sub_(rejection).mul_(share.unsqueeze(1)).add_(rejection)
        self.agree[step, teachers] = agrees
        parts = (losses, torch.ones_like(losses), agrees, overlap)
        self.sums[:, step] += torch.stack([part.sum(dtype=torch.float64) for part in parts])
        if not self._learn:
            return
        decay = STEP_DECAY**step
        grad_logits = difference.to(unit.dtype)
        grad_unit = (grad_logits @ self._weight).mul_(decay)
        _, grad_norm = kernels.rms_norm_backward(
            grad_unit, self._outputs, self._norm, scale, rows=rows, out=self.grads.flatten(0, 1)
        )
        self.grad_norm.add_(grad_norm)
        kernels.accumulate(self.grad_head, grad_logits.T, unit.mul_(decay))

    def step_sums(self) -> Counts:
        """The sums per step, on the device."""
        plan = self._plan
        exists = plan.teacher_of >= 0  # [steps, N]
        agrees = self.agree.gather(1, plan.teacher_of.clamp(min=0)) if len(plan.teachers) else exists
        # A chain that starts in the prompt has no first step that could agree, so it gets nowhere.
        return Counts.of(self.sums, exists, agrees, plan.replies)
