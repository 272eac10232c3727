"""The record that makes a folder whole: size and SHA-256 of every file, written last as `manifest.json`.

A reader needs no listing: without the record the folder is unfinished, with it each file can be checked. The same files
and properties give the same bytes, so it holds no time and everything is sorted. It does not protect against somebody
who may write to the folder, and so to its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from draft_model.errors import DraftModelError
from draft_model.storage.uri import name_problem

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 32 * 2**20  # bytes; a larger manifest is refused before it is read
PARTIAL = ".draft-model-partial"
"""Part of the name of a file that is being written, so that what a killed run left is never taken for data."""


def _check_names(files: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
    names = {file.path for file in files}
    taken = names | {MANIFEST}
    if len(taken) <= len(files):
        raise ValueError("a file is listed twice, or the manifest itself")
    for name in sorted(names):
        if wrong := name_problem(name):
            raise ValueError(f"the file name {name!r} {wrong}")
        if not taken.isdisjoint(map(str, PurePosixPath(name).parents)):
            raise ValueError(f"{name!r} lies below a name that is a file")
    return files


@dataclass(frozen=True)
class FileRecord:
    """One file of a folder."""

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)  # older manifests have CRC-32C sums too

    path: str  # relative to the folder, with forward slashes
    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a whole folder holds."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal[1] = 1  # version of this record
    stage: str  # that wrote the folder
    files: Annotated[tuple[FileRecord, ...], AfterValidator(_check_names)]  # sorted by path
    properties: dict[str, Any]  # what the stage says about its output; JSON values

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """The record as JSON; the same for the same content."""
        return f"{json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False)}\n".encode()


_ADAPTER = TypeAdapter(Manifest)


def make_manifest(stage: str, files: Iterable[FileRecord], properties: Mapping[str, Any]) -> Manifest:
    """Makes the record as a reader of its JSON will see it: sorted, tuples as lists, keys as strings."""
    ordered = tuple(sorted(files, key=lambda file: file.path))
    try:
        return from_bytes(Manifest(stage=stage, files=ordered, properties=dict(properties)).to_bytes())
    except UnreadableManifest as error:
        raise DraftModelError(f"the files of the {stage} stage cannot be published: {error}") from None


class UnreadableManifest(ValueError):
    """A record that is none, or names files outside its folder."""


def from_bytes(data: bytes) -> Manifest:
    """Reads a record; raises UnreadableManifest with the first thing that is wrong, in words."""
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UnreadableManifest(f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")) from None


def record_of(path: Path, name: str) -> FileRecord:
    """Record of a local file under a name in a folder."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(name, stream.tell(), sha256)


def problem(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a file compared with its record, in words that follow its name."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != record.size:
        return f"has {size} bytes where its manifest says {record.size}"
    return None if record_of(path, record.path) == record else "has another checksum than its manifest says"


def files_below(folder: Path) -> dict[str, Path]:
    """Files of a folder that is to be published, by their relative names, sorted; raises with all that cannot be.

    Links are followed where they lead to a file inside the folder. A `manifest.json` at the top and half-written files
    of a killed run are left out.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error  # a sub-folder that cannot be read must not be left out in silence

    if not folder.is_dir():
        raise DraftModelError(f"{folder} is not a folder; give an existing one")
    files: dict[str, Path] = {}
    problems: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        for path in map(Path(parent).joinpath, [*names, *folders]):
            name = path.relative_to(folder).as_posix()
            if name == MANIFEST or PARTIAL in path.name or (path.is_dir() and not path.is_symlink()):
                continue
            if wrong := name_problem(name):
                problems.append(f"{folder}: the file name {name!r} {wrong}; rename the file or remove it")
            if not path.is_file():
                problems.append(f"{path} is no regular file, nor a link to one; remove it or replace it by the file")
            elif not path.resolve().is_relative_to(folder.resolve()):
                problems.append(f"{path} is a link out of {folder}; replace it by a copy of the file")
            files[name] = path
    if problems:
        raise DraftModelError(problems)
    return dict(sorted(files.items()))
