"""Conversations as every draft's loss and the target read them, and their way to a GPU, without a wait for either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

BUFFERS = 8  # transfers that may be on their way at once

Record = TypeVar("Record")


@dataclass(frozen=True)
class Batch:
    """Conversations, padded on the right. B conversations of at most T tokens; on the host."""

    tokens: Tensor  # int64 [B, T]
    lengths: Tensor  # real tokens of each row, int64 [B]
    # bool [B, T]; True at p where token p+1 is to be learnt (an assistant's), by whichever convention
    predicted: Tensor
    # seeds for what an objective draws at random for a conversation, int64 [B]. They depend on the run's seed, the step
    # and the conversation alone, so draws differ from epoch to epoch but not with the split of a batch over processes
    # and micro-batches, nor after a resume.
    keys: Tensor

    def narrow(self, start: int, count: int) -> Batch:
        """`count` conversations from `start` on, without the padding they do not need."""
        rows = slice(start, start + count)
        width = int(self.lengths[rows].max())
        return Batch(self.tokens[rows, :width], self.lengths[rows], self.predicted[rows, :width], self.keys[rows])


def collate(conversations: Sequence[tuple[Tensor, Tensor]], keys: Sequence[int] | None = None) -> Batch:
    """Pads conversations and shifts their loss masks by one.

    Args:
        conversations: token ids int64 [T_b] and loss mask bool [T_b] (True on the assistant's tokens) of each.
        keys: of `Batch`; 0, 1, ... where not given.
    """
    lengths = torch.tensor([len(tokens) for tokens, _ in conversations])
    tokens = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    predicted = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (ids, mask) in enumerate(conversations):
        tokens[row, : len(ids)] = ids
        predicted[row, : len(ids) - 1] = mask[1:]
    return Batch(tokens, lengths, predicted, torch.tensor(range(len(lengths)) if keys is None else keys))


@dataclass
class _Staging:
    """Pinned memory that transfers of one type take turns in. New pinned memory would make the GPU finish its work."""

    dtype: torch.dtype
    buffers: list[Tensor] = field(default_factory=list)
    events: list[torch.cuda.Event] = field(default_factory=list)
    turn: int = 0

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        if not self.buffers or len(self.buffers[0]) < tensor.numel():
            size = max(2 * tensor.numel(), 1 << 16)
            self.buffers = [torch.empty(size, dtype=self.dtype, pin_memory=True) for _ in range(BUFFERS)]
            self.events = [torch.cuda.Event() for _ in range(BUFFERS)]
        self.turn = (self.turn + 1) % BUFFERS
        self.events[self.turn].synchronize()  # of BUFFERS transfers ago
        part = self.buffers[self.turn][: tensor.numel()].copy_(tensor.flatten())
        sent = part.to(device, non_blocking=True)
        self.events[self.turn].record()
        return sent.view(tensor.shape)


_STAGING: dict[torch.dtype, _Staging] = {}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on another device."""
    if device.type == "cpu":
        return tensor
    return _STAGING.setdefault(tensor.dtype, _Staging(tensor.dtype)).send(tensor, device)


def move(record: Record, device: torch.device) -> Record:
    """A record with its tensors, int64 or bool, and those of records in it on another device, by one transfer."""
    tensors: list[Tensor] = []
    _map_tensors(record, tensors.append)
    if tensors[0].device == device:
        return record
    flat = to_device(torch.cat([tensor.flatten().long() for tensor in tensors]), device)
    parts = iter(flat.split([tensor.numel() for tensor in tensors]))
    moved: Record = _map_tensors(record, lambda tensor: next(parts).view(tensor.shape).to(tensor.dtype))
    return moved


def _map_tensors(record: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(record, Tensor):
        return change(record)
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{name: _map_tensors(value, change) for name, value in vars(record).items()})
    return record
