"""The checkpoints under one URI: uploaded while training goes on, thinned out, and found again.

    <checkpoint_path>/epoch_1/, epoch_2/, ...   see `checkpoint`; without checkpoint_path under the output
    <checkpoint_path>/checkpoints.json          their names, oldest first; each is listed before it is written
    <output>/final/                             the draft to serve

A name that is listed and has no manifest is half-written: it is never resumed from, and the next run removes it.

A run that was stopped within a publication until another took its lease over harms nothing when it goes on: the index
is replaced only where it still has the version that this run wrote, and all that the other may be writing or removing
is listed there, so whoever takes over uses none of those names.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.training.checkpoint import Loaded, read_checkpoint
from draft_model.training.config import INDEX, STAGE, list_checkpoints, properties_of
from draft_model.training.lease import Lease

logger = logging.getLogger(__name__)

PATIENCE = 15 * 60.0  # seconds that an object store may be away before the training fails for it
CHECKPOINTS_AT_ONCE = 3
"""Checkpoints on this disk that are not published yet, the one being written among them; then the training waits."""


class Output:
    """The checkpoints of a training; one process writes, all may read.

    Args:
        uri: that they are under.
        work: scratch folder of this process.
        output: URI that `final` goes under, where it is another one.
        leases: on the two; checked before whatever other runs would see is written or removed.
        newest: how many of the newest stay; 0: all.
        best: whether the one of the highest simulated acceptance length on the validation split stays too.
    """

    def __init__(
        self, uri: str, work: Path, output: str = "", leases: Sequence[Lease] = (), newest: int = 0, best: bool = False
    ) -> None:
        self.uri, self.work, self._leases, self._keeps, self.keeps_best = uri, work, leases, newest, best
        self.final = storage.join(output or uri, "final")
        self._index = storage.join(uri, INDEX)
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._sending: list[Future[None]] = []
        self._given_up = False
        self._names: list[str] | None = None
        self._avoided: set[str] = set()  # names that a run may still write to, though its lease ran out
        self._version: str | None = None  # of the index
        self._lease = next((lease for lease in leases if lease.folder == uri), None)
        self._properties: dict[str, dict[str, Any]] = {}  # of whole checkpoints; nobody else changes them

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Uploads what was saved, whatever ended the training."""
        try:
            self.finish()
        except DraftModelError as error:
            if kind is None:
                raise
            logger.error("%s", error)  # what ended the training is what is raised
        finally:
            self._sender.shutdown()

    def names(self) -> list[str]:
        """Names of the checkpoints, oldest first; the last may be half-written. Read once: this run alone writes."""
        if self._names is None:
            found = storage.read_versioned(self._index)
            self._version = found[1] if found else None
            self._names = list_checkpoints(self.uri)
            if self._lease and self._lease.took_over:
                self._avoided = set(self._names)
        return list(self._names)

    def _whole(self, name: str) -> dict[str, Any] | None:
        """What the manifest of a checkpoint says; None of one that is half-written or damaged."""
        if name not in self._properties and (found := properties_of(self._at(name))):
            self._properties[name] = found
        return self._properties.get(name)

    def clear(self) -> None:
        """Forgets the checkpoints of an earlier training, so that none of them is taken for one of this."""
        if names := self.names():
            logger.warning("resume=false: %d checkpoint(s) under %s are forgotten", len(names), self.uri)
        self._renew()
        for uri in [*map(self._at, names), self.final]:
            storage.remove_manifest(uri)
        self._write_index([])
        self._properties.clear()

    def tidy(self) -> None:
        """Removes what a killed process left half-written."""
        names = self.names()
        torn = [name for name in names if not self._whole(name)]
        for name in torn:
            self._renew()
            storage.remove(self._at(name))
            logger.info("checkpoint %s was not whole and is removed: %s", name, self._at(name))
        if torn:
            self._write_index([name for name in names if name not in torn])

    def newest(self, work: Path, run_id: str = "") -> Loaded | None:
        """The newest whole checkpoint, of this run alone where one is named; a damaged one is named and passed over.

        Its files are fetched to the folder `work`.
        """
        for name in reversed(self.names()):
            try:
                found = storage.read_manifest(self._at(name), stage=STAGE)
                if not run_id or found.properties.get("run_id") == run_id:
                    return read_checkpoint(self._at(name), work)
            except StoreUnavailable:
                raise
            except DraftModelError as error:
                logger.warning("checkpoint %s is passed over: %s", self._at(name), error)
        return None

    def room(self, name: str) -> Path:
        """The folder on this disk to write a checkpoint such as `epoch_2` into, once few enough wait for their upload.

        Raises:
            DraftModelError: where an earlier one could not be uploaded.
        """
        while len(self._sending) >= CHECKPOINTS_AT_ONCE - 1 or (self._sending and self._sending[0].done()):
            self._sending.pop(0).result()
        return self.work / "checkpoints" / name

    def upload(self, folder: Path, properties: dict[str, Any]) -> None:
        """Uploads it while the training goes on, with a manifest of these; `best` goes by `acceptance_length`."""
        self._sending.append(self._sender.submit(self._send, folder, properties))

    def finish(self) -> None:
        """Waits until all is uploaded; raises DraftModelError where it could not be."""
        while self._sending:
            self._sending.pop(0).result()

    def _send(self, folder: Path, properties: dict[str, Any]) -> None:
        try:
            with storage.patience(0.0 if self._given_up else PATIENCE):
                self._upload(folder.name, folder, properties)
        except DraftModelError as error:
            self._given_up = True
            # Out of the scratch folders, which end with the process.
            kept = self.work.parent.parent / f"{self.work.parent.name}-unpublished" / folder.name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, kept)
            storage.publish(kept, str(kept), stage=STAGE, properties=properties)
            raise DraftModelError(
                [*error.problems, f"{self._at(folder.name)}: the checkpoint of step {properties['step']} could not be "
                 f"put there; it stays in {kept}, which resume_from_checkpoint may name"]
            ) from error  # fmt: skip
        shutil.rmtree(folder)

    def _upload(self, name: str, folder: Path, properties: dict[str, Any]) -> None:
        # A whole checkpoint of another step may have this name: total_steps may have ended the same epoch early.
        # It may be the only whole one, and would be lost while this one is uploaded to its place.
        step = properties["step"]
        numbered = (f"step_{step}_{number}" for number in itertools.count(2))
        free = (other for other in itertools.chain((name, f"step_{step}"), numbered) if other not in self._avoided)
        name = next(other for other in free if (self._whole(other) or properties)["step"] == step)
        names = [other for other in self.names() if other != name] + [name]
        self._write_index(names)
        self._properties.pop(name, None)
        storage.publish(folder, self._at(name), stage=STAGE, properties=properties, check=self._renew)
        self._properties[name] = properties
        logger.info("checkpoint %s: step %d, %s", name, step, self._at(name))
        if not self._keeps:
            return
        # The newest is whole by now, so a whole one is left whatever happens.
        kept = {*names[-self._keeps :], *([self.best()] if self.keeps_best else [])}
        self._renew()
        for other in (other for other in names if other not in kept):
            self._properties.pop(other, None)
            storage.remove(self._at(other))
        self._write_index([other for other in names if other in kept])

    def best(self) -> str | None:
        """The checkpoint of the highest simulated acceptance length, the earliest of equals; None without any."""
        lengths = {name: (self._whole(name) or {}).get("acceptance_length") for name in self.names()}
        validated = {name: float(length) for name, length in lengths.items() if length is not None}
        return max(validated, key=validated.__getitem__, default=None)

    def publish_final(self, folder: Path, *, stage: str, properties: dict[str, Any]) -> None:
        """Puts the draft to serve under the output, with a manifest of this stage and these properties."""
        self._renew()
        storage.publish(folder, self.final, stage=stage, properties=properties, check=self._renew)

    def _renew(self) -> None:
        for lease in self._leases:
            lease.renew()

    def _at(self, name: str) -> str:
        return storage.join(self.uri, name)

    def _write_index(self, names: list[str]) -> None:
        self._renew()
        data, done = json.dumps(names).encode(), True
        if self._lease is None:
            storage.write_bytes(self._index, data)
        elif self._version is None:
            done = storage.create(self._index, data)
        else:
            done = storage.replace(self._index, data, self._version)
        found = storage.read_versioned(self._index)
        if not done or found is None or found[0] != data:
            raise DraftModelError(
                f"{self._index}: somebody else changed it while this run was at work, so it writes nothing more there; "
                "give each run a folder of its own"
            )
        self._names, self._version = names, found[1]
