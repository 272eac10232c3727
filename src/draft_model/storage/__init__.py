"""Folders that stages hand over by URI: published as a whole or not at all, checked when they are read.

`publish` removes an old manifest first and writes the new one last; `fetch` checks every file against it. So a reader
never sees half a folder, whatever was killed when, and a second try moves only the files that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_model.errors import DraftModelError, Problems
from draft_model.storage import manifest
from draft_model.storage.local import LocalFolder
from draft_model.storage.manifest import MANIFEST, MANIFEST_LIMIT, FileRecord, Manifest
from draft_model.storage.transfer import Stat, check_free_disk, in_parallel, local_errors, patience, progress
from draft_model.storage.uri import check_name, is_remote, join, parse, split

if TYPE_CHECKING:
    from draft_model.storage.s3 import S3Folder

__all__ = [
    "MANIFEST", "FileRecord", "Manifest", "content_key", "copy", "create", "delete", "exists", "extend", "fetch",
    "fetch_file", "fetch_tree", "find_whole", "is_remote", "is_whole", "join", "list_files", "patience", "probe",
    "publish", "put_file", "read_bytes", "read_file", "read_manifest", "read_range", "read_versioned", "remove",
    "remove_manifest", "replace", "write_bytes", "write_manifest",
]  # fmt: skip
FILE_LIMIT = 2**28
"""Bytes of a file that is read whole: somebody else may have written an index or a lease in a shared folder."""


def _folder(uri: str) -> LocalFolder | S3Folder:
    address = parse(uri)
    if isinstance(address, Path):
        return LocalFolder(address, uri)
    from draft_model.storage.s3 import S3Folder  # boto3 takes half a second, which a local run need not spend

    return S3Folder(address, uri)


def _file(uri: str) -> tuple[LocalFolder | S3Folder, str]:
    parent, name = split(uri)
    return _folder(parent), name


def publish(
    folder: Path, uri: str, *, stage: str, properties: Mapping[str, Any], check: Callable[[], None] | None = None
) -> Manifest:
    """Makes a local folder available, whole, at a URI; returns its manifest.

    Files that are there already are not sent again; files that an earlier manifest there lists and this one does not
    are removed. Where the URI is the folder itself, only the manifest is written. `properties` are JSON values. `check`
    is called right before the manifest is written; where it raises, the folder stays without one.
    """
    with local_errors(str(folder)):
        sources = manifest.files_below(folder)
    manifest.make_manifest(stage, (), properties)  # wrong properties are reported before anything is touched
    target = _folder(uri)
    place = target.path.resolve() if isinstance(target, LocalFolder) else None
    if place and folder.resolve() in place.parents:
        raise DraftModelError(f"{uri} is inside {folder}, which is to be published there; choose another folder")
    if place == folder.resolve():
        target.remove(MANIFEST)
        with local_errors(str(folder)):
            records = in_parallel(lambda name: manifest.record_of(sources[name], name), sources)
    else:
        _take_down(target, sources.keys())
        records = _put(target, sources)
    if check is not None:
        check()
    return _seal(target, stage, records, properties)


def _put(folder: LocalFolder | S3Folder, sources: Mapping[str, Path]) -> list[FileRecord]:
    """Sends local files to their names in a folder, those that are not there yet; returns their records."""

    def send(name: str) -> FileRecord:
        before, record = sources[name].stat(), manifest.record_of(sources[name], name)
        if folder.has(record):
            progress()(record.size)
            return record
        try:
            folder.put(sources[name], record)
        finally:  # a store refuses content that does not fit its checksum: what changed says more
            after = sources[name].stat()
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                folder.remove(name)
                raise DraftModelError(
                    f"{sources[name]} changed while it was published; leave it alone meanwhile, and publish again"
                )
        return record

    with local_errors(folder.uri):
        size = sum(path.stat().st_size for path in sources.values())
        if isinstance(folder, LocalFolder):
            there = [path for path in map(folder.path.joinpath, sources) if path.is_file()]
            check_free_disk(folder.path, size - sum(path.stat().st_size for path in there))
        return in_parallel(send, sources, f"to {folder.uri}", size)


def _take_down(folder: LocalFolder | S3Folder, keep: Set[str]) -> None:
    """Removes a manifest that is to be replaced, then the files that it lists but for some."""
    found = folder.read(MANIFEST, MANIFEST_LIMIT)
    folder.remove(MANIFEST)
    if found:
        with suppress(manifest.UnreadableManifest):
            listed = {file.path for file in manifest.from_bytes(found[0]).files}
            in_parallel(folder.remove, sorted(listed - keep))


def _seal(
    target: LocalFolder | S3Folder, stage: str, files: Iterable[FileRecord], properties: Mapping[str, Any]
) -> Manifest:
    sealed = manifest.make_manifest(stage, files, properties)
    target.write(MANIFEST, sealed.to_bytes())
    return sealed


def put_file(path: Path, uri: str, name: str) -> FileRecord:
    """Uploads one file to a name in a folder; returns its record for `write_manifest`."""
    return _put(_folder(uri), {check_name(name, uri): path})[0]


def write_manifest(uri: str, stage: str, files: Iterable[FileRecord], properties: Mapping[str, Any]) -> Manifest:
    """Makes a folder whole whose files were uploaded before; others that an older manifest lists are removed."""
    folder, records = _folder(uri), list(files)
    _take_down(folder, {file.path for file in records})
    return _seal(folder, stage, records, properties)


def extend(uri: str, files: Mapping[str, Path]) -> Manifest:
    """Adds local files to a whole folder, or replaces them; if killed meanwhile, the folder is whole without them."""
    old, folder = read_manifest(uri), _folder(uri)
    kept = [file for file in old.files if file.path not in files]
    added = [FileRecord(check_name(name, uri), 0, "0" * 64) for name in files]
    manifest.make_manifest(old.stage, [*kept, *added], {})  # wrong names are reported before anything is touched
    if len(kept) < len(old.files):
        _seal(folder, old.stage, kept, old.properties)
    return _seal(folder, old.stage, [*kept, *_put(folder, files)], old.properties)


def read_manifest(uri: str, *, stage: str | None = None) -> Manifest:
    """Reads what a whole folder holds; raises where it is not whole, damaged, or not written by `stage`."""
    writer = f"the {stage} stage" if stage else "the stage that writes it"
    found = _folder(uri).read(MANIFEST, MANIFEST_LIMIT)
    if found is None:
        raise DraftModelError(
            f"{uri} has no {MANIFEST}, so it is not whole; run {writer} to its end, or correct the URI"
        )
    try:
        record = manifest.from_bytes(found[0])
    except manifest.UnreadableManifest as error:
        raise DraftModelError(f"{uri}: its {MANIFEST} is damaged ({error}); run {writer} again") from None
    if stage is not None and record.stage != stage:
        raise DraftModelError(f"{uri} is the output of the {record.stage} stage; give the URI of an output of {writer}")
    return record


def is_whole(uri: str, record: Manifest) -> bool:
    """Whether every file of a manifest is there with its content.

    On a disk every file is read; of objects the size and the SHA-256 in their metadata are compared.
    """
    folder = _folder(uri)
    with local_errors(uri):
        return all(in_parallel(folder.has, record.files))


def find_whole(uri: str, stage: str, **properties: str) -> Manifest | None:
    """Manifest of a folder that can be used again: of this stage, with these properties, and with all its files.

    The manifest of a folder that lacks some, or in which one has changed, is removed.
    """
    if read_file(join(uri, MANIFEST)) is None:
        return None
    record = read_manifest(uri, stage=stage)
    if any(record.properties.get(name) != value for name, value in properties.items()):
        return None
    if is_whole(uri, record):
        return record
    remove_manifest(uri)
    return None


def content_key(*content: Any) -> str:
    """SHA-256 of JSON values, for all that shapes a folder."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_manifest(uri: str) -> None:
    """Marks a folder as unfinished; that it has no manifest is no error."""
    _folder(uri).remove(MANIFEST)


def fetch(uri: str, into: Path, *, only: Callable[[str], bool] | None = None) -> Path:
    """Provides a whole folder as a local one, every file checked against its size and SHA-256.

    A local folder is returned as it is, a remote one is downloaded to `into`, without what is there already and whole.
    `only` chooses files by name.
    """
    source = _folder(uri)
    records = {file.path: file for file in read_manifest(uri).files if only is None or only(file.path)}
    local = source if isinstance(source, LocalFolder) else LocalFolder(into.resolve(), str(into))

    def damage(name: str, path: Path) -> str:
        problem = manifest.problem(path, records[name])
        return f"{uri}: {name} {problem}; run the stage that writes the folder again" if problem else ""

    def accept(name: str, path: Path) -> None:
        if problem := damage(name, path):
            raise DraftModelError(problem)

    with local_errors(local.uri):
        found = in_parallel(lambda name: damage(name, local.inside(name)), records)
        if not isinstance(source, LocalFolder):
            sizes = {name: records[name].size for name, problem in zip(records, found, strict=True) if problem}
            source.get(sizes, local, accept)
            return into
    if problems := [*filter(None, found)]:
        more = [f"{uri}: {len(problems) - 20} more files are damaged or missing"] if len(problems) > 20 else []
        raise DraftModelError(problems[:20] + more)
    return source.path


def fetch_tree(uri: str, into: Path) -> Path:
    """Provides a folder without manifest, such as a user's model, as a local one: its own, or downloaded to `into`.

    Files of the same size and time are not downloaded again.
    """
    source = _folder(uri)
    if isinstance(source, LocalFolder):
        with local_errors(uri):
            if not source.path.is_dir():
                raise DraftModelError(f"{uri} is not a folder; give an existing one")
        return source.path
    if not (found := {check_name(name, uri): stat for name, stat in source.files().items()}):
        raise DraftModelError(f"{uri} holds no objects; give the URI of a folder that has some")
    _download(source, found, into)
    return into


def fetch_file(uri: str, into: Path) -> Path:
    """Provides one file as a local one: that of the URI where it is local, else downloaded to the folder `into`."""
    source, name = _file(uri)
    if (found := source.stat(name)) is None:
        kind = "file; give an existing one" if isinstance(source, LocalFolder) else "bucket or object; check the URI"
        raise DraftModelError(f"{uri}: there is no such {kind}")
    if isinstance(source, LocalFolder):
        return source.path / name
    _download(source, {name: found}, into)
    return into / name


def _download(source: S3Folder, found: Mapping[str, Stat], into: Path) -> None:
    """Downloads objects, but for those that are there with the same size and time."""
    with local_errors(str(into)):
        local = LocalFolder(into.resolve(), str(into))
        there = {name: path.stat() for name in found if (path := into / name).is_file()}
        sizes = {
            name: size
            for name, (size, _, time) in found.items()
            if name not in there or (there[name].st_size, there[name].st_mtime) != (size, time)
        }
        source.get(sizes, local, lambda name, path: os.utime(path, (found[name].time,) * 2))


def copy(source_uri: str, uri: str, names: Iterable[str]) -> list[FileRecord]:
    """Copies files of one folder to another, within the object store where both are in the same one.

    Returns their records for `write_manifest`, in the order of the names.
    """
    source, target = _folder(source_uri), _folder(uri)
    names = [check_name(name, uri) for name in names]
    if not isinstance(source, LocalFolder) and not isinstance(target, LocalFolder) and target.store is source.store:
        return target.copy(source, names)
    with tempfile.TemporaryDirectory() as work:
        paths = {name: fetch_file(join(source_uri, name), Path(work, name).parent) for name in names}
        return _put(target, paths)


def list_files(uri: str) -> dict[str, tuple[int, str]]:
    """Size in bytes and version stamp (an ETag, or time and size on a disk) of each file below a folder, by its name.

    The URI of one file gives that file by its own name.
    """
    found = _folder(uri).files() or _one_file(uri)
    return {check_name(name, uri): (found[name].size, found[name].stamp) for name in sorted(found)}


def _one_file(uri: str) -> dict[str, Stat]:
    address = parse(uri)
    if not (address.name if isinstance(address, Path) else address.key):  # the root of a disk, or a bucket
        return {}
    folder, name = _file(uri)
    return {name: stat} if (stat := folder.stat(name)) else {}


def exists(uri: str) -> bool:
    """Whether there is a file at the URI, or a whole folder."""
    return _folder(uri).read(MANIFEST, MANIFEST_LIMIT) is not None or bool(_one_file(uri))


def remove(uri: str) -> None:
    """Removes a folder, its manifest first, and unfinished uploads to it; that there is none is no error."""
    folder = _folder(uri)
    folder.remove(MANIFEST)
    folder.remove_all()


def read_versioned(uri: str) -> tuple[bytes, str] | None:
    """Content of a small file and its version for `replace` and `delete`, or None where there is no such file."""
    folder, name = _file(uri)
    return folder.read(name, FILE_LIMIT)


def read_file(uri: str) -> bytes | None:
    """Content of a small file, or None where there is no such file."""
    found = read_versioned(uri)
    return found[0] if found else None


def read_bytes(uri: str) -> bytes:
    """Content of a small file; raises DraftModelError where there is no such file."""
    if (found := read_versioned(uri)) is None:
        raise DraftModelError(f"{uri}: there is no such file; check the URI")
    return found[0]


def read_range(uri: str, offset: int, length: int, version: str = "") -> bytes:
    """Bytes [offset, offset + length) of an object, fewer at its end; `version` is a stamp that it must still have."""
    folder, name = _file(uri)
    assert not isinstance(folder, LocalFolder)  # those of a disk are read as files
    return folder.read_range(name, offset, length, version)


def write_bytes(uri: str, data: bytes) -> None:
    """Makes or replaces a small file atomically."""
    folder, name = _file(uri)
    folder.write(name, data)


def create(uri: str, data: bytes) -> bool:
    """Makes a small file unless there is one; of several writers at once exactly one gets True."""
    folder, name = _file(uri)
    return folder.create(name, data)


def replace(uri: str, data: bytes, version: str) -> bool:
    """Replaces a small file if it still has the version that `read_versioned` gave; returns whether it did."""
    folder, name = _file(uri)
    return folder.replace(name, data, version)


def delete(uri: str, version: str | None = None) -> bool:
    """Removes a file, if it still has the version where one is given; returns False where it has another."""
    folder, name = _file(uri)
    return folder.remove(name, version)


def probe(uri: str, *, conditional: bool = True) -> list[str]:
    """Writes an object in parts, reads it in ranges, tries conditional writes, and removes all of it.

    Returns what does not work in a folder that a run is to write to, a sentence each.
    """
    problems = Problems()
    folder = join(uri, f"probe-{uuid.uuid4().hex}")
    file = join(folder, "lease")
    with tempfile.TemporaryDirectory() as work:
        with problems.collect():
            Path(work, "large").write_bytes(data := os.urandom(9 * 2**20))
            put_file(Path(work, "large"), folder, "large")
            if fetch_file(join(folder, "large"), Path(work, "back")).read_bytes() != data:
                problems.append(f"{uri}: an object of 9 MiB comes back with another content; see the log of the store")
            if conditional:
                made = [create(file, b"first"), create(file, b"second")]
                found = read_versioned(file)
                wrong = replace(file, b"third", '"0123456789abcdef0123456789abcdef"')
                right = found is not None and not wrong and replace(file, b"fourth", found[1])
                failed = "If-None-Match" if made != [True, False] else "If-Match" if wrong or not right else ""
                if failed:
                    problems.append(
                        f"{uri}: the store does not obey conditional writes ({failed}), which keep two runs out of one "
                        "folder; use another store or a folder on a disk"
                    )
        with problems.collect():
            remove(folder)
    return list(dict.fromkeys(problems))
