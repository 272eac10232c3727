"""Where a batch is supervised: every index that the unroll and the loss need, worked out once, on the host.

Position t of step i has read the tokens up to x[t+1+i], its teacher is the target at t+1+i, and both speak of
x[t+2+i]. So teacher position p serves step i at t = p-1-i. Conversations are packed one after the other without
padding, and nothing here crosses from one to the next. All of it is known from lengths and masks alone, so a GPU never
has to be asked how many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft_model.drafts.batch import Batch
from draft_model.drafts.counts import Replies


@dataclass(frozen=True)
class Windows:
    """Which positions hold a step-0 key, and which of them a query. P_b = max(T_b - 2, 0) keys per conversation.

    A conversation's window begins at its first query and ends with its last key, so that queries and keys are aligned
    at the end, as variable-length flash attention wants them. A conversation of which no position has a query gets a
    window of one.
    """

    conversation: Tensor  # of each key, int64 [P]
    key_time: Tensor  # t of each key, int64 [P]
    row_conversation: Tensor  # of each query, int64 [N]
    row_time: Tensor  # t of each query, int64 [N]
    places: Tensor  # where the queries stand in the packed windows, int64 [N]
    query_starts: Tensor  # where each window begins, and the last one's end, int64 [conversations with keys + 1]
    key_starts: Tensor  # likewise of the keys
    batch: int  # B
    first: int  # no conversation has a query before this t
    longest_query: int  # longest window
    longest_key: int  # most keys of a conversation
    size: int  # positions of all windows, W
    square: bool  # whether attention of all padded conversations at twice the speed would be the sooner done

    @property
    def dense(self) -> bool:
        """Whether every position of the windows has a query."""
        return self.size == len(self.places)


@dataclass(frozen=True)
class Plan:
    """The positions of one batch that have work. T: tokens of all conversations, packed."""

    steps: int  # unroll length
    tokens: Tensor  # token ids, int64 [T]
    keys: Tensor  # packed positions that hold a step-0 key, int64 [P]
    rows: Tensor  # where the N positions with a query stand among the keys, int64 [N]
    # packed token that each row reads at each step, -1 past the conversation's end, int64 [steps, N]
    row_tokens: Tensor
    teachers: Tensor  # packed positions that teach, int64 [M]
    students: Tensor  # for each step and teacher the row that learns from it, -1 for none, int64 [steps, M]
    teacher_of: Tensor  # for each step and row its teacher among the M, -1 for none, int64 [steps, N]
    replies: Replies  # of the rows; a reply's first token is the target's own, so no round starts before its second row
    windows: Windows  # for the attention

    @property
    def everywhere(self) -> bool:
        """Whether every key has a query."""
        return len(self.rows) == len(self.keys)


def plan_unroll(batch: Batch, steps: int) -> Plan:
    """Works the indices out for so many steps, at least one."""
    size, width = batch.tokens.shape
    span = max(width - 2, 1)
    lengths = batch.lengths
    last = lengths.unsqueeze(1) - 1
    starts = lengths.cumsum(0) - lengths  # of the conversations, packed
    position = torch.arange(width).unsqueeze(0)
    teaching = batch.predicted & (position < last) & (position >= 1)  # [B, T]
    active = torch.zeros(size, span, dtype=torch.bool)
    for step in range(steps):
        shifted = teaching[:, 1 + step :]
        active[:, : shifted.shape[1]] |= shifted[:, :span]
    key_batch, key_time = (position[:, :span] < last - 1).expand(size, span).nonzero(as_tuple=True)
    row_batch, row_time = active.nonzero(as_tuple=True)
    teacher_batch, teacher_time = teaching.nonzero(as_tuple=True)
    number = torch.full((size, span), -1)
    number[row_batch, row_time] = torch.arange(len(row_time))
    ahead = torch.arange(1, steps + 1).unsqueeze(1)
    reads = row_time + ahead  # [steps, N]
    start = teacher_time - ahead  # [steps, M]
    students = torch.where(start >= 0, number[teacher_batch, start.clamp(min=0)], -1)
    teacher_of = torch.full((steps, len(row_time)), -1)
    step_of, place = (students >= 0).nonzero(as_tuple=True)
    teacher_of[step_of, students[step_of, place]] = place
    keys, placed = starts[key_batch] + key_time, starts[row_batch] + row_time
    begins = (teacher_of[0] >= 0).nonzero()[:, 0]
    reply = placed[begins] - torch.arange(len(begins))  # alike for neighbours
    follows = torch.zeros(len(begins), dtype=torch.bool)
    follows[1:] = reply[1:] == reply[:-1]
    return Plan(
        steps=steps,
        tokens=batch.tokens[position < lengths.unsqueeze(1)],
        keys=keys,
        rows=torch.searchsorted(keys, placed),
        row_tokens=torch.where(reads < lengths[row_batch], starts[row_batch] + reads, -1),
        teachers=starts[teacher_batch] + teacher_time,
        students=students,
        teacher_of=teacher_of,
        replies=Replies.of(begins[follows], reply[follows]),
        windows=_windows(lengths, key_batch, key_time, row_batch, row_time),
    )


def _windows(
    lengths: Tensor, key_batch: Tensor, key_time: Tensor, row_batch: Tensor, row_time: Tensor
) -> Windows:  # fmt: skip
    counts = (lengths - 2).clamp(min=0)
    first = (counts - 1).clamp(min=0).scatter_reduce(0, row_batch, row_time, "amin")
    sizes = counts - first
    starts = sizes.cumsum(0) - sizes
    have = counts > 0
    return Windows(
        conversation=key_batch,
        key_time=key_time,
        row_conversation=row_batch,
        row_time=row_time,
        places=starts[row_batch] + row_time - first[row_batch],
        query_starts=torch.cat((torch.zeros(1, dtype=torch.int64), sizes[have].cumsum(0))),
        key_starts=torch.cat((torch.zeros(1, dtype=torch.int64), counts[have].cumsum(0))),
        batch=len(lengths),
        first=int(row_time.min()) if len(row_time) else 0,
        longest_query=int(sizes.max()),
        longest_key=int(counts.max()),
        size=int(sizes.sum()),
        square=bool(len(counts) * counts.max() ** 2 <= 2 * (counts**2 - first**2).sum()) and int(counts.max()) >= 1024,
    )
