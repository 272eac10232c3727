"""What training minimises: soft cross-entropy of each step's draft to the target, and how often they agree.

    total = sum_i 0.8^i sum_p -sum_v p(v) log q_i(v)     over supervised teacher positions p, v in the draft vocabulary

where p is the target's softmax restricted to the draft vocabulary and q_i the draft's at step i. No step reads logits,
so all steps' heads run here, teacher position by teacher position in chunks: one target head, one softmax p shared by
all steps, one draft head over steps x chunk rows. Logits of the whole batch never exist, and the gradients leave the
chunk as soon as they are known: d total / d logits_i = 0.8^i (q_i - p).

The sums stay sums. Whoever called divides by the supervised tokens of the GLOBAL batch, so that splitting a batch over
ranks or micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.eagle3.batch import Plan

STEP_DECAY = 0.8
CHUNK_ROWS = 512  # steps x teacher positions in one draft head; 512 x 32,000 float32 logits are 64 MB

TeacherHead = Callable[[Tensor], Tensor]
"""From target hidden states [C, H] to logits [C, V]."""


@dataclass
class StepSums:
    """Sums over positions, one entry per unroll step, float64 [steps]; divide only after reducing over ranks.

    Attributes:
        loss: soft cross-entropy, nats.
        supervised: positions that the loss counts (the target's top token lies in the draft vocabulary).
        agree: of those, the draft's top token is the target's.
        overlap: sum of sum_v min(p, q): the acceptance probability under sampling.
        candidates: positions whose token is the assistant's, in the draft vocabulary or not.
        reached: candidates all of whose earlier steps agreed.
        accepted: of those, this step agrees as well.
    """

    loss: Tensor
    supervised: Tensor
    agree: Tensor
    overlap: Tensor
    candidates: Tensor
    reached: Tensor
    accepted: Tensor

    @classmethod
    def zeros(cls, steps: int) -> StepSums:
        """No positions yet."""
        return cls(*(torch.zeros(steps, dtype=torch.float64) for _ in range(7)))

    def tensor(self) -> Tensor:
        """All sums as one tensor [7, steps], to be reduced."""
        return torch.stack(list(vars(self).values()))

    @classmethod
    def from_tensor(cls, sums: Tensor) -> StepSums:
        """The inverse of `tensor`."""
        return cls(*sums.unbind(0))

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums.from_tensor(self.tensor() + other.tensor())

    def means(self) -> dict[str, list[float]]:
        """Per step: loss in nats, top-1 agreement, alpha (overlap), conditional acceptance."""
        supervised, candidates = self.supervised.clamp(min=1), self.candidates.clamp(min=1)
        return {
            "loss": (self.loss / supervised).tolist(),
            "agreement": (self.agree / candidates).tolist(),
            "alpha": (self.overlap / supervised).tolist(),
            "conditional_acceptance": (self.accepted / self.reached.clamp(min=1)).tolist(),
        }

    def acceptance_length(self, tokens: int) -> float:
        """Simulated acceptance length 1 + a0 + a0 a1 + ... of greedy decoding that drafts so many tokens."""
        conditional = (self.accepted / self.reached.clamp(min=1))[:tokens]
        return 1.0 + float(conditional.cumprod(0).sum())


class _FusedHeads(torch.autograd.Function):
    """All steps' heads and losses in one pass; the gradients are made on the way and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher: Tensor,
        teacher_head: TeacherHead,
        target_ids: Tensor,
        draft_ids: Tensor,
        students: Tensor,
        outcome: dict[str, Tensor],
    ) -> Tensor:
        steps, teachers = students.shape
        want = hidden.requires_grad or head.requires_grad
        weight = head.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden) if want else None
        grad_head = torch.zeros_like(head) if want else None
        decay = STEP_DECAY ** torch.arange(steps, device=hidden.device, dtype=torch.float32)
        sums = torch.zeros(4, steps, device=hidden.device, dtype=torch.float64)
        agree = torch.zeros(steps, teachers, dtype=torch.bool, device=hidden.device)
        step_index = torch.arange(steps, device=hidden.device).unsqueeze(1)
        size = max(1, CHUNK_ROWS // steps)
        for start in range(0, teachers, size):
            logits = teacher_head(teacher[start : start + size])  # [C, V]
            top = draft_ids[logits.argmax(-1)]  # the draft's id of the target's top token, -1 outside
            known = (top >= 0).nonzero()[:, 0]
            if not len(known):
                continue
            top = top[known]
            p = functional.softmax(logits[known][:, target_ids].float(), -1)  # [C, D]
            rows = students[:, start + known]  # [steps, C]
            present = rows >= 0
            rows = rows.clamp(min=0)
            x = hidden[step_index, rows].flatten(0, 1)  # [steps * C, H]
            log_q = functional.log_softmax((x @ weight.T).float(), -1).view(steps, len(known), -1)
            losses = -torch.einsum("cv,scv->sc", p, log_q) * present
            q = log_q.exp()
            agrees = (log_q.argmax(-1) == top) & present
            agree[:, start + known] = agrees
            overlap = torch.minimum(p, q).sum(-1) * present
            sums += torch.stack([part.sum(1, dtype=torch.float64) for part in (losses, present, agrees, overlap)])
            if grad_hidden is not None and grad_head is not None:
                scale = (present * decay.unsqueeze(1)).unsqueeze(-1)
                grad_logits = q.sub_(p).mul_(scale).flatten(0, 1).to(hidden.dtype)
                grad_x = (grad_logits @ weight).view(steps, len(known), -1)
                # A row learns once per step, so no two of these writes meet, but rows that are absent share row 0.
                grad_hidden.index_put_((step_index.expand_as(rows), rows), grad_x, accumulate=True)
                grad_head += grad_logits.T @ x
        outcome["sums"], outcome["agree"] = sums, agree
        if grad_hidden is not None and grad_head is not None:
            ctx.save_for_backward(grad_hidden, grad_head)
        return (sums[0] * decay).sum().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head * grad, None, None, None, None, None, None


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: Tensor,
    teacher_head: TeacherHead,
    target_ids: Tensor,
    draft_ids: Tensor,
    plan: Plan,
) -> tuple[Tensor, StepSums]:
    """The weighted sum of the losses of all steps, and the sums that metrics are made of.

    Args:
        hidden: normed draft outputs, [steps, N, H], in the compute type.
        head: the draft's lm_head, float32 [D, H].
        teacher: the target's final hidden states at the plan's teacher positions, [M, H].
        teacher_head: the target's head.
        target_ids: target id of each draft token, int64 [D].
        draft_ids: draft id of each target token, -1 where it has none, int64 [V].
        plan: positions, of `plan_unroll`.

    Returns:
        The sum over steps and supervised positions (float32 scalar, to be divided by the global number of
        supervised tokens), and the sums per step.
    """
    if not torch.is_grad_enabled():
        head = head.detach()  # a parameter asks for its gradient even in an evaluation
    outcome: dict[str, Tensor] = {}
    loss = _FusedHeads.apply(hidden, head, teacher, teacher_head, target_ids, draft_ids, plan.students, outcome)
    loss_sum, supervised, agree, overlap = outcome["sums"].cpu()
    candidates, reached, accepted = _chains(plan, outcome["agree"])
    return loss, StepSums(loss_sum, supervised, agree, overlap, candidates, reached, accepted)


def _chains(plan: Plan, agree: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, per step, the chains that exist, that got there, and that go on: float64 [steps] each."""
    by_row = torch.zeros(2, plan.steps, len(plan.time), dtype=torch.bool, device=agree.device)
    step, teacher = (plan.students >= 0).nonzero(as_tuple=True)
    row = plan.students[step, teacher]
    by_row[0, step, row] = True
    by_row[1, step, row] = agree[step, teacher]
    exists, agrees = by_row
    # A chain that starts in the prompt has no first step that could agree, so it gets nowhere.
    before = torch.cat((torch.ones_like(agrees[:1]), agrees[:-1].cummin(0).values)) & exists
    sums = torch.stack((exists, before, before & agrees)).sum(-1, dtype=torch.float64).cpu()
    return sums[0], sums[1], sums[2]
