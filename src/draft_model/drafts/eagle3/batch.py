"""Where a padded batch is supervised: every index that the unroll and the loss need, worked out once.

Position t of step i has read the tokens up to x[t+1+i], its teacher is the target at t+1+i, and both speak of
x[t+2+i]. So teacher position p serves step i at t = p-1-i. Nothing here crosses a conversation: each is a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft_model.drafts.eagle3.attention import Rows


@dataclass(frozen=True)
class Batch:
    """Conversations, padded on the right. B conversations of at most T tokens.

    Attributes:
        tokens: int64 [B, T].
        lengths: real tokens of each row, int64 [B].
        predicted: bool [B, T]; True at p where token p+1 is to be learnt (an assistant's), by whichever convention.
    """

    tokens: Tensor
    lengths: Tensor
    predicted: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.lengths.to(device), self.predicted.to(device))

    def narrow(self, start: int, count: int) -> Batch:
        """`count` conversations from `start` on, without the padding they do not need."""
        lengths = self.lengths[start : start + count]
        width = int(lengths.max())
        rows = slice(start, start + count)
        return Batch(self.tokens[rows, :width], lengths, self.predicted[rows, :width])


def collate(conversations: list[tuple[Tensor, Tensor]]) -> Batch:
    """Pads conversations and shifts their loss masks by one.

    Args:
        conversations: token ids int64 [T_b] and loss mask bool [T_b] (True on the assistant's tokens) of each.
    """
    lengths = torch.tensor([len(tokens) for tokens, _ in conversations])
    tokens = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    predicted = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (ids, mask) in enumerate(conversations):
        tokens[row, : len(ids)] = ids
        predicted[row, : len(ids) - 1] = mask[1:]
    return Batch(tokens, lengths, predicted)


@dataclass(frozen=True)
class Plan:
    """The positions of one batch that have work. S = max(T - 2, 1) positions can predict anything at all.

    Attributes:
        steps: unroll length.
        valid: flat positions b * S + t that hold a step-0 key, int64 [P].
        valid_tokens: flat tokens b * T + t + 1 of those, int64 [P].
        rows: the N positions that some step supervises; only they have queries.
        rows_in_valid: where the rows stand among `valid`, int64 [N].
        time: t of each row, int64 [N].
        row_tokens: flat tokens b * T + t + 1 + i of each row and step, clamped to the row's last, int64 [steps, N].
        teachers: flat positions b * T + p that teach, int64 [M], row-major.
        valid_states: where the valid positions stand among the conversations' tokens without padding, int64 [P].
        teacher_states: where the teachers stand there, int64 [M].
        students: for each step and teacher the row that learns from it, -1 for none, int64 [steps, M].
    """

    steps: int
    valid: Tensor
    valid_tokens: Tensor
    rows: Rows
    rows_in_valid: Tensor
    time: Tensor
    row_tokens: Tensor
    teachers: Tensor
    valid_states: Tensor
    teacher_states: Tensor
    students: Tensor


def plan_unroll(batch: Batch, steps: int) -> Plan:
    """Works the indices out.

    Args:
        batch: B conversations.
        steps: unroll length, >= 1.
    """
    device = batch.tokens.device
    size, width = batch.tokens.shape
    span = max(width - 2, 1)  # where no conversation is long enough, one invalid position: kernels need some
    last = batch.lengths.unsqueeze(1) - 1
    position = torch.arange(width, device=device).unsqueeze(0)
    teaching = batch.predicted & (position < last) & (position >= 1)  # [B, T]
    time = torch.arange(span, device=device).unsqueeze(0)
    valid = (time < last - 1).expand(size, span)
    active = torch.zeros(size, span, dtype=torch.bool, device=device)
    for step in range(steps):
        shifted = teaching[:, 1 + step :]
        active[:, : shifted.shape[1]] |= shifted[:, :span]
    flat_valid, flat_rows = valid.flatten().nonzero()[:, 0], active.flatten().nonzero()[:, 0]
    number = torch.full((size * span,), -1, device=device)
    number[flat_rows] = torch.arange(len(flat_rows), device=device)
    row_batch, row_time = flat_rows.div(span, rounding_mode="floor"), flat_rows % span
    ahead = torch.arange(1, steps + 1, device=device).unsqueeze(1)
    teachers = teaching.flatten().nonzero()[:, 0]
    teacher_batch, teacher_time = teachers.div(width, rounding_mode="floor"), teachers % width
    start = teacher_time - ahead  # [steps, M]
    padding = torch.arange(size, device=device) * width - (batch.lengths.cumsum(0) - batch.lengths)  # before each row
    valid_batch, valid_time = flat_valid.div(span, rounding_mode="floor"), flat_valid % span
    students = torch.where(start >= 0, number[(teacher_batch * span + start).clamp(min=0)], -1)
    return Plan(
        steps=steps,
        valid=flat_valid,
        valid_tokens=valid_batch * width + valid_time + 1,
        rows=Rows.of(flat_rows, size, span),
        rows_in_valid=torch.searchsorted(flat_valid, flat_rows),
        time=row_time,
        row_tokens=row_batch * width + (row_time + ahead).clamp(max=width - 1),
        teachers=teachers,
        valid_states=valid_batch * width + valid_time - padding[valid_batch],
        teacher_states=teachers - padding[teacher_batch],
        students=students,
    )
