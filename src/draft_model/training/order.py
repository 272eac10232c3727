"""Which conversations each optimizer step sees: a plan from the seed alone, so any step can be found again.

Every epoch is a seeded permutation, cut into global batches of like length (padding is work that teaches nothing) and
shuffled once more. Conversations too few for a last batch open the next epoch; the plan knows nothing of ranks, so it
is the same for every world size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

POOL_BATCHES = 16  # like lengths are sought among so many batches; more would pad less and mix less


@dataclass(frozen=True)
class Step:
    """One optimizer step's conversations."""

    epoch: int  # counted from 0
    last_of_epoch: bool  # whether the epoch ends with it
    conversations: NDArray[np.int64]  # indices into the training split, longest first


def total_steps(conversations: int, global_batch: int, epochs: int) -> int:
    """Steps of a number of epochs; at most the last global_batch - 1 conversations fill none."""
    return conversations * epochs // global_batch


def plan_steps(lengths: NDArray[np.int64], global_batch: int, seed: int) -> Iterator[Step]:
    """All steps of a seed, epoch after epoch, without end, from the conversations' lengths in tokens.

    A global batch is at most all conversations, so that every epoch has a step.
    """
    carried = np.empty(0, dtype=np.int64)
    epoch = 0
    while True:
        random = np.random.default_rng((seed, epoch))
        stream = np.concatenate((carried, random.permutation(len(lengths))))
        whole = len(stream) // global_batch * global_batch
        carried = stream[whole:]
        batches = [
            batch
            for pool in np.array_split(
                stream[:whole], range(global_batch * POOL_BATCHES, whole, global_batch * POOL_BATCHES)
            )
            for batch in pool[np.argsort(-lengths[pool], kind="stable")].reshape(-1, global_batch)
        ]
        for place, batch in enumerate(random.permutation(len(batches))):
            yield Step(epoch, place == len(batches) - 1, batches[batch])
        epoch += 1


def draw_keys(seed: int, step: int, conversations: Iterable[int]) -> list[int]:
    """Seeds for what an objective draws for each conversation in a step (counted from 1; 0: in a validation)."""
    names = (f"{seed} {step} {int(index)}".encode() for index in conversations)
    return [int.from_bytes(blake2b(name, digest_size=8).digest()) >> 1 for name in names]
