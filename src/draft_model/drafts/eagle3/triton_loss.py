"""The heads' losses as Triton kernels, for all steps of a chunk of teachers; `objective.py` has the plain form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draft_model.drafts.kernels import LK_DECAY


@triton.jit
def _teach(
    logits, target_ids, draft_ids, chosen, normaliser, top, V: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        column = start + lane
        value = tl.load(logits + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = value > best
        best_at = tl.where(higher, column, best_at)
        best = tl.where(higher, value, best)
    highest = tl.max(best, 0)
    first = tl.min(tl.where(best == highest, best_at, V), 0)
    known = tl.load(draft_ids + tl.minimum(first, V - 1))
    tl.store(top + row, tl.where(first < V, known, -1))  # logits that are no numbers have no highest
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + lane
        ids = tl.load(target_ids + column, mask=column < D, other=0)
        value = tl.load(logits + row * V + ids, mask=column < D, other=float("-inf"))
        tl.store(chosen + row * D + column, value, mask=column < D)
        value = value.to(tl.float32)
        higher = tl.maximum(maximum, value)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - safe) + tl.exp(value - safe)
        maximum = higher
    highest = tl.max(maximum, 0)
    tl.store(normaliser + row, highest + tl.log(tl.sum(total * tl.exp(maximum - highest), 0)))


def teach(logits: Tensor, target_ids: Tensor, draft_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher of `distill`: logits over the draft vocabulary [C, D], their log-sum-exp [C], the favourite [C].

    The favourite is a draft id, int64, or -1 where the draft vocabulary has not the target's.
    """
    count, vocab = logits.shape
    size = len(target_ids)
    chosen = logits.new_empty(count, size)
    normaliser = logits.new_empty(count, dtype=torch.float32)
    top = torch.empty(count, dtype=torch.int64, device=logits.device)
    block = min(4096, triton.next_power_of_2(vocab))
    _teach[(count,)](logits, target_ids, draft_ids, chosen, normaliser, top, vocab, size, block, num_warps=8)
    return chosen, normaliser, top


@triton.jit(do_not_specialize_on_alignment=["teachers", "weights", "sums"])
def _distill(
    z, teacher_logits, teacher_normaliser, top, teachers, weights, sums,
    D: tl.constexpr, LEARN: tl.constexpr, REJECTION: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    teacher = tl.load(teachers + row).to(tl.int64)
    favourite = tl.load(top + teacher)
    counts = (weight > 0.0) & (favourite >= 0)
    lane = tl.arange(0, BLOCK)
    student_at, teacher_at = z + row * D, teacher_logits + teacher * D
    teacher_lse = tl.load(teacher_normaliser + teacher)
    maximum = float("-inf")
    total, cross = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + lane
        inside = column < D
        student = tl.load(student_at + column, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.exp(tl.load(teacher_at + column, mask=inside, other=float("-inf")).to(tl.float32) - teacher_lse)
        cross += tl.where(inside, p * student, 0.0)
        higher = tl.maximum(maximum, tl.max(student, 0))
        total = total * tl.exp(maximum - higher) + tl.exp(student - higher)
        maximum = higher
    lse = maximum + tl.log(tl.sum(total, 0))
    difference, before = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    lower = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + lane
        inside = column < D
        student = tl.load(student_at + column, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.exp(tl.load(teacher_at + column, mask=inside, other=float("-inf")).to(tl.float32) - teacher_lse)
        gap = tl.exp(student - lse) - p
        difference += tl.abs(gap)
        # Where several logits are the highest, the first is the draft's choice.
        before += tl.where((student == maximum) & (column <= favourite), tl.where(column < favourite, 2.0, 1.0), 0.0)
        if LEARN and not REJECTION:
            tl.store(student_at + column, tl.where(counts, gap * weight, 0.0), mask=inside)
        if REJECTION:
            lower += tl.where(gap < 0.0, tl.exp(student - lse), 0.0)
    loss = lse - tl.sum(cross, 0)
    if REJECTION:
        overlap, below = 1.0 - 0.5 * tl.sum(difference, 0), tl.sum(lower, 0)
        share = tl.exp(-DECAY * overlap) if DECAY > 0.0 else 0.0
        loss = share * loss + (1.0 - share) * (1.0 - overlap)
        if LEARN:
            for start in range(0, D, BLOCK):
                column = start + lane
                inside = column < D
                student = tl.load(student_at + column, mask=inside, other=float("-inf")).to(tl.float32)
                p = tl.exp(tl.load(teacher_at + column, mask=inside, other=float("-inf")).to(tl.float32) - teacher_lse)
                q = tl.exp(student - lse)
                gradient = share * (q - p) + (1.0 - share) * q * (below - tl.where(q < p, 1.0, 0.0))
                tl.store(student_at + column, tl.where(counts, gradient * weight, 0.0), mask=inside)
    one = tl.where(counts, 1.0, 0.0)
    tl.store(sums + row * 4, tl.where(counts, loss, 0.0))
    tl.store(sums + row * 4 + 1, one)
    tl.store(sums + row * 4 + 2, tl.where(counts & (tl.sum(before, 0) == 1.0), 1.0, 0.0))
    tl.store(sums + row * 4 + 3, tl.where(counts, 1.0 - 0.5 * tl.sum(difference, 0), 0.0))


def distill(
    z: Tensor, teacher: tuple[Tensor, Tensor, Tensor], teachers: Tensor, weights: Tensor, learn: bool, loss: str
) -> Tensor:
    """Loss of student logits against their teachers'; with `learn` its gradient takes the place of z.

    Args:
        z: student logits, [R, D].
        teacher: of `teach`.
        teachers: row of each student's teacher, int64 [R].
        weights: what the loss of each student counts in the gradient, float32 [R]; 0 for none at all.
        learn: whether z becomes the gradient.
        loss: `kl`, `lk` or `tv`; see eagle3/objective.py.

    Returns:
        Loss, whether it counts, agreement and overlap of each student, float32 [R, 4].
    """
    logits, normaliser, top = teacher
    sums = z.new_empty(len(z), 4, dtype=torch.float32)
    block = min(4096, triton.next_power_of_2(z.shape[1]))
    # Many warps for few rows at once: the second pass over a row finds it in the cache.
    _distill[(len(z),)](
        z, logits, normaliser, top, teachers, weights, sums, z.shape[1], learn, loss != "kl",
        LK_DECAY if loss == "lk" else 0.0, block, num_warps=16,
    )  # fmt: skip
    return sums
