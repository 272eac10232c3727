"""Losses of proposals against their teachers as one Triton kernel; `_distil` in objective.py is its plain form."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32


@triton.jit(do_not_specialize_on_alignment=["teachers", "weights", "sums"])
def _distil(
    z, logits, teachers, weights, sums, V: tl.constexpr, HARD: tl.constexpr, VARIATION: tl.constexpr,
    KL: tl.constexpr, DECAY: tl.constexpr, LEARN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_at, teacher_at = z + row * V, logits + tl.load(teachers + row).to(tl.int64) * V
    lane = tl.arange(0, BLOCK)
    student_max = float("-inf")
    teacher_max = float("-inf")
    student_sum, teacher_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)  # sum of p z
    student_best, teacher_best = (
        tl.full((BLOCK,), float("-inf"), tl.float32),
        tl.full((BLOCK,), float("-inf"), tl.float32),
    )
    favourites, tops = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        column = start + lane
        inside = column < V
        student = tl.load(student_at + column, mask=inside, other=float("-inf")).to(tl.float32)
        teacher = tl.load(teacher_at + column, mask=inside, other=float("-inf")).to(tl.float32)
        favourites = tl.where(student > student_best, column, favourites)
        tops = tl.where(teacher > teacher_best, column, tops)
        student_best, teacher_best = tl.maximum(student_best, student), tl.maximum(teacher_best, teacher)
        higher = tl.maximum(student_max, tl.max(student, 0))
        student_sum = student_sum * tl.exp(student_max - higher) + tl.exp(student - higher)
        student_max = higher
        higher = tl.maximum(teacher_max, tl.max(teacher, 0))
        shrink, share = tl.exp(teacher_max - higher), tl.exp(teacher - higher)
        teacher_sum = teacher_sum * shrink + share
        cross = cross * shrink + tl.where(inside, share * student, 0.0)
        teacher_max = higher
    student_lse = student_max + tl.log(tl.sum(student_sum, 0))
    teacher_all = tl.sum(teacher_sum, 0)
    teacher_lse = teacher_max + tl.log(teacher_all)
    # Where several logits are the highest, the first is the choice; of no numbers there is none.
    favourite = tl.min(tl.where(student_best == student_max, favourites, V - 1), 0)
    top = tl.min(tl.where(teacher_best == teacher_max, tops, V - 1), 0)
    overlaps, lower = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + lane
        inside = column < V
        q = tl.exp(tl.load(student_at + column, mask=inside, other=float("-inf")).to(tl.float32) - student_lse)
        p = tl.exp(tl.load(teacher_at + column, mask=inside, other=float("-inf")).to(tl.float32) - teacher_lse)
        overlaps += tl.minimum(p, q)
        lower += tl.where(q < p, q, 0.0)
    overlap = tl.sum(overlaps, 0)
    far = tl.exp(-DECAY * overlap)
    hard = HARD
    variation = 1.0 - far if DECAY > 0.0 else VARIATION
    kl = far if DECAY > 0.0 else KL
    chosen = tl.load(student_at + top).to(tl.float32)
    soft = tl.sum(cross, 0) / teacher_all
    loss = hard * (student_lse - chosen) + variation * (1.0 - overlap) + kl * (student_lse - soft)
    tl.store(sums + row * 4, loss)
    tl.store(sums + row * 4 + 1, tl.where(favourite == top, 1.0, 0.0))
    tl.store(sums + row * 4 + 2, overlap)
    tl.store(sums + row * 4 + 3, tl.exp(chosen - student_lse))
    if LEARN:
        weight = tl.load(weights + row)
        of_all = hard + kl + variation * tl.sum(lower, 0)
        for start in range(0, V, BLOCK):
            column = start + lane
            inside = column < V
            q = tl.exp(tl.load(student_at + column, mask=inside, other=float("-inf")).to(tl.float32) - student_lse)
            p = tl.exp(tl.load(teacher_at + column, mask=inside, other=float("-inf")).to(tl.float32) - teacher_lse)
            gradient = q * (of_all - tl.where(q < p, variation, 0.0)) - kl * p - tl.where(column == top, hard, 0.0)
            tl.store(student_at + column, weight * gradient, mask=inside)


def distil(
    z: Tensor, logits: Tensor, teachers: Tensor, weights: Tensor, learn: bool, parts: tuple[float, ...], decay: float
) -> Tensor:  # fmt: skip
    """Loss of each proposal; with `learn` its gradient, `weights` (float32 [C]) times, takes the place of z.

    Args:
        z: the draft's logits, [C, V].
        logits: the target's, [M, V].
        teachers: row in `logits` of each proposal, int64 [C].
        weights: of the proposals in the gradient.
        learn: whether z becomes the gradient.
        parts: weights of hard cross-entropy, total variation and soft cross-entropy.
        decay: where not 0, KL counts exp(-decay alpha) and total variation the rest.

    Returns:
        Loss, agreement (0 or 1), alpha, and the draft's probability of the target's favourite, float32 [C, 4].
    """
    count, vocabulary = z.shape
    sums = z.new_empty(count, 4, dtype=float32)
    block = min(4096, triton.next_power_of_2(vocabulary))
    # Many warps for few rows at once: the later passes over a row find it in the cache.
    _distil[(count,)](z, logits, teachers, weights, sums, vocabulary, *parts, decay, learn, block, num_warps=16)
    return sums
