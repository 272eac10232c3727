"""Folders that stages hand to one another: published as a whole or not at all, checked when they are read.

`publish` takes an old manifest away first and writes the new one last; `fetch` checks every file against it.
So a reader never sees half a folder, whatever was killed when, and a second try moves only what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from draft_model.errors import DraftModelError
from draft_model.storage import manifest, stream
from draft_model.storage.contents import Content
from draft_model.storage.local import LocalFolder
from draft_model.storage.manifest import MANIFEST, FileRecord, Manifest
from draft_model.storage.transfer import Accept, local_errors, progress, run_all
from draft_model.storage.uri import ObjectAddress, check_name, parse, split

if TYPE_CHECKING:
    from draft_model.storage.s3 import ListedObject, S3Folder

_PROBLEMS_SHOWN = 20


class Folder(stream.Place, Protocol):
    """What publishing needs of a place."""

    def remove_all(self) -> None:
        """Removes all that is there, half-sent files too."""

    def put(self, sources: Mapping[str, Path]) -> list[FileRecord]:
        """Copies local files in that are not there yet, several at once; gives their records."""

    def create(self, name: str, data: bytes) -> bool:
        """Makes a small file unless there is one; says whether it did."""


def _folder(uri: str) -> Folder:
    address = parse(uri)
    return LocalFolder(address, uri) if isinstance(address, Path) else _in_s3(address, uri)


def _in_s3(address: ObjectAddress, uri: str) -> S3Folder:
    from draft_model.storage.s3 import S3Folder  # boto3 takes half a second, which a local run need not spend

    return S3Folder(address, uri)


def publish(folder: Path, uri: str, *, stage: str, properties: Mapping[str, Any]) -> Manifest:
    """Makes a local folder available, whole, at a URI.

    Files that are there already are not sent again; files that an earlier manifest there lists and this one
    does not are removed. Where the URI is the folder itself, only the manifest is written.

    Args:
        folder: the files; sub-folders too.
        uri: where they are to be; local or in an object store.
        stage: the stage that made them.
        properties: what the stage says about them; JSON values.

    Returns:
        The manifest, as `read_manifest` gives it.

    Raises:
        DraftModelError: where a file's name or link is unsafe, or the place refuses.
    """
    with local_errors(str(folder)):
        sources = manifest.files_below(folder)
    manifest.make_manifest(stage, (), properties)  # what is wrong with them is told before anything is touched
    address = parse(uri)
    in_place = isinstance(address, Path) and address.resolve() == folder.resolve()
    if isinstance(address, Path) and not in_place and address.resolve().is_relative_to(folder.resolve()):
        raise DraftModelError(f"{uri} is inside {folder}, which is to be published there; choose a place outside it")
    there = _folder(uri)
    stale = _listed(there) - sources.keys()
    there.remove(MANIFEST)
    if in_place:
        with local_errors(str(folder)):
            records = run_all(lambda name: manifest.record_of(sources[name], name), sources)
    else:
        run_all(there.remove, sorted(stale))
        records = there.put(sources)
    new = manifest.make_manifest(stage, records, properties)
    there.write(MANIFEST, new.to_bytes())
    return new


def publish_contents(
    contents: Mapping[str, Content], uri: str, *, stage: str, properties: Mapping[str, Any]
) -> Manifest:
    """Makes files available, whole, at a URI, wherever they are now.

    They pass through memory, a few parts at a time; what an earlier try has brought there is not brought again.

    Args:
        contents: by the name that each is to have.
        uri: where they are to be; local or in an object store.
        stage: the stage that made them.
        properties: what the stage says about them; JSON values.

    Returns:
        The manifest, as `read_manifest` gives it.

    Raises:
        DraftModelError: where a name is unsafe, a file is not what it was said to be, or a place refuses.
    """
    return stream.publish_contents(contents, _folder(uri), stage=stage, properties=properties)


def is_whole(uri: str, found: Manifest) -> bool:
    """Whether every file of a manifest is there with its size; none is read.

    Args:
        uri: the folder.
        found: its manifest.
    """
    address = parse(uri)
    if isinstance(address, Path):
        with local_errors(uri):
            paths = {file.path: address / file.path for file in found.files}
            sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    else:
        sizes = {listed.name: listed.size for listed in _in_s3(address, uri).list_objects()}
    return all(sizes.get(file.path) == file.size for file in found.files)


def _listed(folder: Folder) -> set[str]:
    """The files of the manifest that is about to be replaced; a damaged one names none."""
    try:
        return {file.path for file in manifest.from_bytes(folder.read(MANIFEST) or b"").files}
    except ValidationError:
        return set()


def extend(uri: str, files: Mapping[str, Path], *, properties: Mapping[str, Any] | None = None) -> Manifest:
    """Adds files to a whole folder, or replaces them.

    Args:
        uri: the folder.
        files: the local file for each name in the folder.
        properties: are added to the folder's own, and replace those of the same name.

    Returns:
        The new manifest.

    Raises:
        DraftModelError: where the folder is not whole, or a name is unsafe.
    """
    old = read_manifest(uri)
    for name in files:
        check_name(name, uri)
    kept = [file for file in old.files if file.path not in files]
    said = {**old.properties, **(properties or {})}
    # What cannot be one folder's is refused before anything is sent.
    manifest.make_manifest(old.stage, [*kept, *(FileRecord(name, 0, manifest.EMPTY) for name in files)], said)
    there = _folder(uri)
    new = manifest.make_manifest(old.stage, [*kept, *there.put(files)], said)
    there.write(MANIFEST, new.to_bytes())
    return new


def read_manifest(uri: str, *, stage: str | None = None) -> Manifest:
    """Reads what a whole folder holds.

    Args:
        uri: the folder.
        stage: the stage that must have written it; any, where not given.

    Raises:
        DraftModelError: where the folder is not whole, is another stage's, or its manifest is damaged.
    """
    writer = f"the {stage} stage" if stage else "the stage that writes it"
    data = _folder(uri).read(MANIFEST)
    if data is None:
        raise DraftModelError(
            f"{uri} has no {MANIFEST}, so it is not whole; run {writer} to its end, or correct the URI"
        )
    try:
        found = manifest.from_bytes(data)
    except ValidationError as error:
        raise DraftModelError(
            f"{uri}: its {MANIFEST} is damaged ({manifest.reason(error)}); run {writer} again"
        ) from None
    if stage is not None and found.stage != stage:
        raise DraftModelError(f"{uri} is the output of the {found.stage} stage; give the URI of an output of {writer}")
    return found


def fetch(uri: str, into: Path, *, only: Callable[[str], bool] | None = None) -> Path:
    """Gives a whole folder as a local one, every file checked against its size and checksums.

    Args:
        uri: the folder.
        into: where a remote folder is downloaded to; what is there already and whole is not downloaded again.
            Files there that the manifest does not list are left alone.
        only: chooses files by name; all, where not given.

    Returns:
        The local folder: the URI's own where it is local, else `into`.

    Raises:
        DraftModelError: where the folder is not whole or a file is damaged, or the disk is too small.
    """
    records = [file for file in read_manifest(uri).files if only is None or only(file.path)]
    address = parse(uri)
    if isinstance(address, Path):
        _verify(address, records, uri)
        return address
    with local_errors(str(into)):
        there = [record for record in records if (into / record.path).is_file()]
        lacking = run_all(lambda record: manifest.problem(into / record.path, record), there)
    whole = {record for record, problem in zip(there, lacking, strict=True) if not problem}
    missing = {record.path: record for record in records if record not in whole}

    def accept(name: str, arrived: Path, crc32c: tuple[int, ...]) -> None:
        if problem := manifest.problem(arrived, missing[name], crc32c):
            raise DraftModelError(_damaged(uri, name, problem))

    _download(_in_s3(address, uri), {name: record.size for name, record in missing.items()}, into, accept)
    return into


def _damaged(uri: str, name: str, problem: str) -> str:
    return f"{uri}: {name} {problem}; run the stage that writes the folder again"


def _verify(folder: Path, records: list[FileRecord], uri: str) -> None:
    with local_errors(uri):
        found = run_all(lambda record: manifest.problem(folder / record.path, record), records)
    problems = [_damaged(uri, record.path, problem) for record, problem in zip(records, found, strict=True) if problem]
    if problems:
        rest = len(problems) - _PROBLEMS_SHOWN
        more = [f"{uri}: {rest} more files are damaged or missing"] if rest > 0 else []
        raise DraftModelError(problems[:_PROBLEMS_SHOWN] + more)


def _download(source: S3Folder, sizes: Mapping[str, int], into: Path, accept: Accept) -> None:
    with local_errors(str(into)), progress(f"from {source.uri}", sum(sizes.values())) as advance:
        into.mkdir(parents=True, exist_ok=True)
        source.get(sizes, into, accept, advance)


def _download_unchecked(source: S3Folder, objects: list[ListedObject], into: Path) -> None:
    """Downloads what has no manifest; a local file of the same size and time is taken for the same file."""
    times = {listed.name: listed.modified.timestamp() for listed in objects}

    def same(listed: ListedObject) -> bool:
        path = into / listed.name
        return path.is_file() and (path.stat().st_size, path.stat().st_mtime) == (
            listed.size,
            times[listed.name],
        )

    def accept(name: str, arrived: Path, _: tuple[int, ...]) -> None:
        os.utime(arrived, (times[name], times[name]))

    with local_errors(str(into)):
        _download(source, {listed.name: listed.size for listed in objects if not same(listed)}, into, accept)


def fetch_tree(uri: str, into: Path) -> Path:
    """Gives a folder that nobody published, such as a user's model, as a local one.

    Args:
        uri: the folder.
        into: where a remote folder is downloaded to; files there of the same size and time are not downloaded
            again.

    Returns:
        The local folder: the URI's own where it is local, else `into`.

    Raises:
        DraftModelError: where there is no such folder, or a key would lead out of it.
    """
    address = parse(uri)
    if isinstance(address, Path):
        with local_errors(uri):
            if not address.is_dir():
                raise DraftModelError(f"{uri} is not a folder; give an existing one")
        return address
    source = _in_s3(address, uri)
    objects = source.list_objects()
    if not objects:
        raise DraftModelError(f"{uri} holds no objects; give the URI of a folder that has some")
    _download_unchecked(source, objects, into)
    return into


def fetch_file(uri: str, into: Path) -> Path:
    """Gives one file as a local one.

    Args:
        uri: the file.
        into: the folder that a remote file is downloaded to, under its own name.

    Returns:
        The local file: the URI's own where it is local, else the one in `into`.

    Raises:
        DraftModelError: where there is no such file.
    """
    address = parse(uri)
    if isinstance(address, Path):
        with local_errors(uri):
            if not address.is_file():
                raise DraftModelError(f"{uri} is not a file; give an existing one")
        return address
    if not address.key:
        raise DraftModelError(f"given {uri!r}, which is a bucket; give the URI of a file")
    parent, _, name = address.key.rpartition("/")
    source = _in_s3(ObjectAddress(address.bucket, parent), uri.removesuffix("/").removesuffix(f"/{name}"))
    _download_unchecked(source, [source.look(name)], into)
    return into / name


def exists(uri: str) -> bool:
    """Whether there is a file at the URI, or a whole folder.

    Raises:
        DraftModelError: where the store cannot say.
    """
    address = parse(uri)
    if isinstance(address, Path):
        with local_errors(uri):
            return address.is_file() or (address / MANIFEST).is_file()
    store = _in_s3(ObjectAddress(address.bucket, ""), f"s3://{address.bucket}")
    names = [address.key, f"{address.key}/{MANIFEST}"] if address.key else [MANIFEST]
    return any(store.exists(name) for name in names)


def remove_manifest(uri: str) -> None:
    """Makes a folder count as unfinished; that it does already is no error."""
    _folder(uri).remove(MANIFEST)


def remove(uri: str) -> None:
    """Removes a folder that this project wrote, half-sent files too; that there is none is no error.

    Its manifest goes first, so that what a killed process leaves of it counts as unfinished.

    Args:
        uri: the folder.

    Raises:
        DraftModelError: where the place refuses.
    """
    folder = _folder(uri)
    folder.remove(MANIFEST)
    folder.remove_all()


def write_bytes(uri: str, data: bytes) -> None:
    """Makes or replaces a small file, at once.

    Args:
        uri: the file.
        data: its content.

    Raises:
        DraftModelError: where the place refuses.
    """
    parent, name = split(uri)
    _folder(parent).write(name, data)


def read_bytes(uri: str) -> bytes:
    """Reads a small file.

    Args:
        uri: the file.

    Raises:
        DraftModelError: where there is no such file.
    """
    parent, name = split(uri)
    data = _folder(parent).read(name)
    if data is None:
        raise DraftModelError(f"{uri}: there is no such file; check the URI")
    return data
