"""The frozen target's states, computed in the first epoch and kept on disk for the later ones where there is room.

On a CPU the target's forward pass is half of a step, so a second epoch from kept states takes about half the time; on a
GPU computing them anew outruns a disk.

The last bits of a state depend on what else is in the target's batch. So the plan alone says which conversations go
through the target together, and a training that is resumed computes the very states that it would have kept.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

DISK_SHARE = 0.5  # of the free disk that kept states may take


class StateStore:
    """States by conversation.

    Args:
        folder: where the file goes.
        lengths: tokens of each conversation, int64 [C].
        width: numbers per token, of `Shape.state_width`.
        dtype: of the states.
        epochs: how often each conversation is needed; 1 keeps nothing.
        device: of the target.
        groups: for each conversation those that go through the target with it, itself included.
    """

    def __init__(
        self,
        folder: Path,
        lengths: NDArray[np.int64],
        width: int,
        dtype: torch.dtype,
        epochs: int,
        device: torch.device,
        groups: Mapping[int, tuple[int, ...]],
    ) -> None:
        self._starts = np.concatenate(([0], np.cumsum(lengths)))
        self._have = np.zeros(len(lengths), dtype=bool)
        self._kept: Tensor | None = None
        self.device = device
        self._groups = groups
        size = int(self._starts[-1]) * width * dtype.itemsize
        if epochs < 2 or device.type != "cpu":
            return
        if size > DISK_SHARE * shutil.disk_usage(folder).free:
            logger.info("target states of %.1f GB do not fit on disk: every epoch computes them anew", size / 1e9)
            return
        logger.info("target states are kept for the later epochs: %.1f GB in %s", size / 1e9, folder)
        path = folder / "target_states.bin"
        with path.open("wb") as file:
            file.truncate(size)
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; in the mapped file, SIGBUS
        shape = (int(self._starts[-1]), width)
        self._kept = torch.from_file(str(path), shared=True, size=shape[0] * width, dtype=dtype).view(shape)

    @property
    def keeps(self) -> bool:
        """Whether there is a file; otherwise nothing can be had from here."""
        return self._kept is not None

    def get(self, conversations: NDArray[np.int64], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """States of some conversations.

        Args:
            conversations: indices.
            compute: gives the states of those that are missing, which are then kept.

        Returns:
            [T_b, width] of each.
        """
        assert self._kept is not None
        missing = [index for index in conversations.tolist() if not self._have[index]]
        for group in dict.fromkeys(self._groups[index] for index in missing):
            for index, states in zip(group, compute(list(group)), strict=True):
                self._kept[self._starts[index] : self._starts[index + 1]] = states
                self._have[index] = True
        return [self._kept[self._starts[index] : self._starts[index + 1]] for index in conversations]
