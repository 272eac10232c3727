"""The draft vocabulary: the D target tokens that are supervised most often, a row each in the draft's lm_head.

`t2d` says which target tokens those are; `d2t` leads back, as an OFFSET: target id = draft id + d2t[draft id]. Counts,
int64 [V], say how often each target token is supervised.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

FILE = "vocabulary.safetensors"


def choose(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Picks the `size` most frequent target ids, of equal ones the lower: int64 [D], ascending."""
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int64)


def coverage(counts: NDArray[np.int64], ids: NDArray[np.int64]) -> float:
    """Returns the share of supervised tokens that lies in a vocabulary (ids, int64 [D])."""
    return round(float(counts[ids].sum() / max(1, counts.sum())), 6)


def coverage_by_size(train: NDArray[np.int64], validation: NDArray[np.int64] | None) -> list[dict[str, Any]]:
    """Returns what vocabularies of other sizes, powers of two from 1,024 and V, chosen from `train` would cover."""
    counts = {"train": train, "validation": validation}
    sizes = [*(1 << power for power in range(10, 31) if 1 << power < len(train)), len(train)]
    return [
        {"size": size, **{split: None if of is None else coverage(of, ids) for split, of in counts.items()}}
        for size in sizes
        for ids in [choose(train, size)]
    ]


def save_vocabulary(ids: NDArray[np.int64], vocab_size: int, path: Path) -> None:
    """Writes `t2d` bool [V] and `d2t` int64 [D] for ascending target ids, int64 [D]."""
    from safetensors.numpy import save_file

    t2d = np.zeros(vocab_size, np.bool_)
    t2d[ids] = True
    save_file({"t2d": t2d, "d2t": ids - np.arange(len(ids))}, path)


def load_vocabulary(path: Path) -> tuple[Tensor, Tensor]:
    """Reads t2d, bool [V], and d2t, int64 [D], from the file or the data set's folder."""
    from safetensors.torch import load_file

    tensors = load_file(path / FILE if path.is_dir() else path)
    return tensors["t2d"], tensors["d2t"]
