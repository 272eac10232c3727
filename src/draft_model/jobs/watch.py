"""Waiting for a job to change: a watch that survives the API server, with polling where there is none.

What a watch says is only ever taken as "look again": the state itself is always read afresh. So a missed, repeated or
late event can cost seconds and nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Unavailable
from draft_model.jobs.cluster import Gone

logger = logging.getLogger(__name__)

POLL_SECONDS = 10.0  # between two looks while a watch is up: for pods, limits and events, which it does not cover
POLL_ALONE_SECONDS = 2.0  # without one
_BACK_OFF = (0.5, 1.0, 2.0, 5.0, 10.0)


class Changes:
    """Wakes whoever waits when an object may have changed.

    Args:
        watch: follows the object's changes from a version on, or from now for an empty one.
    """

    def __init__(self, watch: Callable[[str], Iterator[str]]) -> None:
        self._watch = watch
        self._changed, self._closed = threading.Event(), threading.Event()
        self.watching = False
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)

    def __enter__(self) -> Changes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def wait(self) -> None:
        """Returns when something may have changed, after some seconds at the latest."""
        self._changed.wait(POLL_SECONDS if self.watching else POLL_ALONE_SECONDS)
        self._changed.clear()

    def _follow(self) -> None:
        version, failures = "", 0
        while not self._closed.is_set():
            try:
                for seen in self._watch(version):
                    version = seen
                    self.watching, failures = True, 0
                    self._changed.set()
                    if self._closed.is_set():
                        return
                continue  # the server ends a watch after a while: go on from where it was
            except Gone:
                version = ""  # what was missed is in the state that is read next
                self._changed.set()
            except (Unavailable, DraftModelError) as error:
                if self.watching or not failures:
                    logger.info("no watch now, so the job is looked at every %.0f s (%s)", POLL_ALONE_SECONDS, error)
                self._changed.set()
            self.watching = False
            self._closed.wait(_BACK_OFF[min(failures, len(_BACK_OFF) - 1)])
            failures += 1
