"""Patience with an object store: a running training waits for minutes before it fails for one that is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from draft_model.errors import StoreUnavailable

logger = logging.getLogger(__name__)

PATIENCE = 15 * 60.0
"""Seconds that an object store may be away before the training fails for it."""
PAUSES = (1.0, 60.0)  # seconds between two tries: the first, and the longest, doubling

Result = TypeVar("Result")


def patiently(work: Callable[[], Result], uri: str, patience: float | None = None) -> Result:
    """Retries while the store is away; every part of `work` can be done twice.

    Args:
        work: requests to the store.
        uri: what an error names.
        patience: seconds; PATIENCE where not given.

    Raises:
        StoreUnavailable: the store stays away.
    """
    started, pause = time.monotonic(), PAUSES[0]
    while True:
        try:
            return work()
        except StoreUnavailable as error:
            away = time.monotonic() - started
            if away + pause > (PATIENCE if patience is None else patience):
                raise StoreUnavailable([*error.problems, f"{uri}: given up after {away:.0f} s"]) from error
            logger.warning("%s; training goes on, the next try is in %.0f s", error, pause)
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
