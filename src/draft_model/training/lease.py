"""The lease on a checkpoint_path: a small object with the id of the run that writes there, renewed while it does.

    <checkpoint_path>/lease.json    run_id, process, renewed, seconds

It is made only where there is none, so of two runs one is first. A run that is gone renews no more: whoever finds a
lease watches it, by its own clock. Once it changes, its run is there, and the one that watches is refused; if it stays
as it is for the seconds that it says, it is taken over. A run that could not renew for so long, and whose lease went to
another, writes nothing more. All processes of one run share its lease: the coordinating one, the job's first, and
those that are started again for them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

FILE = "lease.json"
SECONDS = 50.0
"""That a lease holds without being renewed: less than the shortest dist_timeout, more than a store's few retries."""
RENEWALS = 5
"""So many fall into that time."""


class Lease:
    """This run's lease on a folder.

    Args:
        place: URI of the folder.
        run_id: of this run; the lease is shared by all who give the same.
    """

    def __init__(self, place: str, run_id: str) -> None:
        self.place, self.run_id = place, run_id
        self.lost = False
        self._uri = storage.join(place, FILE)
        self._ended = threading.Event()
        self._alone = threading.Lock()

    def acquire(self) -> bool:
        """Takes the lease, or joins this run's.

        Returns:
            Whether it was taken and not joined.

        Raises:
            DraftModelError: where another run is at work there.
        """
        seen, since = b"", time.monotonic()
        while not storage.create(self._uri, self._text()):
            found = self._read()
            held = _parsed(found)
            if held.get("run_id") == self.run_id:
                self.renew()
                return False
            if found and seen and found != seen and held:
                raise DraftModelError(
                    f"checkpoint_path: given {self.place!r}, where run {_name(held)} is at work, seen just now: wait "
                    "for its end, or give this run another path"
                )
            if found and not seen:
                logger.info("checkpoint_path: %s has the lease of run %s: is it there?", self.place, _name(held))
            if found != seen:
                seen, since = found, time.monotonic()
            if found and time.monotonic() - since >= float(held.get("seconds", SECONDS)):
                logger.warning("checkpoint_path: run %s is gone, and its lease taken over", _name(held))
                storage.delete(self._uri)
            else:
                time.sleep(SECONDS / RENEWALS / 4)
        return True

    def renew(self) -> None:
        """Says that this run is there.

        Raises:
            DraftModelError: where the lease is another run's by now, or the store is away.
        """
        with self._alone:
            if self._ended.is_set():
                return
            held = _parsed(self._read())
            if held.get("run_id", self.run_id) != self.run_id:
                self.lost = True
                raise DraftModelError(
                    f"checkpoint_path: {self.place} belongs to run {_name(held)} by now; this run did not renew "
                    f"its lease for {SECONDS:.0f} s, and writes nothing more there"
                )
            storage.write_bytes(self._uri, self._text())

    def keep(self) -> None:
        """Renews until the end; a store that is away may come back."""
        while not self._ended.wait(SECONDS / RENEWALS):
            try:
                self.renew()
            except DraftModelError as error:
                logger.warning("%s", error)
                if self.lost:
                    return

    def end(self, release: bool) -> None:
        """Renews no more.

        Args:
            release: whether the next run need not wait.
        """
        with self._alone:
            self._ended.set()
        try:
            if release and _parsed(self._read()).get("run_id") == self.run_id:
                storage.delete(self._uri)
        except DraftModelError as error:
            logger.warning("checkpoint_path: the lease is left to run out: %s", error)

    def _read(self) -> bytes:
        return storage.read_file(self._uri) or b""

    def _text(self) -> bytes:
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        process = f"{socket.gethostname()}:{os.getpid()}"
        return json.dumps({"run_id": self.run_id, "process": process, "renewed": now, "seconds": SECONDS}).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    """A lease's fields; none where there is no lease, or one that is being made."""
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(held: dict[str, Any]) -> str:
    return f"{held.get('run_id', 'without a name')} (process {held.get('process', 'unknown')})"


def own_run_id() -> str:
    """The id of a run that nobody named: of this process."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def hold(checkpoint_path: str, run_id: str, *, outermost: bool) -> Iterator[Lease | None]:
    """Holds the lease on a checkpoint_path.

    Args:
        checkpoint_path: URI; empty where the run writes to an output of its own, which needs none.
        run_id: of this run.
        outermost: whether the run ends with this process, or with one that waits for it.

    Yields:
        The lease, if there is one.

    Raises:
        DraftModelError: where another run is at work there.
    """
    if not checkpoint_path:
        yield None
        return
    lease = Lease(checkpoint_path, run_id)
    taken = lease.acquire()
    renewing = threading.Thread(target=lease.keep, daemon=True, name="lease")
    renewing.start()
    try:
        yield lease
    finally:
        lease.end(release=outermost or taken)
        renewing.join()
