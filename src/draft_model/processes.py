"""What a process is told from outside: its place in a job, and to stop, also when those that started it are gone."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ROOT = "DRAFT_MODEL_ROOT_PID"
"""Environment variable: process id of ours that a process ends with: its parent, or the command above kfp's shells."""
ORPHAN_SECONDS = 10.0
"""That a process has to end in when ROOT is gone: an embedded store went with it, and would be waited for in vain."""
_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux; looked up before a fork


def place_in_job() -> tuple[int, int]:
    """This pod's number among those of its job, from 0, and how many they are; 0 and 1 outside of a job.

    Of both operators' pods, those of a TrainJob have only torchrun's PET_* variables.
    """
    names = ("PET_NODE_RANK", "PET_NNODES") if "PET_NODE_RANK" in os.environ else ("RANK", "WORLD_SIZE")
    number, count = (os.environ.get(name) for name in names)
    return int(number or 0), int(count or 1)


def set_death_signal(number: int = signal.SIGTERM) -> None:
    """Has Linux send this process a signal when its parent, the thread that started it, is gone, be it by SIGKILL."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, number)


def end_with_parent() -> None:
    """Gets SIGTERM when this process's parent, or ROOT, is gone; those that it starts will watch it in turn.

    ROOT tells also of a parent that was gone before this process could ask, and means a process where Linux means the
    thread that started it.
    """
    set_death_signal()
    end_with_root()
    os.environ[ROOT] = str(os.getpid())


def end_with_root() -> None:
    """Gets SIGTERM when ROOT is gone.

    Between a run's command and a stage there are processes of others (kfp.local's shells), which outlive it.
    """
    root = int(os.environ.get(ROOT, "0"))
    if root and root != os.getpid():
        threading.Thread(target=_stop_after, args=(root,), name="parent", daemon=True).start()


def _stop_after(process: int) -> None:
    with suppress(OSError):  # it is gone already
        select.select([os.pidfd_open(process)], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Defers SIGTERM and SIGHUP (a closed terminal) to moments that suit.

    Yields:
        Whether one of them has arrived.
    """
    arrived: list[int] = []
    signals = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in signals}
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
