r"""What training minimises: soft cross-entropy of each step's draft to the target, and how often they agree.

    total = sum_i 0.8^i sum_t l_i(t)          l = -sum_v p(v) log q(v)          v in the draft vocabulary

with p the target's softmax over the draft vocabulary at a teacher position, z = W u the draft's logits there after the
final norm, u = RMSNorm(h), and q = softmax(z). As log q(v) = z(v) - logsumexp(z) and p sums to 1,

    l = logsumexp(z) - p.z          dl/dz = q - p          dl/dW = (q - p) u^T          dl/du = W^T (q - p)

so loss and gradients need z, p and q of one position at a time, and nothing of them has to be kept: the heads of all
steps run here after the unroll, a chunk of teacher positions at a time, each with one target head and one softmax p
for all steps, and their gradients leave as soon as they are known. Logits of the whole batch never exist. The backward
pass only multiplies by the gradient of the total. max_v z(v) = logsumexp(z) + log max_v q(v) gives l without a second
pass, and sum_v min(p, q) = 1 - |q - p|_1 / 2 the probability that sampling accepts.

The sums stay sums. Whoever called divides by the supervised tokens of the GLOBAL batch, so that splitting a batch over
ranks or micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts.eagle3.batch import Plan
from draft_model.drafts.eagle3.layer import inverse_rms, norm_backward, normed

STEP_DECAY = 0.8
CHUNK_ROWS = {"cpu": 512, "cuda": 4096}  # teacher positions in one head; 512 x 32,000 float32 logits are 64 MB

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
class Teacher:
    """The target's side of the loss.

    Attributes:
        states: the target's final hidden states at the plan's teacher positions, [M, H].
        head: the target's head.
        target_ids: target id of each draft token, int64 [D].
        draft_ids: draft id of each target token, -1 where it has none, int64 [V].
        eps: of the norm before the draft's head.
    """

    states: Tensor
    head: TeacherHead
    target_ids: Tensor
    draft_ids: Tensor
    eps: float


class _Scratch:
    """Matrices of a chunk, made once: fresh ones of this size would cost a page fault per 4 KB.

    Args:
        rows: teacher positions in a chunk.
        vocab: D.
        like: in the compute type, where the matrices live.
    """

    def __init__(self, rows: int, vocab: int, like: Tensor) -> None:
        self._p, self._q, self._z = (like.new_empty(rows, vocab, dtype=torch.float32) for _ in range(3))
        self._typed = self._z if like.dtype == torch.float32 else like.new_empty(rows, vocab)

    def teacher(self, logits: Tensor, target_ids: Tensor, known: Tensor) -> Tensor:
        """Softmax over the draft vocabulary of the rows `known` of the target's logits, float32 [C, D]."""
        chosen = torch.index_select(logits, 1, target_ids, out=self._typed[: len(logits)])
        if len(known) < len(chosen):
            chosen = chosen[known]
        return torch.softmax(chosen, -1, dtype=torch.float32, out=self._p[: len(known)])

    def student(self, unit: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of normed outputs [C, H] and their softmax, float32 [C, D] each."""
        rows = len(unit)
        z = torch.mm(unit, weight.T, out=self._typed[:rows])
        if z.dtype != torch.float32:
            z = self._z[:rows].copy_(z)
        return z, torch.softmax(z, -1, out=self._q[:rows])


@dataclass(frozen=True)
class _Heads:
    """What every chunk of teacher positions needs; the tensors that gradients and sums are gathered in.

    Attributes:
        teacher: the target's side.
        outputs: the layer's output of each step, [N, H] each.
        norm: weight of the norm before the head, [H].
        weight: the draft's head in the compute type, [D, H].
        sums: loss, supervised, agree, overlap, float64 [4, steps].
        agree: whether step and teacher agreed, bool [steps, M].
        grads: gradients of the outputs, [N, H] each; empty in an evaluation.
        grad_norm: float32 [H].
        grad_head: float32 [D, H].
        scratch: what every chunk writes anew.
    """

    teacher: Teacher
    outputs: Sequence[Tensor]
    norm: Tensor
    weight: Tensor
    sums: Tensor
    agree: Tensor
    grads: list[Tensor]
    grad_norm: Tensor
    grad_head: Tensor
    scratch: _Scratch

    @classmethod
    def over(
        cls, teacher: Teacher, students: Tensor, norm: Tensor, head: Tensor, outputs: Sequence[Tensor], learning: bool
    ) -> _Heads:
        """All sums and gradients at zero."""
        steps, teachers = students.shape
        return cls(
            teacher,
            outputs,
            norm,
            head.to(norm.dtype),
            sums=torch.zeros(4, steps, device=head.device, dtype=torch.float64),
            agree=torch.zeros(steps, teachers, dtype=torch.bool, device=head.device),
            grads=[torch.zeros_like(output) for output in outputs] if learning else [],
            grad_norm=torch.zeros_like(norm, dtype=torch.float32),
            grad_head=torch.zeros_like(head if learning else norm, dtype=torch.float32),
            scratch=_Scratch(min(CHUNK_ROWS[head.device.type], teachers), len(head), norm),
        )

    def teach(self, start: int, logits: Tensor, students: Tensor) -> None:
        """Adds the losses of all steps at C teacher positions, and their gradients.

        Args:
            start: number of the first teacher position.
            logits: the target's, [C, V].
            students: row that learns from each position at each step, -1 for none, [steps, C].
        """
        top = self.teacher.draft_ids[logits.max(-1).indices]  # max is several times as fast as argmax in bfloat16
        known = (top >= 0).nonzero()[:, 0]
        if not len(known):
            return
        p = self.scratch.teacher(logits, self.teacher.target_ids, known)  # [C, D]
        for step, rows in enumerate(students[:, known]):
            self._learn(step, rows, p, top[known], start + known)

    def _learn(self, step: int, rows: Tensor, p: Tensor, top: Tensor, teachers: Tensor) -> None:
        """One step's loss against the softmax p [C, D] of C teachers."""
        present = rows >= 0
        rows = rows.clamp(min=0)
        x = self.outputs[step].index_select(0, rows)  # [C, H]
        scale = inverse_rms(x, self.teacher.eps)
        unit = normed(x, self.norm, scale)
        z, q = self.scratch.student(unit, self.weight)  # [C, D]
        highest, favourite = q.max(-1)
        # -log q of the favourite is logsumexp(z) - max(z), and p sums to 1, so the cross-entropy needs no log q.
        normaliser = z.gather(-1, favourite.unsqueeze(-1)).squeeze(-1) - highest.log()
        cross = torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).flatten()
        losses = (normaliser - cross) * present
        agrees = (favourite == top) & present
        difference = q.sub_(p)
        overlap = (1.0 - 0.5 * torch.linalg.vector_norm(difference, 1, dim=-1)) * present  # sum min(p, q)
        self.agree[step, teachers] = agrees
        self.sums[:, step] += torch.stack(
            [part.sum(dtype=torch.float64) for part in (losses, present, agrees, overlap)]
        )
        if not self.grads:
            return
        decay = (present * STEP_DECAY**step).unsqueeze(1)  # [C, 1]
        grad_logits = difference.to(unit.dtype)
        grad_unit = (grad_logits @ self.weight) * decay.to(unit.dtype)
        grad_x, grad_norm = norm_backward(grad_unit, x, self.norm, scale)
        # A row learns once per step, so no two of these writes meet, but rows that are absent share row 0.
        self.grads[step].index_add_(0, rows, grad_x)
        self.grad_norm.add_(grad_norm)
        add_product(self.grad_head, grad_logits.T, unit.mul_(decay))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to a float32 total, without another matrix of its size where the types allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _decays(steps: int, device: torch.device) -> Tensor:
    return STEP_DECAY ** torch.arange(steps, device=device, dtype=torch.float64)


class _FusedHeads(torch.autograd.Function):
    """All steps' heads and losses in one pass; the gradients are made on the way and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        teacher: Teacher,
        students: Tensor,
        outcome: dict[str, Tensor],
        norm: Tensor,
        head: Tensor,
        *outputs: Tensor,
    ) -> Tensor:
        learning = any(tensor.requires_grad for tensor in (norm, head, *outputs))
        heads = _Heads.over(teacher, students, norm, head, outputs, learning)
        size = CHUNK_ROWS[head.device.type]
        for start in range(0, students.shape[1], size):
            chunk = slice(start, start + size)
            heads.teach(start, teacher.head(teacher.states[chunk]), students[:, chunk])
        outcome["sums"], outcome["agree"] = heads.sums, heads.agree
        if learning:
            ctx.save_for_backward(heads.grad_norm.to(norm.dtype), heads.grad_head, *heads.grads)
        return (heads.sums[0] * _decays(len(outputs), head.device)).sum().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: autograd refuses a second backward pass, for which they would be wrong.
        return None, None, None, *(saved.mul_(grad) for saved in ctx.saved_tensors)


def distillation_loss(
    outputs: Sequence[Tensor], norm: Tensor, head: Tensor, teacher: Teacher, plan: Plan
) -> tuple[Tensor, StepSums]:
    """The weighted sum of the losses of all steps, and the sums that metrics are made of.

    Args:
        outputs: the layer's output of each step, before the final norm, [N, H] each, in the compute type.
        norm: that norm's weight, in the compute type, [H].
        head: the draft's lm_head, float32 [D, H].
        teacher: the target's side.
        plan: positions, of `plan_unroll`.

    Returns:
        The sum over steps and supervised positions (float32 scalar, to be divided by the global number of
        supervised tokens), and the sums per step.
    """
    if not torch.is_grad_enabled():
        norm, head = norm.detach(), head.detach()  # a parameter asks for its gradient even in an evaluation
    outcome: dict[str, Tensor] = {}
    loss: Tensor = _FusedHeads.apply(teacher, plan.students, outcome, norm, head, *outputs)  # type: ignore[no-untyped-call]
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
    positions = plan.rows.index[starts].tolist()
    # A reply's rows are neighbours; its first token is the target's own, so no round starts before the second row.
    replies: list[list[int]] = []
    for place, (position, length) in enumerate(zip(positions, agreed[starts].tolist(), strict=True)):
        if place and position == positions[place - 1] + 1 and position % plan.rows.length:
            replies[-1].append(length)
        else:
            replies.append([])
    rounds, kept = [0] * plan.steps, [0] * plan.steps
    for proposals in range(1, plan.steps + 1):
        for reply in replies:
            place = 0
            while place < len(reply):
                accepted = min(reply[place], proposals)
                rounds[proposals - 1] += 1
                kept[proposals - 1] += accepted
                place += accepted + 1
    return torch.tensor(rounds, dtype=torch.float64), torch.tensor(kept, dtype=torch.float64)
