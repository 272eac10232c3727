"""The lease on a folder that a training writes to: a small file that names the run, renewed while the run is alive.

    <folder>/lease.json    run_id, since, renewed, seconds, processes, took_over

Every change compares the version that was read: of two runs one creates the lease, and one takes it over. A run that
finds another's lease watches it by its own clock. A lease that changes is refused; one that stays the same for its
seconds, or all of whose processes ran on this machine and are gone, is taken over. A run that could not renew for so
long and finds the lease gone or another's writes nothing more. All processes of one run share its lease: the
coordinating one, the job's first, and those that are started again for them.

The lease is renewed right before each manifest and index is written. A process that is stopped right after that until
another run took over may finish single writes, which harm none of the other's checkpoints: see `output`. `final` has
one name; an upload to it that is stopped for longer than SECONDS is not fenced.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from pydantic import AwareDatetime, BaseModel, Field

from draft_model import storage
from draft_model.errors import DraftModelError, StoreUnavailable

logger = logging.getLogger(__name__)

FILE = "lease.json"
SECONDS = 50.0
"""How long a lease holds without being renewed: less than the shortest dist_timeout, more than a store's retries."""
RENEWALS = 5  # renewals per lease period
_ATTEMPTS = 20  # to change a lease that other processes of this run change as well
_NEVER = datetime.min.replace(tzinfo=UTC)


class Process(BaseModel):
    """A process, and the process table that its id means something in: of a boot of a machine, of a container."""

    name: str
    table: str = ""
    pid: int = 0
    started: float = 0.0


class _Record(BaseModel):
    """What the file holds; all defaults where it is being made, or somebody else wrote it in another form."""

    run_id: str = ""
    since: str = ""
    renewed: AwareDatetime = _NEVER
    seconds: float = Field(default_factory=lambda: SECONDS, ge=0, le=600)
    processes: list[Process] = []
    took_over: str = ""

    def __str__(self) -> str:
        processes = ", ".join(process.name for process in self.processes)
        return f"{self.run_id or 'without a name'} (process {processes or 'unknown'})"


class Leased(DraftModelError):
    """Another run is at work in the folder."""


class Lease:
    """The lease on a folder (URI) of the run with this id; errors name the parameter that named the folder."""

    def __init__(self, folder: str, run_id: str, parameter: str = "checkpoint_path") -> None:
        self.folder, self.run_id, self.parameter = folder, run_id, parameter
        self.lost = False
        self.took_over = ""  # run that this one took the lease from and that may be alive, only stopped
        self._uri = storage.join(folder, FILE)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._since = datetime.now(UTC).isoformat(timespec="microseconds")

    def acquire(self) -> bool:
        """Takes the lease, or joins this run's; returns whether it was taken. Raises Leased while another run works."""
        seen: bytes | None = None
        started, absent = time.monotonic(), 0
        while not storage.create(self._uri, self._text([])):
            asked = time.monotonic()
            found = storage.read_versioned(self._uri)
            if time.monotonic() - asked > SECONDS / RENEWALS:
                started = time.monotonic()  # the store was away, for the holder too
            if found is None:
                if (absent := absent + 1) > _ATTEMPTS:
                    raise DraftModelError(f"{self.parameter}: {self._uri} is there and no plain file: remove it")
                continue
            data, version = found
            held = _parsed(data)
            if held.run_id == self.run_id:
                self.renew()
                return False
            alive = [_is_alive(process) for process in held.processes]
            changed = seen is not None and data != seen
            fresh = any(alive) and held.renewed > datetime.now(UTC) - timedelta(seconds=SECONDS)
            if fresh or (changed and held.run_id):
                raise Leased(
                    f"{self.parameter}: given {self.folder!r}, where run {held} has been at work since {held.since}: "
                    "wait for its end, or give this run another folder"
                )
            if seen is None:
                logger.info("%s: %s has the lease of run %s: is it alive?", self.parameter, self.folder, held)
            if seen is None or changed:
                seen, started = data, time.monotonic()
            gone = bool(alive) and all(process is False for process in alive)
            if gone or time.monotonic() - started >= held.seconds:
                self.took_over = "" if gone else held.run_id or "unknown"
                if storage.replace(self._uri, self._text([]), version):
                    logger.warning("%s: run %s is gone, and its lease taken over", self.parameter, held)
                    return True
            else:
                time.sleep(SECONDS / RENEWALS / 4)
        return True

    def renew(self) -> None:
        """Writes that this run is alive; raises where the lease is gone or another run's, or the store is away."""
        with self._lock:
            if not self._ended.is_set():
                self._change(add=True)

    def keep(self) -> None:
        """Renews until the end; a store that is away may come back."""
        while not self._ended.wait(SECONDS / RENEWALS):
            try:
                with storage.patience(SECONDS / RENEWALS):
                    self.renew()
            except DraftModelError as error:
                logger.warning("%s", error)
                if self.lost:
                    return

    def end(self, release: bool) -> None:
        """Stops renewing; once released, the next run need not wait."""
        # A store that is away when a training ends is not waited for: the lease runs out by itself.
        with self._lock, storage.patience(SECONDS / RENEWALS):
            self._ended.set()
            try:
                found = storage.read_versioned(self._uri)
                if found is None or _parsed(found[0]).run_id != self.run_id:
                    return
                if release:
                    storage.delete(self._uri, found[1])
                else:
                    self._change(add=False)
            except DraftModelError as error:
                logger.warning("%s: the lease is left to run out: %s", self.parameter, error)

    def _change(self, add: bool) -> None:
        for _ in range(_ATTEMPTS):
            found = storage.read_versioned(self._uri)
            held = _parsed(found[0] if found else b"")
            if found is None or held.run_id != self.run_id:
                self.lost = True
                holder = f"belongs to run {held} by now" if held.run_id else "is no longer leased to this run"
                late = f"this run did not renew its lease for {SECONDS:.0f} s, and writes nothing more there"
                raise DraftModelError(f"{self.parameter}: {self.folder} {holder}; {late}")
            self._since, self.took_over = held.since or self._since, held.took_over
            others = [each for each in held.processes if each != this_process() and _is_alive(each) is not False]
            if storage.replace(self._uri, self._text(others, add), found[1]):
                return
        raise StoreUnavailable(f"{self._uri} changes too often to be renewed")

    def _text(self, others: list[Process], add: bool = True) -> bytes:
        record = _Record(run_id=self.run_id, since=self._since, renewed=datetime.now(UTC), took_over=self.took_over)
        record.processes = [*others, this_process()] if add else others
        return record.model_dump_json().encode()


def this_process() -> Process:
    """This one, as leases name it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        table = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        table = ""
    started, name = psutil.Process().create_time(), f"{socket.gethostname()}:{os.getpid()}"
    return Process(name=name, table=table, pid=os.getpid(), started=started)


def _is_alive(process: Process) -> bool | None:
    """Whether a lease's process runs; None where only its own machine could tell."""
    if not process.table or process.table != this_process().table:
        return None
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        return abs(found.create_time() - process.started) < 1 and found.status() != psutil.STATUS_ZOMBIE
    return False


def _parsed(data: bytes) -> _Record:
    with suppress(ValueError):
        return _Record.model_validate_json(data)
    return _Record()


def own_run_id() -> str:
    """The id of a run that nobody named: of this process."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def hold(folder: str, run_id: str, *, outermost: bool, parameter: str = "checkpoint_path") -> Iterator[Lease | None]:
    """Holds the lease on a folder, where one is named, while its body runs; `parameter` named it.

    Only checkpoint_path must be leased: an output in a store without conditional writes goes without. `outermost` says
    whether the run ends with this process, or with one that waits for it.

    Raises:
        DraftModelError: where another run is at work there.
    """
    if not folder:
        yield None
        return
    lease = Lease(folder, run_id, parameter)
    try:
        taken = lease.acquire()
        lease.renew()  # finds a store that creates conditionally and does not replace so
    except Leased:
        raise
    except DraftModelError as error:
        if parameter == "checkpoint_path" or lease.lost:
            raise
        with suppress(DraftModelError):
            storage.delete(storage.join(folder, FILE))
        logger.warning("%s: %s has no lease, so a second run there would not be noticed: %s", parameter, folder, error)
        yield None
        return
    renewing = threading.Thread(target=lease.keep, daemon=True, name="lease")
    renewing.start()
    try:
        yield lease
    finally:
        lease.end(release=outermost or taken)
        renewing.join()
