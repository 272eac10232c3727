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

import json
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
from typing import Any

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


class _Process(BaseModel):
    name: str
    table: str = ""
    pid: int = 0
    started: float = 0.0


class _Held(BaseModel):
    run_id: str = ""
    since: str = ""
    renewed: AwareDatetime = _NEVER
    seconds: float = Field(default=SECONDS, ge=0, le=600)
    processes: list[_Process] = []
    took_over: str = ""


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
        self._since = _now()

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
            if held.get("run_id") == self.run_id:
                self.renew()
                return False
            alive = [_is_alive(process) for process in held.get("processes", [])]
            changed = seen is not None and data != seen
            fresh = any(alive) and held.get("renewed", _NEVER) > datetime.now(UTC) - timedelta(seconds=SECONDS)
            if fresh or (changed and held):
                raise Leased(
                    f"{self.parameter}: given {self.folder!r}, where run {_name(held)} has been at work since "
                    f"{held.get('since')}: wait for its end, or give this run another folder"
                )
            if seen is None:
                logger.info("%s: %s has the lease of run %s: is it alive?", self.parameter, self.folder, _name(held))
            if seen is None or changed:
                seen, started = data, time.monotonic()
            gone = bool(alive) and all(process is False for process in alive)
            if gone or time.monotonic() - started >= float(held.get("seconds", SECONDS)):
                self.took_over = "" if gone else str(held.get("run_id", "unknown"))
                if storage.replace(self._uri, self._text([]), version):
                    logger.warning("%s: run %s is gone, and its lease taken over", self.parameter, _name(held))
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
                if found is None or _parsed(found[0]).get("run_id") != self.run_id:
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
            held = _parsed(found[0]) if found else {}
            if found is None or held.get("run_id") != self.run_id:
                self.lost = True
                holder = f"belongs to run {_name(held)} by now" if held else "is no longer leased to this run"
                late = f"this run did not renew its lease for {SECONDS:.0f} s, and writes nothing more there"
                raise DraftModelError(f"{self.parameter}: {self.folder} {holder}; {late}")
            self._since = held.get("since", self._since)
            self.took_over = held.get("took_over", "")
            others = [p for p in held.get("processes", []) if p != this_process() and _is_alive(p) is not False]
            if storage.replace(self._uri, self._text(others, add), found[1]):
                return
        raise StoreUnavailable(f"{self._uri} changes too often to be renewed")

    def _text(self, others: list[dict[str, Any]], add: bool = True) -> bytes:
        lease: dict[str, Any] = {"run_id": self.run_id, "since": self._since, "renewed": _now(), "seconds": SECONDS}
        lease |= {"processes": [*others, this_process()] if add else others, "took_over": self.took_over}
        return json.dumps(lease).encode()


def this_process() -> dict[str, Any]:
    """This process, and the process table that its id means something in: of a boot of a machine, of a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        table = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        table = ""
    started = psutil.Process().create_time()
    return {"name": f"{socket.gethostname()}:{os.getpid()}", "table": table, "pid": os.getpid(), "started": started}


def _is_alive(process: dict[str, Any]) -> bool | None:
    """Whether a lease's process runs; None where only its own machine could tell."""
    if not process.get("table") or process["table"] != this_process()["table"]:
        return None
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["started"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
    return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _parsed(data: bytes) -> dict[str, Any]:
    """A lease's fields; none of one that is being made, or that somebody else wrote in another form."""
    with suppress(ValueError):
        return _Held.model_validate_json(data or b"{}").model_dump(exclude_unset=True)
    return {}


def _name(held: dict[str, Any]) -> str:
    processes = ", ".join(process["name"] for process in held.get("processes", []))
    return f"{held.get('run_id', 'without a name')} (process {processes or 'unknown'})"


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
