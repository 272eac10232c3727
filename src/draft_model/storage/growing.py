"""Folders that grow file by file, over hours and from several machines, and are whole at the end.

Each file is sent once it is written, under a name that is used for no other content; the manifest comes last. Until
then whoever reads the folder sees what it held before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from draft_model.storage import manifest
from draft_model.storage.contents import contents_of
from draft_model.storage.folders import _folder, _listed
from draft_model.storage.manifest import MANIFEST, FileRecord, Manifest
from draft_model.storage.transfer import run_all
from draft_model.storage.uri import check_name, split


def add(uri: str, name: str, path: Path) -> FileRecord:
    """Sends one file to a folder that need not be whole.

    Args:
        uri: the folder.
        name: of the file in the folder.
        path: the local file.

    Returns:
        What `seal` wants to know of it.

    Raises:
        DraftModelError: the name is unsafe, or the place refuses.
    """
    (record,) = _folder(uri).put({check_name(name, uri): path})
    return record


def seal(
    uri: str, records: Iterable[FileRecord], files: Mapping[str, Path], *, stage: str, properties: Mapping[str, Any]
) -> Manifest:
    """Makes a folder whole; files that an earlier manifest there lists and this one does not are removed.

    Args:
        uri: the folder.
        records: of the files that are there, as `add` gave them.
        files: small ones that are still to be sent, by their names in the folder.
        stage: the stage that made them.
        properties: what the stage says about them; JSON values.

    Returns:
        The manifest.

    Raises:
        DraftModelError: the place refuses.
    """
    there = _folder(uri)
    before = _listed(there)
    there.remove(MANIFEST)
    new = manifest.make_manifest(stage, [*records, *there.put(files)], properties)
    there.write(MANIFEST, new.to_bytes())
    run_all(there.remove, sorted(before - {file.path for file in new.files}))
    return new


def put_file(path: Path, uri: str) -> FileRecord:
    """Uploads one file to its URI, whatever else its folder holds; returns its record for `write_manifest`."""
    parent, name = split(uri)
    return add(parent, name, path)


def write_manifest(uri: str, stage: str, files: Iterable[FileRecord], properties: Mapping[str, Any]) -> Manifest:
    """Makes a folder whole whose files have been uploaded by `put_file`."""
    return seal(uri, files, {}, stage=stage, properties=properties)


def list_files(uri: str) -> dict[str, tuple[int, str]]:
    """Size in bytes and version stamp (an ETag, or mtime on a disk) of each file below a folder, by its name there."""
    return {name: (content.size, content.stamp) for name, content in contents_of(uri).items()}


def read_file(uri: str) -> bytes | None:
    """A small file's content, or None where there is no such file."""
    return read(uri)


def read(uri: str) -> bytes | None:
    """A small file's content, or None where there is no such file.

    Raises:
        DraftModelError: the store refuses or cannot be reached.
    """
    parent, name = split(uri)
    data: bytes | None = _folder(parent).read(name)
    return data


def create(uri: str, data: bytes) -> bool:
    """Makes a small file, unless there is one.

    Args:
        uri: the file.
        data: its content. On a disk it follows the name, so another may see the file empty for a moment.

    Returns:
        Whether it was made; of several that try at once, one is told so.

    Raises:
        DraftModelError: the place refuses, as an object store without conditional writes (If-None-Match) does.
    """
    parent, name = split(uri)
    made: bool = _folder(parent).create(name, data)
    return made


def remove(uri: str, names: Iterable[str]) -> None:
    """Removes files of a folder; that there are none is no error.

    Args:
        uri: the folder.
        names: in the folder.
    """
    run_all(_folder(uri).remove, names)
