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
        rounds: rounds of decoding the replies with as many proposals as the entry's place says (1, 2, ...).
        kept: proposals that those rounds keep.
    """

    loss: Tensor
    supervised: Tensor
    agree: Tensor
    overlap: Tensor
    candidates: Tensor
    reached: Tensor
    accepted: Tensor
    rounds: Tensor
    kept: Tensor

    @classmethod
    def zeros(cls, steps: int) -> StepSums:
        """No positions yet."""
        return cls(*(torch.zeros(steps, dtype=torch.float64) for _ in range(9)))

    def tensor(self) -> Tensor:
        """All sums as one tensor [9, steps], to be reduced."""
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

    def acceptance_length(self, proposals: int) -> float:
        """Acceptance length that greedy decoding of these replies would have: 1 + kept / rounds.

        The product of mean acceptances, 1 + a0 + a0 a1 + ..., would be higher: it weighs all positions alike, but
        decoding passes easy ones several at a time and starts most rounds at hard ones.

        Args:
            proposals: tokens proposed per round; at most the unroll length counts.
        """
        place = min(proposals, len(self.rounds)) - 1
        return 1.0 + float(self.kept[place] / self.rounds[place].clamp(min=1))


@dataclass(frozen=True)
class _Heads:
    """What every chunk of teacher positions needs; the tensors that gradients and sums are gathered in.

    Attributes:
        hidden: normed draft outputs, [steps, N, H].
        weight: the draft's head in the compute type, [D, H].
        target_ids: target id of each draft token, [D].
        draft_ids: draft id of each target token, -1 where it has none, [V].
        sums: loss, supervised, agree, overlap, float64 [4, steps].
        agree: whether step and teacher agreed, bool [steps, M].
        grad_hidden: [steps, N, H]; None in an evaluation.
        grad_head: float32 [D, H]; None likewise.
    """

    hidden: Tensor
    weight: Tensor
    target_ids: Tensor
    draft_ids: Tensor
    sums: Tensor
    agree: Tensor
    grad_hidden: Tensor | None
    grad_head: Tensor | None

    def chunk(self, start: int, logits: Tensor, students: Tensor) -> None:
        """Adds the losses of all steps at C teacher positions, and their gradients.

        Args:
            start: number of the first teacher position.
            logits: the target's, [C, V].
            students: row that learns from each position at each step, -1 for none, [steps, C].
        """
        steps = len(students)
        top = self.draft_ids[logits.max(-1).indices]  # max is several times as fast as argmax in bfloat16
        known = (top >= 0).nonzero()[:, 0]
        if not len(known):
            return
        p = functional.softmax(logits.index_select(1, self.target_ids)[known], -1, dtype=torch.float32)  # [C, D]
        rows, place = students[:, known], torch.arange(steps, device=known.device).unsqueeze(1)
        present = rows >= 0
        rows = rows.clamp(min=0)
        x = self.hidden[place, rows].flatten(0, 1)  # [steps * C, H]
        z = (x @ self.weight.T).float().view(steps, len(known), -1)
        highest, favourite = z.max(-1)
        q = functional.softmax(z, -1)
        # -log q of the favourite is logsumexp(z) - max(z), and p sums to 1, so the cross-entropy needs no log q.
        normaliser = highest - q.gather(-1, favourite.unsqueeze(-1)).squeeze(-1).log()
        losses = (normaliser - torch.einsum("cv,scv->sc", p, z)) * present
        agrees = (favourite == top[known]) & present
        difference = q.sub_(p)
        overlap = (1.0 - 0.5 * torch.linalg.vector_norm(difference, 1, dim=-1)) * present  # sum min(p, q)
        self.agree[:, start + known] = agrees
        self.sums.add_(torch.stack([part.sum(1, dtype=torch.float64) for part in (losses, present, agrees, overlap)]))
        if self.grad_hidden is None or self.grad_head is None:
            return
        scale = (present * _decay(steps, z.device).unsqueeze(1)).flatten().unsqueeze(1).to(x.dtype)  # [steps * C, 1]
        grad_logits = difference.flatten(0, 1).to(x.dtype)
        grad_x = (grad_logits @ self.weight).mul_(scale)
        # A row learns once per step, so no two of these writes meet, but rows that are absent share row 0.
        self.grad_hidden.index_put_((place.expand_as(rows), rows), grad_x.view(*rows.shape, -1), accumulate=True)
        self.grad_head.add_(grad_logits.T @ (x * scale))


def _decay(steps: int, device: torch.device) -> Tensor:
    return STEP_DECAY ** torch.arange(steps, device=device, dtype=torch.float32)


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
        learning = hidden.requires_grad or head.requires_grad
        sums = torch.zeros(4, steps, device=hidden.device, dtype=torch.float64)
        agree = torch.zeros(steps, teachers, dtype=torch.bool, device=hidden.device)
        grads = (torch.zeros_like(hidden), torch.zeros_like(head)) if learning else (None, None)
        heads = _Heads(hidden, head.to(hidden.dtype), target_ids, draft_ids, sums, agree, *grads)
        size = max(1, CHUNK_ROWS // steps)
        for start in range(0, teachers, size):
            chunk = slice(start, start + size)
            heads.chunk(start, teacher_head(teacher[chunk]), students[:, chunk])
        outcome["sums"], outcome["agree"] = sums, agree
        if learning:
            ctx.save_for_backward(*grads)
        return (sums[0] * _decay(steps, hidden.device)).sum().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
    loss: Tensor = _FusedHeads.apply(  # type: ignore[no-untyped-call]
        hidden, head, teacher, teacher_head, target_ids, draft_ids, plan.students, outcome
    )
    loss_sum, supervised, agree, overlap = outcome["sums"].cpu()
    return loss, StepSums(loss_sum, supervised, agree, overlap, *_chains(plan, outcome["agree"]))


def _chains(plan: Plan, agree: Tensor) -> tuple[Tensor, ...]:
    """Candidates, reached, accepted, rounds and kept of `StepSums`."""
    by_row = torch.zeros(2, plan.steps, len(plan.time), dtype=torch.bool, device=agree.device)
    step, teacher = (plan.students >= 0).nonzero(as_tuple=True)
    row = plan.students[step, teacher]
    by_row[0, step, row] = True
    by_row[1, step, row] = agree[step, teacher]
    exists, agrees = by_row
    # A chain that starts in the prompt has no first step that could agree, so it gets nowhere.
    agreed = agrees.cummin(0).values
    before = torch.cat((torch.ones_like(agrees[:1]), agreed[:-1])) & exists
    sums = torch.stack((exists, before, before & agrees)).sum(-1, dtype=torch.float64).cpu()
    rounds, kept = _rounds(plan, exists[0], agreed.sum(0))
    return sums[0], sums[1], sums[2], rounds, kept


def _rounds(plan: Plan, starts: Tensor, agreed: Tensor) -> tuple[Tensor, Tensor]:
    """Walks through every reply as decoding would, for 1, 2, ... proposals per round.

    Args:
        plan: positions.
        starts: rows from which a first proposal is the assistant's, bool [N].
        agreed: leading steps of each row that agree, int64 [N].

    Returns:
        Rounds and kept proposals, float64 [steps] each.
    """
    found = torch.zeros(2, plan.steps, dtype=torch.float64)
    positions = plan.rows.index[starts].tolist()
    # A reply's rows are neighbours; its first token is the target's own, so no round starts before the second row.
    replies: list[list[int]] = []
    for place, (position, length) in enumerate(zip(positions, agreed[starts].tolist(), strict=True)):
        if place and position == positions[place - 1] + 1 and position % plan.rows.length:
            replies[-1].append(length)
        else:
            replies.append([])
    for proposals in range(1, plan.steps + 1):
        for reply in replies:
            place = 0
            while place < len(reply):
                kept = min(reply[place], proposals)
                found[0, proposals - 1] += 1
                found[1, proposals - 1] += kept
                place += kept + 1
    return found[0], found[1]
