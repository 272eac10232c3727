"""A folder on a mounted file system. A file appears under its name when it is complete, and not before.

Others may write to a shared folder (a PVC, NFS), so no read, write or removal follows a link out of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from draft_model.errors import DraftModelError
from draft_model.storage.manifest import MANIFEST, PARTIAL, FileRecord, problem
from draft_model.storage.transfer import Stat, local_errors, progress

LOCK_SECONDS = 30.0  # A lock file that did not change for so long was left by a process that was killed


@contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """Yields a path of its own beside the target, for the block to write and then rename; removed where it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Syncs the content of a file, or the names of a folder, to the disk: no manifest may outlive its files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


class LocalFolder:
    """A local folder to publish to, made when something is written; `uri` is its name in messages."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.uri = path, uri

    def inside(self, name: str, *, write: bool = False) -> Path:
        """Path of a file of this folder; raises DraftModelError where a symbolic link leads out of the folder.

        A file that is to be written or removed may itself be a link: that is replaced, not followed.
        """
        path = self.path / name
        if write and self.path.is_symlink():
            raise DraftModelError(f"{self.uri} is a symbolic link; give the folder that it leads to, or remove it")
        if not (path.parent if write else path).resolve().is_relative_to(self.path.resolve()):
            raise DraftModelError(f"{self.uri}: {name} leads out of the folder by a symbolic link; remove the link")
        return path

    def read(self, name: str, limit: int = 2**63) -> tuple[bytes, str] | None:
        """Content of a file and its version (its SHA-256), or None where there is no such file."""
        with local_errors(self.uri):
            path = self.inside(name) if name == MANIFEST else self.path / name  # a file that a user names may be a link
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if path.is_file():
                    if path.stat().st_size > limit:
                        raise DraftModelError(f"{path} is larger than {limit} bytes, so it is not what it should be")
                    return (data := path.read_bytes()), hashlib.sha256(data).hexdigest()
        return None

    def has(self, record: FileRecord) -> bool:
        """Whether a file, and no link, is there with the content of its record."""
        path = self.inside(record.path, write=True)
        return not path.is_symlink() and problem(path, record) is None

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a small file atomically and durably."""
        with self._written(name, data) as (partial, path):
            partial.replace(path)

    def create(self, name: str, data: bytes) -> bool:
        """Makes a small file unless there is one; of several writers one gets True."""
        with self._written(name, data) as (partial, path), contextlib.suppress(FileExistsError):
            try:
                os.link(partial, path)  # unlike a rename it fails where there is a file, and there is no empty moment
            except OSError:  # there is a file, or the file system has no hard links
                with path.open("xb") as file:
                    file.write(data)
            return True
        return False

    @contextmanager
    def _written(self, name: str, content: bytes | Path) -> Iterator[tuple[Path, Path]]:
        """Yields a durable file with this content, or that of a file, and the path to move it to."""
        with local_errors(self.uri):
            path = self.inside(name, write=True)
            with partial_file(path) as partial:
                shutil.copyfile(content, partial) if isinstance(content, Path) else partial.write_bytes(content)
                _flush(partial)
                yield partial, path
            _flush(path.parent)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Replaces a small file if it still has this version; returns whether it did."""
        with self._locked(name, version) as unchanged, self._written(name, data) as (partial, path):
            if still := unchanged():
                partial.replace(path)
        return still

    def remove(self, name: str, version: str | None = None) -> bool:
        """Removes a file, if it has this version where one is given; that there is none is no error."""
        with local_errors(self.uri):
            path = self.inside(name, write=True)
            if version is None:
                with contextlib.suppress(NotADirectoryError):
                    path.unlink(missing_ok=True)
                return True
            with self._locked(name, version) as unchanged:
                if still := unchanged():
                    path.unlink()
        return still

    @contextmanager
    def _locked(self, name: str, version: str) -> Iterator[Callable[[], bool]]:
        """Holds a lock file beside a file, against other machines too.

        Yields:
            Whether the file has the version and the lock is still held, to ask right before the change.
        """
        lock, token = f"{name}.lock{PARTIAL}", secrets.token_hex(8).encode()
        seen, since = b"", time.monotonic()
        while not self.create(lock, token):
            found = self.read(lock)
            if found and found[0] != seen:
                seen, since = found[0], time.monotonic()
            elif found and time.monotonic() - since > LOCK_SECONDS:
                self.remove(lock)
            time.sleep(0.01)

        def is_held() -> bool:
            return (found := self.read(lock)) is not None and found[0] == token

        try:
            yield lambda: (found := self.read(name)) is not None and found[1] == version and is_held()
        finally:
            if is_held():
                self.remove(lock)

    def remove_all(self) -> None:
        """Removes the folder with all that is in it."""
        with local_errors(self.uri):
            self.inside("any", write=True)
            if self.path.is_dir():
                with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                    shutil.rmtree(self.path)

    def stat(self, name: str) -> Stat | None:
        """Size, stamp and time of a file, or None where there is no such file."""
        with local_errors(self.uri):
            if not (path := self.path / name).is_file():
                return None
            stat = path.stat()
            return Stat(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_size}", stat.st_mtime)

    def files(self) -> dict[str, Stat]:
        """What `stat` says of every file below the folder, by their relative names."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        with local_errors(self.uri):
            walk = os.walk(self.path, onerror=fail) if not self.path.is_file() else ()
            paths = [Path(parent, name) for parent, _, names in walk for name in names if PARTIAL not in name]
            names = [path.relative_to(self.path).as_posix() for path in paths]
            return {name: stat for name in names if (stat := self.stat(name))}

    def put(self, path: Path, record: FileRecord) -> None:
        """Copies a local file to its name in the folder."""
        with self._written(record.path, path) as (partial, target):
            partial.replace(target)
        progress()(record.size)
