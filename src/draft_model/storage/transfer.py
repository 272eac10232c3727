"""What every transfer needs: files in parallel, one progress bar, and how long to wait for a store that is away."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import NamedTuple, TypeVar

from draft_model.errors import DraftModelError

Item = TypeVar("Item")
Result = TypeVar("Result")

FILES_AT_ONCE = 8
SHOW_PROGRESS_FROM = 100 * 10**6  # bytes; a smaller transfer is over before its bar is read
PATIENCE = ContextVar("PATIENCE", default=600.0)
"""Seconds that a store which has answered before may be away until a request of a stage fails."""

_DENIED = "permission denied; give this user access or choose another folder"
_NO_FOLDER = "a folder is needed where there is a file; remove the file or choose another folder"
_SENTENCES = {
    errno.ENOENT: "it was removed while it was used; does another run use it?",
    errno.ENOSPC: "the disk is full (or has no inodes left); free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "a file is needed where there is a folder; remove the folder or choose another folder",
    errno.ENAMETOOLONG: "a name is longer than this file system allows; choose a shorter one",
    errno.EIO: "the file system reports an input/output error; check the disk or the network volume",
    errno.ESTALE: "the network volume was mounted anew or removed meanwhile; run again",
}


class Stat(NamedTuple):
    """What a folder says of one of its files."""

    size: int  # bytes
    stamp: str  # changes with the content: an ETag, or time and size on a disk
    time: float  # of the last change, in seconds since 1970


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Waits for a store that is away only so long within the block, as a lease must."""
    before = PATIENCE.set(seconds)
    try:
        yield
    finally:
        PATIENCE.reset(before)


class Stopped(Exception):
    """Ends a transfer that is under way when another one has failed."""


class Advance:
    """Progress of transfers: called with a number of bytes, from any thread; raises Stopped once `stop` is set."""

    def __init__(self, update: Callable[[float], object] = lambda _: None) -> None:
        self._update, self._lock, self.stop = update, threading.Lock(), threading.Event()

    def __call__(self, count: float) -> None:
        """Moves the progress bar."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._update(count)


_PROGRESS: ContextVar[Advance] = ContextVar("_PROGRESS")


def progress() -> Advance:
    """Progress of the transfer that this thread works for."""
    return _PROGRESS.get(None) or Advance()


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], what: str = "", size: int = 0) -> list[Result]:
    """Calls `work` on each item in threads, results in order; the first failure, or Ctrl-C, ends all of them.

    `work` may report bytes to `progress()`; of many (`size`) a bar with the label `what` is shown.
    """
    from tqdm import tqdm

    hidden, every = size < SHOW_PROGRESS_FROM, 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=hidden, mininterval=every)
    with bar, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        advance = Advance(bar.update)
        (context := copy_context()).run(_PROGRESS.set, advance)
        futures = [pool.submit(context.copy().run, work, item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            advance.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


@contextmanager
def local_errors(where: str) -> Iterator[None]:
    """Turns what the file system refuses and the user can correct into a DraftModelError about `where`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _SENTENCES or (error.errno == errno.ENOENT and not error.filename):  # no folder for these
            raise
        file = f" (at {error.filename})" if error.filename else ""
        raise DraftModelError(f"{where}: {_SENTENCES[error.errno]}{file}") from error


def check_free_disk(folder: Path, needed: int) -> None:
    """Refuses a transfer of `needed` bytes that would fill the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    total, _, free = shutil.disk_usage(existing)
    if needed > free and total:  # some file systems cannot say and answer 0
        raise DraftModelError(
            f"{folder}: {needed / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB are free; free some space or choose a "
            "folder on a larger disk"
        )
