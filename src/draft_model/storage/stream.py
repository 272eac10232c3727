"""`publish_contents`: files go from where they are to where they shall be, a few parts of each in memory at a time.

Nothing waits on a disk where the source can be read in ranges. The SHA-256 is taken as the bytes pass. After every
large file a journal beside the data says which are there, so that a transfer that was cut goes on with the next file.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from draft_model.errors import DraftModelError
from draft_model.storage import manifest
from draft_model.storage.contents import Content, Reader
from draft_model.storage.local import LocalFolder
from draft_model.storage.manifest import MANIFEST, PARTIAL, FileRecord, Manifest, Sums
from draft_model.storage.transfer import Advance, Stopped, check_free_disk, local_errors, progress, run_all
from draft_model.storage.uri import check_name

JOURNAL = f"manifest{PARTIAL}.json"
LARGE_FROM = 8 * 2**20
"""Bytes; larger files go two at a time, and are worth a line in the journal."""
LARGE_AT_ONCE = 2
"""So many files go in parts, several of each."""
_AHEAD = 4
"""Parts of a file that are read ahead."""
_PARTS_AT_ONCE = 16


class Parts:
    """One file's bytes in order, read ahead in parallel, and summed as they pass.

    Args:
        reader: of the content.
        size: bytes.
        part: bytes of a part.
        pool: threads that read.
        stop: set where the transfer is to end early.
        advance: is told of the bytes that are through.
    """

    def __init__(
        self, reader: Reader, size: int, part: int, pool: ThreadPoolExecutor, stop: threading.Event, advance: Advance
    ) -> None:
        self.size, self._reader, self._part, self._pool, self._stop = size, reader, part, pool, stop
        self._advance = advance
        self.sums = Sums()

    def __iter__(self) -> Iterator[bytes]:
        for data in self._read():
            if self._stop.is_set():
                raise Stopped
            self.sums.update(data)
            self._advance(len(data))
            yield data

    def _read(self) -> Iterator[bytes]:
        if self.size <= self._part:
            yield self._reader(0, self.size)
            return
        offsets = iter(range(0, self.size, self._part))
        ahead: deque[Future[bytes]] = deque()

        def begin() -> None:
            if (offset := next(offsets, None)) is not None:
                ahead.append(self._pool.submit(self._reader, offset, min(self._part, self.size - offset)))

        for _ in range(_AHEAD):
            begin()
        try:
            while ahead:
                data = ahead.popleft().result()
                begin()
                yield data
        finally:
            for reading in ahead:
                reading.cancel()

    def check(self, content: Content, name: str) -> None:
        """Refuses what is not what it was said to be.

        Raises:
            DraftModelError: where its size or SHA-256 is another.
        """
        if self.sums.size != self.size:
            raise DraftModelError(
                f"{name}: {self.size} bytes were to be read and {self.sums.size} came; run the stage again"
            )
        if content.sha256 and content.sha256 != self.sums.sha256:
            raise DraftModelError(
                f"{name}: its SHA-256 is {self.sums.sha256} where the source says {content.sha256}; it was changed or "
                "damaged on its way: run the stage again"
            )


class Place(Protocol):
    """What a transfer needs of where it goes."""

    uri: str

    def read(self, name: str) -> bytes | None:
        """A file's content, or None where there is no such file."""

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a small file, at once."""

    def remove(self, name: str) -> None:
        """Removes a file; that there is none is no error."""

    def holds(self, record: FileRecord) -> bool:
        """Whether the recorded file is there already."""

    def stamp(self, name: str) -> str:
        """Changes with a file's content; empty where there is no such file."""

    def part_size(self, size: int) -> int:
        """Bytes of the parts in which a file of so many bytes is written."""

    def receive(self, name: str, sha256: str, parts: Parts) -> None:
        """Writes a file from its parts; it appears when all of it is there."""


class _Journal:
    """Which files of a transfer that is not finished are there already."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        try:
            found = json.loads(place.read(JOURNAL) or b"{}")
        except ValueError:
            found = {}
        self._entries: dict[str, dict[str, Any]] = found if isinstance(found, dict) else {}

    def record(self, name: str, content: Content) -> FileRecord | None:
        """The file's record, where it is there and the content is still the same."""
        entry = self._entries.get(name)
        if not content.stamp or not isinstance(entry, dict) or entry.get("source") != content.stamp:
            return None
        if entry.get("place") != self._place.stamp(name):
            return None
        return FileRecord(name, content.size, str(entry.get("sha256")), tuple(entry.get("crc32c") or ()))

    def add(self, record: FileRecord, content: Content) -> None:
        """Notes a file that has arrived."""
        entry = {
            "source": content.stamp,
            "place": self._place.stamp(record.path),
            "sha256": record.sha256,
            "crc32c": record.crc32c,
        }
        with self._lock:
            self._entries[record.path] = entry
            self._place.write(JOURNAL, json.dumps(self._entries, sort_keys=True).encode())


def publish_contents(
    contents: Mapping[str, Content], there: Place, *, stage: str, properties: Mapping[str, Any]
) -> Manifest:
    """Makes files available, whole, at a place; see `storage.publish_contents`."""
    for name in contents:
        check_name(name, there.uri)
    journal = _Journal(there)
    try:
        stale = {file.path for file in manifest.from_bytes(there.read(MANIFEST) or b"").files} - contents.keys()
    except ValueError:
        stale = set()
    there.remove(MANIFEST)
    run_all(there.remove, sorted(stale))
    records = _transfer(contents, there, journal)
    new = manifest.make_manifest(stage, records, properties)
    there.write(MANIFEST, new.to_bytes())
    there.remove(JOURNAL)
    return new


def _transfer(contents: Mapping[str, Content], there: Place, journal: _Journal) -> list[FileRecord]:
    stop, turn = threading.Event(), threading.BoundedSemaphore(LARGE_AT_ONCE)
    total = sum(content.size for content in contents.values())
    small_first = sorted(contents, key=lambda name: (contents[name].size > LARGE_FROM, name))
    if isinstance(there, LocalFolder):
        check_free_disk(there.path, total)

    with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool, progress(f"to {there.uri}", total) as advance:

        def move(name: str) -> FileRecord:
            content = contents[name]
            if content.size <= LARGE_FROM:
                return _send(name, content, there, pool, stop, advance)
            with turn:
                if stop.is_set():
                    raise Stopped
                record = _found(name, content, there, journal)
                if record is None:
                    record = _send(name, content, there, pool, stop, advance)
                    journal.add(record, content)
                else:
                    advance(content.size)
                return record

        return run_all(move, small_first, abort=stop.set)


def _found(name: str, content: Content, there: Place, journal: _Journal) -> FileRecord | None:
    if record := journal.record(name, content):
        return record
    known = FileRecord(name, content.size, content.sha256) if content.sha256 else None
    return known if known and there.holds(known) else None


def _send(
    name: str, content: Content, there: Place, pool: ThreadPoolExecutor, stop: threading.Event, advance: Advance
) -> FileRecord:
    with content.open() as reader, local_errors(there.uri):
        parts = Parts(reader, content.size, there.part_size(content.size), pool, stop, advance)
        known = content.sha256 if content.size > LARGE_FROM else ""  # asking costs as much as a small file
        there.receive(name, known, parts)
    try:
        parts.check(content, name)
    except DraftModelError:
        there.remove(name)
        raise
    return parts.sums.record(name)
