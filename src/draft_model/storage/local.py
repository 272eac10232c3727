"""A folder on a mounted file system. A file appears under its name when it is complete, and not before."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from draft_model.storage.manifest import PARTIAL, FileRecord, check_size, problem, record_of
from draft_model.storage.transfer import check_free_disk, local_errors, progress, run_all

if TYPE_CHECKING:
    from draft_model.storage.stream import Parts

_PART_SIZE = 8 * 2**20


@contextmanager
def landing(target: Path) -> Iterator[Path]:
    """Gives a name beside the target to write to, and moves it there once it is written.

    Args:
        target: the file to make or replace; its folder is made.

    Yields:
        A path that no other writer has; it is removed where the block raises.
    """
    if not target.parent.is_dir():  # is faster than to try
        target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    """Puts a file's content, or a folder's names, on the disk: no manifest may outlive its files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


class LocalFolder:
    """A local folder as a place to publish to.

    Args:
        path: the folder; it is made when something is written.
        uri: its name in messages.
    """

    def __init__(self, path: Path, uri: str) -> None:
        self.path = path
        self.uri = uri

    def read(self, name: str) -> bytes | None:
        """A file's content, or None where there is no such file."""
        with local_errors(self.uri):
            try:
                return (self.path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a small file, at once and for good."""
        with local_errors(self.uri), landing(self.path / name) as partial:
            partial.write_bytes(data)
            _flush(partial)
        _flush((self.path / name).parent)

    def create(self, name: str, data: bytes) -> bool:
        """Makes a small file unless there is one; of several writers, one is told that it did."""
        with local_errors(self.uri):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                with (self.path / name).open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        """Removes a file; that there is none is no error."""
        with local_errors(self.uri):
            (self.path / name).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Removes the folder with all that is in it."""
        with local_errors(self.uri):
            if self.path.is_dir():
                shutil.rmtree(self.path)

    def holds(self, record: FileRecord) -> bool:
        """Whether the file is there already, with the recorded size and checksums."""
        with local_errors(self.uri):
            return problem(self.path / record.path, record) is None

    def put(self, sources: Mapping[str, Path]) -> list[FileRecord]:
        """Copies files in that are not there yet, several at once.

        Args:
            sources: the local file for each name relative to this folder.

        Returns:
            Their records, in the same order.

        Raises:
            DraftModelError: where the disk is too small or the file system refuses.
        """

        def copy(record: FileRecord) -> None:
            source = sources[record.path]
            with landing(self.path / record.path) as partial:
                shutil.copyfile(source, partial)
                _flush(partial)
                check_size(record.size, partial.stat().st_size, str(source))
            advance(record.size)

        with local_errors(self.uri):
            records = run_all(lambda name: record_of(sources[name], name), sources)
            held = run_all(self.holds, records)
            missing = [record for record, there in zip(records, held, strict=True) if not there]
            size = sum(record.size for record in missing)
            check_free_disk(self.path, size)
            with progress(f"to {self.uri}", size) as advance:
                run_all(copy, missing)
            for folder in {(self.path / record.path).parent for record in missing}:
                _flush(folder)
        return records

    def stamp(self, name: str) -> str:
        """Changes with a file's content; empty where there is no such file."""
        try:
            found = (self.path / name).stat()
        except OSError:
            return ""
        return f"{found.st_mtime_ns}-{found.st_size}"

    def part_size(self, size: int) -> int:
        """Bytes of the parts in which a file is written."""
        return _PART_SIZE

    def receive(self, name: str, sha256: str, parts: Parts) -> None:
        """Writes a file; it appears when all of it is on the disk.

        Args:
            name: relative to this folder.
            sha256: is not needed here.
            parts: of the content.
        """
        with landing(self.path / name) as partial:
            with partial.open("wb") as stream:
                for part in parts:
                    stream.write(part)
            _flush(partial)
