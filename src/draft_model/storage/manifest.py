"""The record that makes a folder whole: every file's size and checksums, written last as `manifest.json`.

A reader needs no listing and no guess: without the record the folder is unfinished, with it each file can be
checked. The same files and properties give the same bytes, so it holds no time and everything is sorted.

SHA-256 says which file it is. Readers check CRC-32C, which finds what transfers and disks damage: it is four times as
fast, and ranges that come at once are checked at once. Neither is proof against somebody who may write to the folder,
and so to its manifest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NoReturn

import google_crc32c
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from draft_model.errors import DraftModelError
from draft_model.storage.uri import check_name, name_problem

MANIFEST = "manifest.json"
EMPTY = hashlib.sha256().hexdigest()
"""SHA-256 of no bytes."""
RANGE = 64 * 2**20
"""Bytes; each range of so many has a checksum of its own."""
_BLOCK = 2**18
"""Bytes; stay in the processor's cache while they are read and summed."""
PARTIAL = ".draft-model-partial"
"""Is in the name of a file that is being written, so that what a killed run left is never taken for data."""


def _safe(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(f"the file name {name!r} {problem}")
    return name


def _consistent(files: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
    names = [file.path for file in files]
    if len(set(names)) < len(names):
        raise ValueError("a file is listed twice")
    taken = {MANIFEST, *names}
    for name in names:
        if name == MANIFEST:
            raise ValueError("it lists itself")
        if not taken.isdisjoint(str(parent) for parent in PurePosixPath(name).parents):
            raise ValueError(f"{name!r} lies below a name that is a file")
    return files


@dataclass(frozen=True)
class FileRecord:
    """One file of a folder.

    Attributes:
        path: relative to the folder, with forward slashes.
        size: bytes.
        sha256: of the content, 64 hexadecimal digits.
        crc32c: CRC-32C of each `RANGE` of the content; none where nobody read it, as its SHA-256 was known.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    path: Annotated[str, AfterValidator(_safe)]
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    crc32c: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a whole folder holds.

    Attributes:
        format: version of this record.
        stage: the stage that wrote the folder.
        files: sorted by path.
        properties: what the stage says about its output; JSON values.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    stage: str
    files: Annotated[tuple[FileRecord, ...], AfterValidator(_consistent)]
    properties: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """The record as JSON; the same for the same content."""
        text = json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False)
        return f"{text}\n".encode()


@functools.cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def make_manifest(stage: str, files: Iterable[FileRecord], properties: Mapping[str, Any]) -> Manifest:
    """Puts a record together.

    Args:
        stage: the stage that writes the folder.
        files: in any order.
        properties: JSON values.

    Returns:
        The record as a reader of its JSON will see it: tuples are lists, keys are strings.

    Raises:
        DraftModelError: where the files' names cannot be one folder's.
    """
    ordered = tuple(sorted(files, key=lambda file: file.path))
    try:
        return from_bytes(Manifest(stage=stage, files=ordered, properties=dict(properties)).to_bytes())
    except ValidationError as error:
        raise DraftModelError(f"the {stage} stage's files cannot be published: {reason(error)}") from None


def from_bytes(data: bytes) -> Manifest:
    """Reads a record and checks it.

    Raises:
        ValidationError: where it is none, or one that names files outside its folder.
    """
    return _adapter().validate_json(data)


def reason(error: ValidationError) -> str:
    """The first thing that is wrong with a record, in words."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def crc32c(data: bytes, before: int = 0) -> int:
    """CRC-32C of bytes that follow on others.

    Args:
        data: the bytes.
        before: CRC-32C of the others.
    """
    return int(google_crc32c.extend(before, data))


class Sums:
    """The checksums of a file, taken as its bytes pass in order.

    Attributes:
        size: bytes that have passed.
    """

    def __init__(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._crc32c: list[int] = []

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        left = memoryview(data)
        while left:
            before = self.size % RANGE
            if before == 0:
                self._crc32c.append(0)
            block = left[: min(_BLOCK, RANGE - before)]
            self._crc32c[-1] = crc32c(block.tobytes(), self._crc32c[-1])
            self._sha256.update(block)
            self.size += len(block)
            left = left[len(block) :]

    @property
    def sha256(self) -> str:
        """Of all that has passed."""
        return self._sha256.hexdigest()

    def record(self, name: str) -> FileRecord:
        """Records the file.

        Args:
            name: its name in the folder, relative, with forward slashes.
        """
        return FileRecord(name, self.size, self.sha256, tuple(self._crc32c))


def _blocks(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def crc32c_of(path: Path) -> tuple[int, ...]:
    """CRC-32C of each range of a file's content."""
    sums: list[int] = []
    size = 0
    for block in _blocks(path):  # a range is a number of blocks
        if size % RANGE == 0:
            sums.append(0)
        sums[-1] = crc32c(block.tobytes(), sums[-1])
        size += len(block)
    return tuple(sums)


def record_of(path: Path, name: str) -> FileRecord:
    """Records a local file.

    Args:
        path: the file.
        name: its name in the folder, relative, with forward slashes.
    """
    sums = Sums()
    for block in _blocks(path):
        sums.update(block)
    return sums.record(name)


def problem(path: Path, record: FileRecord, crc32c: tuple[int, ...] = ()) -> str | None:
    """What is wrong with a file, in words that follow its name.

    Args:
        path: the file.
        record: what it should be.
        crc32c: of its ranges, where they are known already.
    """
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != record.size:
        return f"has {size} bytes where its manifest says {record.size}"
    by_range = (crc32c or crc32c_of(path)) if record.crc32c else ()
    same = by_range == record.crc32c if by_range else sha256_of(path) == record.sha256
    return None if same else "has another checksum than its manifest says"


def check_size(size: int, arrived: int, source: str) -> None:
    """Refuses a transfer that did not bring what was seen before it.

    Args:
        size: bytes that were to go.
        arrived: bytes that are there.
        source: where it came from, for the message.

    Raises:
        DraftModelError: where the sizes differ.
    """
    if arrived != size:
        raise DraftModelError(
            f"{source}: {size} bytes were to be written and {arrived} arrived; leave the file alone "
            "while it is published, and publish again"
        )


def files_below(folder: Path) -> dict[str, Path]:
    """Finds what there is to publish.

    Links are followed where they lead to a file inside the folder. A `manifest.json` at the top and what a
    killed run left half-written are no data.

    Args:
        folder: a local folder.

    Returns:
        Each file by its name relative to the folder, sorted.

    Raises:
        DraftModelError: with all names and links that cannot be published, or where there is no such folder.
    """
    if not folder.is_dir():
        raise DraftModelError(f"{folder} is not a folder; give an existing one")
    top = folder.resolve()
    found: dict[str, Path] = {}
    problems: list[str] = []
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or PARTIAL in path.name:
            continue
        try:
            check_name(name, str(folder))
        except DraftModelError as error:
            problems += error.problems
        if not path.is_file():
            problems.append(f"{path} is no regular file, nor a link to one; remove it or put the file in its place")
        elif not path.resolve().is_relative_to(top):
            problems.append(f"{path} is a link that leads out of {folder}; put a copy of the file in its place")
        found[name] = path
    if problems:
        raise DraftModelError(problems)
    return dict(sorted(found.items()))


def _entries(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise error  # a sub-folder that cannot be read must not be left out in silence

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in (*files, *folders):
            path = Path(parent, name)
            if path.is_symlink() or not path.is_dir():
                yield path
