"""Scratch folders: removed at a run's end, and those of killed runs when the next one starts.

Every process that works in a scratch folder holds a shared lock on its `.lock`, which the kernel frees when the process
ends, however it ends. A folder whose lock nobody holds is a killed run's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

logger = logging.getLogger(__name__)

PREFIX = "draft-model-"
LOCK = ".lock"


@contextmanager
def scratch_folder(stage: str, parent: str | None = None) -> Iterator[Path]:
    """A scratch folder in a parent, or else in the machine's temporary folder, removed at the end."""
    root = Path(parent or gettempdir())
    sweep(root)
    with TemporaryDirectory(prefix=f"{PREFIX}{stage}-", dir=root) as name:
        folder = Path(name)
        with (folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            (folder / "lock").rename(folder / LOCK)  # locked before a sweep could find it
            yield folder


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Keeps the scratch folder around a folder from being swept while this process works there."""
    locks = (path / LOCK for path in (folder, *folder.parents))
    with ExitStack() as stack:
        if found := next((lock for lock in locks if lock.is_file()), None):  # else the user named the folder
            fcntl.flock(stack.enter_context(found.open("rb")), fcntl.LOCK_SH)
        yield


def sweep(root: Path) -> None:
    """Removes this user's scratch folders whose processes are all gone."""
    for folder in root.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                logger.info("scratch of a killed run is removed: %s", folder)
        except OSError:  # at work, or none of ours
            continue
