"""The processes of a training job, who trains on what, and what they tell each other: sums, and no more.

world = dp x tp, tensor-parallel neighbours side by side: process r stands at (r // tp, r % tp). The tp processes of a
group hold one copy of the target between them and run it together on the group's conversations; each of them then
trains the draft on its own share, so no process repeats another's work.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh


class PeerLost(Exception):
    """Another process of the job is gone or does not answer; that one's own log says why."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int  # of this process, from 0
    world: int  # processes
    device: torch.device  # where this one computes
    tp: int = 1  # processes that hold one copy of the target between them
    mesh: DeviceMesh | None = None  # all of them, of dimensions dp and tp; None where this process is alone

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: logs, checkpoints, uploads."""
        return self.rank == 0

    @property
    def dp(self) -> int:
        """How many copies of the target there are."""
        return self.world // self.tp

    def share(self, conversations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of a step's conversations that this process trains on."""
        return conversations[self.rank :: self.world]

    def group_share(self, conversations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those that this process's copy of the target reads; every tp-th of them is this process's own."""
        place = np.arange(len(conversations)) % self.world
        of_group: NDArray[np.bool_] = place // self.tp == self.rank // self.tp
        return conversations[of_group]

    def largest_group_share(self, conversations: int) -> int:
        """How many of so many conversations the copy that reads most of them reads."""
        return conversations // self.world * self.tp + min(conversations % self.world, self.tp)

    def owns(self, place: int) -> bool:
        """Whether the conversation at this place of `group_share` is this process's own."""
        return place % self.tp == self.rank % self.tp

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all processes, in place where it is on this process's device."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def barrier(self) -> None:
        """Waits until every process has come here."""
        self.any(False)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, all of one shape, in the order of the ranks."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.world)]
        distributed.all_gather(parts, tensor.to(self.device))
        return [part.cpu() for part in parts]


def hardware(device: torch.device) -> str:
    """What a process computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


@contextmanager
def start_ranks(timeout: timedelta, tp: int = 1) -> Iterator[Ranks]:
    """Joins the other processes that torchrun started; without torchrun, this one is alone.

    `tp` of them hold one copy of the target. A collective that takes longer than `timeout` ends the job.

    Raises:
        PeerLost: when another process ended, or did not come to a collective within the time-out.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(rank, world, device)
        return
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        # DeviceMesh would make groups with PyTorch's own time-out; every process must take part in making each group.
        copies = [distributed.new_group(list(range(place, world, tp)), timeout) for place in range(tp)]
        groups = [distributed.new_group(list(range(first, first + tp)), timeout) for first in range(0, world, tp)]
        own, places = [copies[rank % tp], groups[rank // tp]], torch.arange(world).view(-1, tp)
        mesh = DeviceMesh.from_group(own, device.type, mesh=places, mesh_dim_names=("dp", "tp"))
        yield Ranks(rank, world, device, tp, mesh)
    except RuntimeError as error:
        if not is_a_peers(error):
            raise
        raise PeerLost(str(error).splitlines()[0]) from error
    # Not on an error: the connections close with the process, so that its message is out before others notice.
    distributed.destroy_process_group()


def is_a_peers(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process; gloo raises a plain RuntimeError then."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)
