"""What every transfer needs: files in parallel, a progress bar, a look at the free disk, errors in words."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from draft_model.errors import DraftModelError

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], object]
"""Is told of bytes that have gone through."""
Accept = Callable[[str, Path, tuple[int, ...]], None]
"""Looks at a file that has come, its name and its ranges' CRC-32C, before it gets that name; raises to refuse it."""


class Stopped(Exception):
    """Ends the transfers that are under way when another one has failed."""


FILES_AT_ONCE = 8
SHOW_PROGRESS_FROM = 100 * 10**6
"""Bytes; a smaller transfer is over before its bar is read."""

_SENTENCES = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; give this user access or choose another place",
    errno.EPERM: "permission denied; give this user access or choose another place",
    errno.ENOTDIR: "a folder is needed where there is a file; remove the file or choose another place",
    errno.EISDIR: "a file is needed where there is a folder; remove the folder or choose another place",
    errno.EEXIST: "a folder is needed where there is a file; remove the file or choose another place",
    errno.ENAMETOOLONG: "a name is longer than this file system allows; choose a shorter one",
}


@contextmanager
def local_errors(where: str) -> Iterator[None]:
    """Says what the file system refuses, where the user can put it right.

    Args:
        where: the path or URI that is worked on.

    Raises:
        DraftModelError: in place of the operating system's errors that are no fault of ours.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _SENTENCES:
            raise
        file = f" (at {error.filename})" if error.filename else ""
        raise DraftModelError(f"{where}: {_SENTENCES[error.errno]}{file}") from error


def check_free_disk(folder: Path, needed: int) -> None:
    """Refuses a download that would fill the disk, before its first byte.

    Args:
        folder: where it is to go; need not exist yet.
        needed: bytes.

    Raises:
        DraftModelError: says how much is needed and how much there is.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    total, _, free = shutil.disk_usage(existing)
    if needed > free and total:  # some file systems cannot say and answer 0
        raise DraftModelError(
            f"{folder}: {_readable(needed)} are needed and {_readable(free)} are free; free "
            f"{_readable(needed - free)} or choose a place on a larger disk"
        )


def _readable(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def run_all(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    abort: Callable[[], object] = lambda: None,
    at_once: int = FILES_AT_ONCE,
) -> list[Result]:
    """Works on several files at once; the first failure, or Ctrl-C, stops all.

    Args:
        work: is called once for each item, in a thread.
        items: what to work on.
        abort: makes calls of `work` that are under way end early.
        at_once: threads.

    Returns:
        The results in the items' order.
    """
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            abort()
            raise
    return [future.result() for future in futures]


@contextmanager
def progress(what: str, size: int) -> Iterator[Advance]:
    """Shows a bar with bytes per second, where the transfer is a large one.

    Args:
        what: goes before the bar.
        size: bytes to transfer.

    Yields:
        A function to call with each number of bytes, from any thread.
    """
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(
        total=size, desc=what, unit="B", unit_scale=True, disable=size < SHOW_PROGRESS_FROM,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    ) as bar:  # fmt: skip

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance
