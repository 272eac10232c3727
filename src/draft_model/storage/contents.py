"""Files to publish that need not lie on this disk: read in pieces, wherever they are.

A content knows its size and a stamp that changes when its bytes do, so that a transfer can be gone on with. What
is made of others (a shard of a larger file, a generated index) is a content too, and moves no byte by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from draft_model.errors import DraftModelError
from draft_model.storage.manifest import sha256_of
from draft_model.storage.transfer import local_errors
from draft_model.storage.uri import check_name, parse

Reader = Callable[[int, int], bytes]
"""Gives the bytes from an offset on, as many as it is told; may be called by several threads."""
_DEPTHS = ("*", "*/*", "*/*/*")
"""A user's folder is looked into no deeper than this."""
_STEP = 8 * 2**20


class Content(Protocol):
    """The bytes of one file."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def stamp(self) -> str:
        """Changes when the bytes do; cheap to know."""

    @property
    def sha256(self) -> str:
        """Of the bytes, where it is known beforehand; else empty."""

    @property
    def on_disk(self) -> int:
        """Bytes that reading all of it takes up on this machine's disk."""

    def read(self, offset: int, length: int) -> bytes:
        """A few bytes, without bringing the others here."""

    def open(self) -> AbstractContextManager[Reader]:
        """For reading all of it."""


@dataclass(frozen=True)
class LocalContent:
    """A file of this machine.

    Attributes:
        path: the file.
        sha256: where it is known.
    """

    path: Path
    sha256: str = ""
    on_disk: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    @property
    def stamp(self) -> str:
        """Time and size."""
        found = self.path.stat()
        return f"{found.st_mtime_ns}-{found.st_size}"

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes."""
        with self.open() as reader:
            return reader(offset, length)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """For reading all of it."""
        with local_errors(str(self.path)):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            yield lambda offset, length: os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def hashed(self) -> LocalContent:
        """The same with its SHA-256."""
        with local_errors(str(self.path)):
            return LocalContent(self.path, sha256_of(self.path), self.on_disk)


@dataclass(frozen=True)
class BytesContent:
    """A small file that was made here.

    Attributes:
        data: its bytes.
    """

    data: bytes
    sha256: str = ""
    on_disk: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    @property
    def stamp(self) -> str:
        """None: what is this small is sent again."""
        return ""

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes."""
        return self.data[offset : offset + length]

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """For reading all of it."""
        yield self.read


@dataclass(frozen=True)
class Piece:
    """A range of a content.

    Attributes:
        content: the whole.
        offset: where the range begins.
        length: bytes.
    """

    content: Content
    offset: int
    length: int


@dataclass(frozen=True)
class JoinedContent:
    """Ranges of other contents, one after the other.

    Attributes:
        pieces: in their order.
    """

    pieces: Sequence[Piece]
    sha256: str = ""
    starts: list[int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        starts, total = [], 0
        for piece in self.pieces:
            starts.append(total)
            total += piece.length
        object.__setattr__(self, "starts", [*starts, total])

    @property
    def size(self) -> int:
        """Bytes."""
        return self.starts[-1]

    @property
    def stamp(self) -> str:
        """Those of the pieces."""
        return " ".join(f"{piece.content.stamp}[{piece.offset}+{piece.length}]" for piece in self.pieces)

    @property
    def on_disk(self) -> int:
        """Bytes that reading all of it takes up on this machine's disk."""
        return max(piece.content.on_disk for piece in self.pieces)

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes."""
        return self._read([piece.content.read for piece in self.pieces], offset, length)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """For reading all of it."""
        with ExitStack() as stack:
            readers = [stack.enter_context(piece.content.open()) for piece in self.pieces]
            yield lambda offset, length: self._read(readers, offset, length)

    def _read(self, readers: Sequence[Reader], offset: int, length: int) -> bytes:
        found = []
        for reader, piece, start in zip(readers, self.pieces, self.starts, strict=False):
            first, last = max(offset, start), min(offset + length, start + piece.length)
            if first < last:
                found.append(reader(piece.offset + first - start, last - first))
        return b"".join(found)


def contents_of(uri: str) -> dict[str, Content]:
    """The files of a folder that nobody published, such as a user's model; none is read.

    Args:
        uri: the folder, or one file.

    Returns:
        Each file by its name relative to the folder, sorted; a file by its own name.

    Raises:
        DraftModelError: where there is no such folder or file, or a name would lead out of it.
    """
    address = parse(uri)
    if isinstance(address, Path):
        return _local_contents(address, uri)
    from draft_model.storage.s3_contents import object_contents

    found: dict[str, Content] = {**object_contents(address, uri)}
    if not found:
        raise DraftModelError(f"{uri} holds no objects; give the URI of a folder that has some")
    return found


def _local_contents(path: Path, uri: str) -> dict[str, Content]:
    with local_errors(uri):
        if path.is_file():
            return {path.name: LocalContent(path)}
        if not path.is_dir():
            raise DraftModelError(f"{uri} is not a folder; give an existing one")
        # Links are followed wherever they lead: the Hub's own cache consists of them.
        files = sorted(file for depth in _DEPTHS for file in path.glob(depth) if file.is_file())
        return {file.relative_to(path).as_posix(): LocalContent(file) for file in files}


def bring(contents: Mapping[str, Content], folder: Path) -> None:
    """Puts files on this machine's disk, one after the other, for a program that reads files.

    Args:
        contents: by the name that each is to have.
        folder: where to; what is on this machine already is linked there.

    Raises:
        DraftModelError: where the disk is full, or a file is not what it was said to be.
    """
    for name, content in contents.items():
        target = folder / check_name(name, str(folder))
        with local_errors(str(folder)):
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, LocalContent):
                target.symlink_to(content.path.resolve())
                continue
            with content.open() as reader, target.open("wb") as file:
                for offset in range(0, content.size, _STEP):
                    file.write(reader(offset, min(_STEP, content.size - offset)))
        if content.sha256 and sha256_of(target) != content.sha256:
            raise DraftModelError(f"{name}: it was damaged on its way, its SHA-256 is another: run the stage again")
