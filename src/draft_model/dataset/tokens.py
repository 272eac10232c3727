"""Tokenised conversations on disk: Parquet shards, written in order and read at random.

A row is one conversation. Row groups are small, so that reading one conversation decodes a few dozen and no
more: a data set of any size costs a reader the memory of one group and 8 bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.encode import Encoded

SHARD_ROWS = 10_240
GROUP_ROWS = 64
_LAST = {b"last": b"true"}


def _shard(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


@dataclass(frozen=True)
class Conversation:
    """One tokenised conversation of T tokens.

    Attributes:
        input_ids: int32 [T].
        loss_mask: bool [T], true on the assistant's content and end-of-turn tokens.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


class ShardWriter:
    """Writes `part-00000.parquet`, `part-00001.parquet`, ... of exactly SHARD_ROWS rows but for the last.

    Rows arrive in any portions; files depend on the rows alone. The last file says that it is: a folder may
    still hold later shards of an earlier, longer data set. A context manager.

    Args:
        folder: where the shards go; it is made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._waiting: Any = None
        self._file: Any = None
        self._in_file = 0
        self._shards = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None and self._waiting is not None and self._waiting.num_rows:
            self._write(self._waiting)
        if self._file is not None:
            if kind is None:
                self._file.add_key_value_metadata(_LAST)
            self._file.close()

    def add(self, rows: Encoded) -> None:
        """Appends one chunk's kept rows."""
        import pyarrow as pa

        if not len(rows.lengths):
            return
        offsets = pa.array(np.concatenate([[0], np.cumsum(rows.lengths)]), pa.int32())
        table = pa.table(
            {
                "input_ids": pa.ListArray.from_arrays(offsets, pa.array(rows.ids, pa.int32())),
                "loss_mask": pa.ListArray.from_arrays(offsets, pa.array(rows.mask, pa.bool_())),
                "length": pa.array(rows.lengths, pa.int32()),
                "line": pa.array(rows.numbers, pa.int64()),
            }
        )
        if self._waiting is not None:
            table = pa.concat_tables([self._waiting, table]).combine_chunks()
        whole = table.num_rows // GROUP_ROWS * GROUP_ROWS
        for start in range(0, whole, GROUP_ROWS):
            self._write(table.slice(start, GROUP_ROWS))
        self._waiting = table.slice(whole)

    def _write(self, group: Any) -> None:
        import pyarrow.parquet as pq

        if self._in_file == SHARD_ROWS:
            self._file.close()
            self._file, self._in_file = None, 0
            self._shards += 1
        if self._file is None:
            self._file = pq.ParquetWriter(_shard(self._folder, self._shards), group.schema, compression="zstd")
        self._file.write_table(group)
        self._in_file += group.num_rows


class Split:
    """A split of a built data set, as a sequence of conversations.

    Args:
        folder: the local folder of the split's shards: `train` or `validation` of a fetched data set.

    Raises:
        FileNotFoundError: a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        self._files = [pq.ParquetFile(_shard(folder, 0), memory_map=True)]
        while not _LAST.items() <= self._files[-1].metadata.metadata.items():
            self._files.append(pq.ParquetFile(_shard(folder, len(self._files)), memory_map=True))
        columns = [file.read(columns=["length"])["length"].to_numpy() for file in self._files]
        self._lengths = np.concatenate(columns).astype(np.int64)
        self._first = np.cumsum([0, *(len(column) for column in columns)])
        self._held: tuple[tuple[int, int], Any] | None = None

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each conversation, int64 [rows]."""
        return self._lengths

    def __getitem__(self, index: int) -> Conversation:
        if not -len(self) <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        group, row = divmod(index - int(self._first[shard]), GROUP_ROWS)
        if self._held is None or self._held[0] != (shard, group):
            table = self._files[shard].read_row_group(group, columns=["input_ids", "loss_mask"])
            self._held = ((shard, group), table.combine_chunks())
        columns = self._held[1]
        ids, mask = columns["input_ids"][row].values, columns["loss_mask"][row].values
        return Conversation(ids.to_numpy().astype(np.int32), mask.to_numpy(zero_copy_only=False).astype(np.bool_))
