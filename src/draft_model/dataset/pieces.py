"""An input in pieces: the unit of resuming, of sharing work among pods, and of the shards that come out.

A piece is the lines that begin in one stretch of PIECE_BYTES of a file, counted after decompression. So where pieces
begin and end depends on the file alone, and whoever builds one, in whatever order, makes the same bytes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from draft_model.dataset.files import File, damage_told
from draft_model.dataset.reader import Line

PIECE_BYTES = 32 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One file of a split.

    Attributes:
        split: `train` or `validation`.
        place: of the file in its split, from 0.
        name: the parameter and the file, for messages.
        file: the file.
        identity: changes with its content, and with all else that shapes what is made of it.
    """

    split: str
    place: int
    name: str
    file: File
    identity: str

    def piece(self, number: int) -> str:
        """Name of what one piece becomes; another for any other content or settings."""
        key = hashlib.sha256(json.dumps([self.identity, PIECE_BYTES, number]).encode()).hexdigest()
        return f"part-{self.place:05d}-{number:05d}-{key[:12]}"

    def count(self) -> int | None:
        """How many pieces there are; None where only reading the compressed file can tell."""
        return None if self.file.is_compressed() else max(1, -(-self.file.size // PIECE_BYTES))


class Reader:
    """Reads pieces of one file, in rising order.

    Args:
        source: the file.

    Attributes:
        lines: of the piece that was read last, blank ones included.
        at_end: whether the file ends with it.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._count = source.count()
        self._stream: BinaryIO | None = None
        self._offset = 0
        self._next = b""
        self.lines = 0
        self.at_end = False

    def read(self, number: int) -> Iterator[Line]:
        """The piece's lines that are not blank, numbered within the piece from 1.

        Raises:
            DraftModelError: the file cannot be read or decompressed.
        """
        start, end = number * PIECE_BYTES, (number + 1) * PIECE_BYTES
        with damage_told(self._source.name):
            self._go_to(start)
            self.lines = 0
            while self._next and self._offset < end:
                self.lines += 1
                line = self._next.removeprefix(_BOM) if self._offset == 0 else self._next
                self._advance()
                if line.strip():
                    yield self.lines, line
            self.at_end = not self._next if self._count is None else number == self._count - 1

    def _go_to(self, start: int) -> None:
        if self._stream is None or (self._count is not None and self._offset < start):
            # One byte before, so that a line which begins right there is told from the rest of another.
            self._offset = max(0, start - 1) if self._count is not None else 0
            self._stream = self._source.file.open(self._offset)
            self._next = self._stream.readline()
        while self._next and self._offset < start:
            self._advance()

    def _advance(self) -> None:
        assert self._stream is not None
        self._offset += len(self._next)
        self._next = self._stream.readline()


def share(sources: Sequence[Source], part: int, parts: int) -> list[tuple[Source, range | None]]:
    """What one of several pods builds: neighbouring pieces, alike in bytes.

    Args:
        sources: all files.
        part: which pod, from 0.
        parts: how many pods.

    Returns:
        Files with the pieces of each; None for all of a compressed file, which only one pod can read.
    """
    units: list[tuple[Source, int | None, int]] = []
    for source in sources:
        count = source.count()
        if count is None:
            units.append((source, None, source.file.size))
        else:
            units += [
                (source, number, min(PIECE_BYTES, max(1, source.file.size - number * PIECE_BYTES)))
                for number in range(count)
            ]
    total = sum(size for *_, size in units)
    mine: list[tuple[Source, range | None]] = []
    before = 0
    for source, unit, size in units:
        if (before + size // 2) * parts // max(1, total) == part:
            if unit is None:
                mine.append((source, None))
            elif mine and mine[-1][0] is source and (last := mine[-1][1]) is not None:
                mine[-1] = (source, range(last.start, unit + 1))
            else:
                mine.append((source, range(unit, unit + 1)))
        before += size
    return mine
