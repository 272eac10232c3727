"""The checkpoints under one URI: sent off beside the training, thinned out, and found again.

    <checkpoint_path>/epoch_1/, epoch_2/, ...   see `checkpoint`; without checkpoint_path under the output
    <checkpoint_path>/checkpoints.json          their names, oldest first; each is there before its checkpoint is
    <output>/final/                             what is to be served

A name that is listed and has no manifest is half-written: it is never resumed from, and removed by whoever resumes.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from draft_model import storage
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.training.checkpoint import Loaded, read_checkpoint
from draft_model.training.lease import Lease

logger = logging.getLogger(__name__)

INDEX = "checkpoints.json"
STAGE = "checkpoint"
PATIENCE = 15 * 60.0
"""Seconds that an object store may be away before the training fails for it."""
_PAUSES = (1.0, 60.0)  # seconds between two tries: the first, and the longest, doubling
CHECKPOINTS_AT_ONCE = 3
"""Checkpoints on this disk that are not published yet, the one being written among them; then the training waits."""
_ACCEPTANCE = "acceptance_length"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay.

    Attributes:
        newest: how many of the newest; 0: all.
        best: whether also the one of the highest simulated acceptance length, on the validation split.
    """

    newest: int = 0
    best: bool = False


class Output:
    """The checkpoints of a training; one process writes, all may read.

    Args:
        uri: that they are under.
        work: scratch folder of this process.
        keeping: which of them stay.
        output: URI that `final` goes under, where it is another one.
        lease: on the URI, where runs share it.
    """

    def __init__(
        self, uri: str, work: Path, keeping: Keeping | None = None, output: str = "", lease: Lease | None = None
    ) -> None:
        self.uri, self.work, self.keeping, self._lease = uri, work, keeping or Keeping(), lease
        self.final = storage.join(output or uri, "final")
        self._index = storage.join(uri, INDEX)
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._sending: list[Future[None]] = []
        self._given_up = False

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ended the training: what was saved is sent."""
        try:
            self.finish()
        except DraftModelError as error:
            if kind is None:
                raise
            logger.error("%s", error)  # what ended the training is what is raised
        finally:
            self._sender.shutdown()

    def names(self) -> list[str]:
        """Names of the checkpoints, oldest first; the last may be half-written."""
        if not storage.exists(self._index):
            return []
        return list(json.loads(storage.read_bytes(self._index)))

    def clear(self) -> None:
        """Forgets the checkpoints of an earlier training, so that none of them is taken for one of this."""
        names = self.names()
        if names:
            logger.warning("resume=false: %d checkpoint(s) under %s are forgotten", len(names), self.uri)
        for uri in [*map(self._at, names), self.final]:
            storage.remove_manifest(uri)
        self._write_index([])

    def tidy(self) -> None:
        """Removes what a killed process left half-written."""
        names = self.names()
        torn = [name for name in names if not storage.exists(storage.join(self._at(name), storage.MANIFEST))]
        for name in torn:
            storage.remove(self._at(name))
            logger.info("checkpoint %s was not whole and is removed: %s", name, self._at(name))
        if torn:
            self._write_index([name for name in names if name not in torn])

    def newest(self, run_id: str = "") -> Loaded | None:
        """The newest whole checkpoint; a damaged one is named and the one before it taken.

        Args:
            run_id: of the run whose checkpoints alone count; empty: anybody's.
        """
        for name in reversed(self.names()):
            try:
                found = storage.read_manifest(self._at(name), stage=STAGE)
                if run_id and found.properties.get("run_id") != run_id:
                    continue
                return read_checkpoint(self._at(name), self.work / "resumed")
            except StoreUnavailable:
                raise
            except DraftModelError as error:
                logger.warning("checkpoint %s is passed over: %s", self._at(name), error)
        return None

    def save(self, name: str, write: Callable[[Path], None], properties: dict[str, Any]) -> None:
        """Writes a checkpoint to this disk, and has it sent while the training goes on.

        Args:
            name: folder under the output, such as `epoch_2`.
            write: writes it into a folder.
            properties: what its manifest says; `acceptance_length` is what `best` goes by.

        Raises:
            DraftModelError: where an earlier one could not be sent.
        """
        while len(self._sending) >= CHECKPOINTS_AT_ONCE - 1 or (self._sending and self._sending[0].done()):
            self._sending.pop(0).result()
        folder = self.work / "checkpoints" / name
        write(folder)
        self._sending.append(self._sender.submit(self._send, name, folder, properties))

    def finish(self) -> None:
        """Waits until all is sent.

        Raises:
            DraftModelError: where it could not be.
        """
        while self._sending:
            self._sending.pop(0).result()

    def _send(self, name: str, folder: Path, properties: dict[str, Any]) -> None:
        uri = self._at(name)

        def publish() -> None:
            if self._lease:
                self._lease.renew()  # or raises: what is there is another run's
            free = self._free_name(name, properties["step"])
            names = [other for other in self.names() if other != free] + [free]
            self._write_index(names)
            storage.publish(folder, self._at(free), stage=STAGE, properties=properties)
            logger.info("checkpoint %s: step %d, %s", free, properties["step"], self._at(free))
            self._thin_out(names)

        try:
            _patiently(publish, uri, 0.0 if self._given_up else PATIENCE)
        except DraftModelError as error:
            self._given_up = True
            kept = _keep(folder, self.work, properties)
            raise DraftModelError(
                [*error.problems, f"{uri}: the checkpoint of step {properties['step']} could not be put there; it "
                 f"stays in {kept}, which resume_from_checkpoint may name"]
            ) from error  # fmt: skip
        shutil.rmtree(folder)

    def _free_name(self, name: str, step: int) -> str:
        """The name, unless a whole checkpoint of another step has it: total_steps may have ended the same epoch early.

        That one may be the only whole one, and is lost while another is sent to its place.
        """
        try:
            there = storage.read_manifest(self._at(name), stage=STAGE).properties["step"]
        except StoreUnavailable:
            raise
        except DraftModelError:
            return name
        return name if there == step else f"step_{step}"

    def _thin_out(self, names: list[str]) -> None:
        """Removes what is not to be kept. The newest is whole by now, so a whole one is left whatever happens."""
        if not self.keeping.newest:
            return
        kept = set(names[-self.keeping.newest :]) | ({self._best(names)} if self.keeping.best else set())
        for name in names:
            if name not in kept:
                storage.remove(self._at(name))
        self._write_index([name for name in names if name in kept])

    def best(self) -> str | None:
        """The checkpoint of the highest simulated acceptance length, the earliest of equals; None without any."""
        return self._best(self.names())

    def _best(self, names: list[str]) -> str | None:
        found: dict[str, float] = {}
        for name in names:
            try:
                length = storage.read_manifest(self._at(name), stage=STAGE).properties.get(_ACCEPTANCE)
            except StoreUnavailable:
                raise
            except DraftModelError:  # half-written or damaged
                continue
            if length is not None:
                found[name] = float(length)
        return max(found, key=found.__getitem__, default=None)

    def publish_final(self, folder: Path, *, stage: str, properties: dict[str, Any]) -> str:
        """Puts the draft that is to be served under the output.

        Args:
            folder: the draft's files.
            stage: of the manifest.
            properties: of the manifest.

        Returns:
            Its URI.
        """
        publish = lambda: storage.publish(folder, self.final, stage=stage, properties=properties)  # noqa: E731
        _patiently(publish, self.final, PATIENCE)
        return self.final

    def _at(self, name: str) -> str:
        return storage.join(self.uri, name)

    def _write_index(self, names: list[str]) -> None:
        storage.write_bytes(self._index, json.dumps(names).encode())


def _patiently(work: Callable[[], Result], uri: str, patience: float) -> Result:
    """Tries again while the store is away; every part of `work` can be done twice."""
    started, pause = time.monotonic(), _PAUSES[0]
    while True:
        try:
            return work()
        except StoreUnavailable as error:
            away = time.monotonic() - started
            if away + pause > patience:
                raise DraftModelError([*error.problems, f"{uri}: given up after {away:.0f} s"]) from error
            logger.warning("%s; training goes on, the next try is in %.0f s", error, pause)
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])


def _keep(folder: Path, work: Path, properties: dict[str, Any]) -> Path:
    """Moves a checkpoint out of the scratch folders, which end with the process, and makes it whole there."""
    kept = work.parent.parent / f"{work.parent.name}-unpublished" / folder.name
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, kept)
    storage.publish(kept, str(kept), stage=STAGE, properties=properties)
    return kept
