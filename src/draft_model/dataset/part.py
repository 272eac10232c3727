"""Encodes pieces of the input, and leaves each in the output folder as it is done: shard first, then its counts.

The counts make a piece whole. What is whole is never built again: after a kill, or where another pod did it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.dataset.encode import Encoded, Encoder, Encoders, usable_processes
from draft_model.dataset.inputs import Inputs
from draft_model.dataset.pieces import Reader, Source, share
from draft_model.dataset.reader import Line, chunks
from draft_model.dataset.tally import Tally, to_bytes
from draft_model.dataset.tokens import ShardWriter
from draft_model.storage import growing
from draft_model.storage.manifest import FileRecord

COUNTS = "pieces"
"""Folder of the counts, until the data set is whole."""


@dataclass(frozen=True)
class _Place:
    """Where a chunk belongs; the last one of a piece has no rows and says how the piece ended."""

    source: Source
    number: int
    lines: int = -1
    at_end: bool = False

    @property
    def name(self) -> str:
        return self.source.piece(self.number)


def counts_name(source: Source, number: int) -> str:
    """Where the counts of a piece are, in the output folder."""
    return f"{COUNTS}/{source.split}-{source.piece(number)}.json"


def read_counts(output: str, source: Source, number: int) -> dict[str, Any] | None:
    """The counts of a piece, where it is whole.

    Args:
        output: URI of the data set's folder.
        source: the file.
        number: of the piece.
    """
    data = growing.read(storage.join(output, counts_name(source, number)))
    counts: dict[str, Any] | None = None if data is None else json.loads(data)
    return counts


def encode(encoder: Encoder, inputs: Inputs, output: str, work: Path, processes: int, part: int, parts: int) -> None:
    """Builds the pieces of one part that are not whole yet.

    Args:
        encoder: of the target's tokenizer.
        inputs: all that the stage reads.
        output: URI of the data set's folder.
        work: local folder for the pieces that are being written.
        processes: how many to encode on, if there are so many cores.
        part: which part, from 0.
        parts: how many parts there are.

    Raises:
        DraftModelError: a file cannot be read, or the output refuses.
    """
    mine = share(inputs.sources, part, parts)
    missing = [(source, numbers) for source, units in mine if (numbers := _missing(output, source, units)) is not None]
    if not missing:
        return
    size = sum(source.file.size for source, _ in missing) // parts
    with Encoders(encoder, usable_processes(processes, size)) as encoders:
        piece: _Piece | None = None
        for place, rows in _with_progress(encoders.map(_chunks(missing, output))):
            piece = piece or _Piece(place, encoder, work)
            if place.lines < 0:
                piece.add(rows)
            else:
                piece.finish(place, output)
                piece = None


def _missing(output: str, source: Source, units: range | None) -> Sequence[int] | None:
    """Pieces that are not whole; of a compressed file, whose end is not known, an empty list for "read on"."""
    if units is not None:
        return [number for number in units if read_counts(output, source, number) is None] or None
    number = 0
    while (counts := read_counts(output, source, number)) is not None:
        if counts["at_end"]:
            return None
        number += 1
    return []


def _chunks(missing: Sequence[tuple[Source, Sequence[int]]], output: str) -> Iterator[tuple[_Place, Sequence[Line]]]:
    for source, numbers in missing:
        reader = Reader(source)
        if numbers:
            for number in numbers:
                yield from _piece_chunks(source, number, reader)
            continue
        number = 0
        while not reader.at_end:
            if read_counts(output, source, number) is None:
                yield from _piece_chunks(source, number, reader)
            else:
                for _ in reader.read(number):
                    pass
            number += 1


def _piece_chunks(source: Source, number: int, reader: Reader) -> Iterator[tuple[_Place, Sequence[Line]]]:
    for chunk in chunks(reader.read(number)):
        yield _Place(source, number), chunk
    yield _Place(source, number, reader.lines, reader.at_end), []


class _Piece:
    """A piece that is being written."""

    def __init__(self, place: _Place, encoder: Encoder, work: Path) -> None:
        self._shard = work / f"{place.source.split}-{place.name}.parquet"
        self._tally = Tally.empty(encoder.settings.vocab_size, encoder.settings.max_length)
        self._rejected: list[tuple[int, str, str]] = []
        self._closing = ExitStack()
        self._writer = self._closing.enter_context(ShardWriter(self._shard))

    def add(self, rows: Encoded) -> None:
        self._tally.add(rows)
        self._writer.add(rows)
        self._rejected += rows.rejected

    def finish(self, place: _Place, output: str) -> None:
        self._closing.close()
        record: FileRecord | None = None
        if self._writer.rows:
            record = growing.add(output, f"{place.source.split}/{place.name}.parquet", self._shard)
            self._shard.unlink()
        counts = {
            **self._tally.to_json(),
            "rows": self._writer.rows,
            "rejected": self._rejected,
            "lines": place.lines,
            "at_end": place.at_end,
            "shard": None if record is None else asdict(record),
        }
        storage.write_bytes(storage.join(output, counts_name(place.source, place.number)), to_bytes(counts))


def _with_progress(encoded: Iterator[tuple[_Place, Encoded]]) -> Iterator[tuple[_Place, Encoded]]:
    from tqdm import tqdm

    # In a log file every refresh is a line.
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(desc="dataset", unit=" rows", unit_scale=True, mininterval=interval) as bar:
        for place, rows in encoded:
            yield place, rows
            bar.update(len(rows.lengths) + len(rows.rejected))
