"""Tokenised conversations on disk: Parquet shards, written in order and read at random.

Row groups are small: whatever its size, a data set costs a reader the memory of one group and 8 bytes a conversation.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.encode import Encoded

GROUP_ROWS = 64
INDEX = "shards.json"
_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Conversation:
    """One tokenised conversation of T tokens."""

    input_ids: NDArray[np.int32]  # [T]
    loss_mask: NDArray[np.bool_]  # [T], true on the assistant's content and end-of-turn tokens


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split."""

    name: str  # in the split's folder
    rows: int
    file: str  # the input file that they come from
    lines_before: int  # lines of that file before those that the shard's column `line` counts


def write_shard(rows: Encoded, path: Path) -> None:
    """Writes one shard; the file's bytes depend on the rows alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.array(np.concatenate([[0], np.cumsum(rows.lengths)]), pa.int32())
    table = pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(rows.ids, pa.int32())),
            "loss_mask": pa.ListArray.from_arrays(offsets, pa.array(rows.mask, pa.bool_())),
            "length": pa.array(rows.lengths, pa.int32()),
            "line": pa.array(rows.numbers, pa.int64()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Token ids repeat too seldom for a dictionary: without one, files are smaller and faster to write.
    pq.write_table(
        table, path, row_group_size=GROUP_ROWS, compression="zstd", use_dictionary=False, write_statistics=False
    )


def write_index(shards: Sequence[Shard], path: Path) -> None:
    """Writes which shards a split has, in order; a folder may hold others, of an earlier build."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(shard) for shard in shards], indent=1) + "\n", encoding="utf-8")


class Split:
    """A split of a built data set, `train` or `validation` of a fetched folder, as a sequence of conversations."""

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        self._shards = [Shard(**shard) for shard in json.loads((folder / INDEX).read_text(encoding="utf-8"))]
        paths = [folder / shard.name for shard in self._shards]
        columns = [pq.read_table(path, columns=["length"])["length"].to_numpy() for path in paths]
        self.lengths = np.concatenate(columns or [np.zeros(0, np.int32)]).astype(np.int64)  # tokens of each row, [rows]
        self._first = np.cumsum([0, *(shard.rows for shard in self._shards)])
        self._open = functools.lru_cache(_OPEN_SHARDS)(lambda shard: pq.ParquetFile(paths[shard], memory_map=True))
        self._group: tuple[tuple[int, int], Any] = ((-1, -1), None)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Conversation:
        _, columns, row = self._row(index)
        ids, mask = columns["input_ids"][row].values, columns["loss_mask"][row].values
        return Conversation(ids.to_numpy().astype(np.int32), mask.to_numpy(zero_copy_only=False).astype(np.bool_))

    def line(self, index: int) -> int:
        """Returns the line of its input file that a conversation comes from."""
        shard, columns, row = self._row(index)
        return int(shard.lines_before + columns["line"][row].as_py())

    def _row(self, index: int) -> tuple[Shard, Any, int]:
        """Returns the shard and row group that have a conversation, and its index in the group."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        group, row = divmod(index - int(self._first[shard]), GROUP_ROWS)
        with self._lock:  # a training reads in two threads
            if self._group[0] != (shard, group):
                table = self._open(shard).read_row_group(group, columns=["input_ids", "loss_mask", "line"])
                self._group = ((shard, group), table.combine_chunks())
            return self._shards[shard], self._group[1], row
