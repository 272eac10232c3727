"""Small tensors from the host to a GPU, without a wait for either."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

BUFFERS = 8  # transfers that may be on their way at once


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
