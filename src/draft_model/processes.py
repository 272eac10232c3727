"""How a process is asked to stop: by SIGTERM, also when the one that started it is gone."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Has Linux send this process SIGTERM when its parent is gone, be it by SIGKILL; a training saves its step then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Makes SIGTERM a question that is asked when there is time for it.

    Yields:
        Whether it came since.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
