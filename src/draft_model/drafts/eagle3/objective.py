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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_model.drafts import kernels
from draft_model.drafts.counts import Counts, decode_rounds
from draft_model.drafts.eagle3.plan import Plan

STEP_DECAY = 0.8
CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
"""Teacher positions in one head. On a CPU one step at a time: 512 x 32,000 float32 logits are 64 MB; on a GPU all steps
at once: 7 x 2048 x 32,000 bfloat16 logits are 0.9 GB."""

TeacherHead = Callable[[Tensor], Tensor]
"""From target hidden states [C, H] to logits [C, V]."""


@dataclass(frozen=True)
class Teacher:
    """The target's side of the loss."""

    states: Tensor  # the target's final hidden states at the plan's teacher positions, [M, H]
    head: TeacherHead  # the target's head
    target_ids: Tensor  # target id of each draft token, int64 [D]
    draft_ids: Tensor  # draft id of each target token, -1 where it has none, int64 [V]
    eps: float  # of the norm before the draft's head


class Heads:
    """All steps' heads and losses over one batch.

    Args:
        teacher: the target's side.
        norm: weight of the norm before the draft's head, [H].
        weight: the draft's head in the compute type, [D, H].
        outputs: the layer's output of each step, [steps, N, H].
        plan: positions.
        learn: whether gradients are wanted.
        loss: draft_loss: `kl`, `lk` or `tv`.

    Attributes:
        sums: loss, supervised, agree, overlap, float64 [4, steps].
        agree: whether step and teacher agreed, bool [steps, M].
        grads: gradients of the outputs, [steps, N, H].
        grad_norm: float32 [H].
        grad_head: float32 [D, H].
    """

    def __init__(
        self, teacher: Teacher, norm: Tensor, weight: Tensor, outputs: Tensor, plan: Plan, learn: bool, loss: str
    ) -> None:  # fmt: skip
        self._teacher, self._norm, self._weight, self._plan, self._learn = teacher, norm, weight, plan, learn
        self._kind = loss
        self._outputs = outputs.flatten(0, 1)  # [steps * N, H]
        self._decay = STEP_DECAY ** torch.arange(plan.steps, device=weight.device, dtype=torch.float32)
        teachers = len(plan.teachers)
        self.sums = torch.zeros(4, plan.steps, device=weight.device, dtype=torch.float64)
        self.agree = torch.zeros(plan.steps, teachers, dtype=torch.bool, device=weight.device)
        if learn:
            self.grads = torch.zeros_like(outputs)
            self.grad_norm = torch.zeros_like(norm, dtype=torch.float32)
            self.grad_head = torch.zeros_like(weight, dtype=torch.float32)
        size = min(CHUNK_ROWS[weight.device.type], teachers)
        fused = kernels.fused(weight)
        if not fused:
            # Made once: fresh matrices of this size would cost a page fault per 4 KB.
            self._p, self._q, self._z = (weight.new_empty(size, len(weight), dtype=torch.float32) for _ in range(3))
            self._typed = self._z if weight.dtype == torch.float32 else weight.new_empty(size, len(weight))
        for start in range(0, teachers, size):
            logits = teacher.head(teacher.states[start : start + size])
            (self._teach_fused if fused else self._teach)(start, logits, plan.students[:, start : start + size])

    @property
    def loss(self) -> Tensor:
        """The sum over steps and supervised positions, float32 scalar."""
        return (self.sums[0] * self._decay.double()).sum().float()

    def _teach_fused(self, start: int, logits: Tensor, students: Tensor) -> None:
        """All steps at C teacher positions at once; absent students count for nothing.

        Args:
            start: number of the first teacher position.
            logits: the target's, [C, V].
            students: row that learns from each position at each step, -1 for none, [steps, C].
        """
        from draft_model.drafts.eagle3 import triton_loss

        steps, count = students.shape
        taught = triton_loss.teach(logits, self._teacher.target_ids, self._teacher.draft_ids)
        del logits
        first = torch.arange(steps, device=students.device).unsqueeze(1) * len(self._plan.rows)
        rows = torch.where(students >= 0, students + first, -1).flatten()
        weights = torch.where(students >= 0, self._decay.unsqueeze(1), 0.0).flatten()
        teachers = torch.arange(count, device=students.device).repeat(steps)
        unit, scale = kernels.rms_norm(self._outputs, self._norm, self._teacher.eps, rows)
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
        top = self._teacher.draft_ids[logits.max(-1).indices]  # max is several times as fast as argmax in bfloat16
        known = (top >= 0).nonzero()[:, 0]
        if not len(known):
            return
        chosen = torch.index_select(logits, 1, self._teacher.target_ids, out=self._typed[: len(logits)])
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
        unit, scale = kernels.rms_norm(self._outputs, self._norm, self._teacher.eps, rows)
        z = torch.mm(unit, self._weight.T, out=self._typed[: len(unit)])
        z = z if z.dtype == torch.float32 else self._z[: len(unit)].copy_(z)
        q = torch.softmax(z, -1, out=self._q[: len(unit)])  # [C, D]
        highest, favourite = q.max(-1)
        # -log q of the favourite is logsumexp(z) - max(z), and p sums to 1, so the cross-entropy needs no log q.
        normaliser = z.gather(-1, favourite.unsqueeze(-1)).squeeze(-1) - highest.log()
        losses = normaliser - torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).flatten()
        agrees = favourite == top
        rejection = _rejection_gradient(p, q, z) if self._learn and self._kind != "kl" else None
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
        agrees = self.agree.gather(1, plan.teacher_of.clamp(min=0)) & exists if len(plan.teachers) else exists
        # A chain that starts in the prompt has no first step that could agree, so it gets nowhere.
        agreed = agrees.cummin(0).values
        before = torch.cat((torch.ones_like(agrees[:1]), agreed[:-1])) & exists
        chains = torch.stack((exists, before, before & agrees)).sum(-1, dtype=torch.float64)
        return Counts.from_tensor(torch.cat((self.sums, chains, torch.stack(decode_rounds(plan, agreed.sum(0))))))


def _rejection_gradient(p: Tensor, q: Tensor, out: Tensor) -> Tensor:
    """Of 1 - sum min(p, q) by the draft's logits, for softmaxes p and q [C, D]; `out` is overwritten."""
    lower = q < p
    share = torch.mul(q, lower, out=out).sum(-1, keepdim=True)
    return torch.where(lower, share - 1.0, share, out=out).mul_(q)
