"""A folder in an S3 object store: AWS, MinIO, SeaweedFS, Ceph.

An object appears when it is complete, so nothing is renamed; what a folder holds is known from its manifest, so
nothing is listed to read it. Files go in parallel: small ones whole (s3_small.py), large ones in parts (s3_parts.py).
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from botocore.exceptions import ClientError

from draft_model.storage import s3_parts
from draft_model.storage.contents import LocalContent
from draft_model.storage.local import landing
from draft_model.storage.manifest import FileRecord, check_size, crc32c, record_of
from draft_model.storage.s3_client import REQUESTS_AT_ONCE, client, errors
from draft_model.storage.s3_small import SmallObjects
from draft_model.storage.stream import LARGE_AT_ONCE, Parts
from draft_model.storage.transfer import Accept, Advance, check_free_disk, local_errors, progress, run_all
from draft_model.storage.uri import ObjectAddress, check_name

PART_SIZE = 8 * 2**20
HASH = "sha256"
"""Name of the metadata that says an object's SHA-256."""
_MOST_PARTS = 10_000
_FEW = 4
"""Objects; so many are looked at one by one."""


_md5 = functools.partial(hashlib.md5, usedforsecurity=False)


@dataclass(frozen=True)
class ListedObject:
    """What a store says of an object.

    Attributes:
        name: relative to its folder.
        size: bytes.
        modified: when it was written.
        etag: the store's tag of the content; changes with it.
    """

    name: str
    size: int
    modified: datetime
    etag: str


class S3Folder:
    """A prefix of a bucket as a place to publish to and fetch from.

    Args:
        address: the bucket and prefix.
        uri: its name in messages.
    """

    def __init__(self, address: ObjectAddress, uri: str) -> None:
        self.bucket = address.bucket
        self.prefix = f"{address.key}/" if address.key else ""
        self.uri = uri.removesuffix("/")

    @functools.cached_property
    def _small(self) -> SmallObjects:
        return SmallObjects(self.bucket)

    def read(self, name: str) -> bytes | None:
        """An object's content, or None where there is no such object."""
        with errors(f"{self.uri}/{name}"):
            try:
                return client().get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read()
            except client().exceptions.NoSuchKey:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a small object."""
        with errors(f"{self.uri}/{name}"):
            client().put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data)

    def create(self, name: str, data: bytes) -> bool:
        """Makes a small object unless there is one; of several writers, one is told that it did."""
        with errors(f"{self.uri}/{name}"):
            try:
                client().put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data, IfNoneMatch="*")
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                    return False
                raise
        return True

    def remove(self, name: str) -> None:
        """Removes an object; that there is none is no error."""
        with errors(f"{self.uri}/{name}"):
            client().delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def remove_all(self) -> None:
        """Removes every object of the folder, and what was sent of those that never arrived."""
        with errors(self.uri):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            for key in [item["Key"] for page in pages for item in page.get("Contents", [])]:
                client().delete_object(Bucket=self.bucket, Key=key)
            for parts in client().list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix).get("Uploads", []):
                client().abort_multipart_upload(Bucket=self.bucket, Key=parts["Key"], UploadId=parts["UploadId"])

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        with errors(f"{self.uri}/{name}"):
            try:
                # Not HEAD: its answer has no body, so a mistyped bucket would look like a missing object.
                client().get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].close()
            except client().exceptions.NoSuchKey:
                return False
        return True

    def look(self, name: str) -> ListedObject:
        """An object's size, time and tag.

        Raises:
            DraftModelError: where there is no such object.
        """
        with errors(f"{self.uri}/{name}"):
            return self._head(name)

    def _head(self, name: str) -> ListedObject:
        head = client().head_object(Bucket=self.bucket, Key=self.prefix + name)
        return ListedObject(name, head["ContentLength"], head["LastModified"], head["ETag"])

    def _find(self, name: str) -> ListedObject | None:
        with errors(f"{self.uri}/{name}"):
            try:
                return self._head(name)
            except ClientError as error:
                if _is_missing(error):
                    return None
                raise

    def read_range(self, name: str, start: int, length: int, etag: str) -> bytes:
        """Part of an object.

        Args:
            name: relative to this folder.
            start: first byte.
            length: bytes; fewer come where the object ends.
            etag: the tag that the object must still have; empty for whatever there is.

        Raises:
            DraftModelError: the object changed, or the store refuses or cannot be reached.
        """
        with errors(f"{self.uri}/{name}"):
            return b"".join(s3_parts.pieces(self.bucket, self.prefix + name, start, length, etag))

    def read_whole(self, name: str, etag: str) -> tuple[bytes, str]:
        """A small object.

        Args:
            name: relative to this folder.
            etag: the tag that the object must still have; empty for whatever there is.

        Returns:
            Its content, and the SHA-256 that our uploads note with it; empty where a stranger's did not.

        Raises:
            DraftModelError: the object changed, or the store refuses or cannot be reached.
        """
        with errors(f"{self.uri}/{name}"):
            data, noted = self._small.get(self.prefix + name, etag)
        return data, noted.get(HASH, "")

    def noted_hash(self, name: str) -> str:
        """The SHA-256 that our uploads note with an object; empty where a stranger's did not."""
        with errors(f"{self.uri}/{name}"):
            return client().head_object(Bucket=self.bucket, Key=self.prefix + name)["Metadata"].get(HASH, "")

    def holds(self, record: FileRecord) -> bool:
        """Whether the object is there already, with the recorded size, and SHA-256 among its metadata."""
        with errors(f"{self.uri}/{record.path}"):
            try:
                head = client().head_object(Bucket=self.bucket, Key=self.prefix + record.path)
            except ClientError as error:
                if _is_missing(error):
                    return False
                raise
        return head["ContentLength"] == record.size and head["Metadata"].get(HASH) == record.sha256

    def put(self, sources: Mapping[str, Path]) -> list[FileRecord]:
        """Uploads files that are not there yet, several at once.

        Args:
            sources: the local file for each name relative to this folder.

        Returns:
            Their records, in the same order.

        Raises:
            DraftModelError: where the store refuses or cannot be reached, or a file changes meanwhile.
        """
        sizes = {name: path.stat().st_size for name, path in sources.items()}
        there = self._found(sources)
        stop, turn = threading.Event(), threading.BoundedSemaphore(LARGE_AT_ONCE)

        def send(name: str) -> FileRecord:
            path, size = sources[name], sizes[name]
            found = there.get(name)
            with local_errors(str(path)):
                if found and found.size == size and found.etag.strip('"') == _etag_of(path, self.part_size(size)):
                    advance(size)
                    return record_of(path, name)
                with LocalContent(path).open() as reader, turn if size > PART_SIZE else nullcontext():

                    def read(offset: int, length: int) -> bytes:
                        if offset + length == size:  # before the last part is sent, and the object appears
                            check_size(size, path.stat().st_size, str(path))
                        return reader(offset, length)

                    parts = Parts(read, size, self.part_size(size), pool, stop, advance)
                    self.receive(name, "", parts)
            return parts.sums.record(name)

        with progress(f"to {self.uri}", sum(sizes.values())) as advance, ThreadPoolExecutor(LARGE_AT_ONCE) as pool:
            return run_all(send, sources, abort=stop.set, at_once=REQUESTS_AT_ONCE)

    def _found(self, names: Collection[str]) -> dict[str, ListedObject]:
        """Those of these objects that are there; many are asked for by one listing."""
        if len(names) > _FEW:
            return {found.name: found for found in self._list()}
        looked = [self._find(name) for name in names]
        return {found.name: found for found in looked if found is not None}

    def stamp(self, name: str) -> str:
        """Changes with an object's content; empty where there is no such object."""
        found = self._find(name)
        return found.etag if found else ""

    def part_size(self, size: int) -> int:
        """Bytes of the parts in which a file of so many bytes is written; an object has 10,000 at most."""
        return max(PART_SIZE, math.ceil(size / _MOST_PARTS))

    def receive(self, name: str, sha256: str, parts: Parts) -> None:
        """Writes an object; it appears when all of it is there, and the store checks each part's checksum.

        Args:
            name: relative to this folder.
            sha256: of the content, where it is known beforehand; else empty.
            parts: of the content.

        Raises:
            DraftModelError: where the store refuses or cannot be reached.
        """
        with errors(f"{self.uri}/{name}"):
            if parts.size <= PART_SIZE:
                data = b"".join(parts)
                self._small.put(self.prefix + name, data, {HASH: parts.sums.sha256})
            else:
                s3_parts.write(self.bucket, self.prefix + name, parts, {HASH: sha256} if sha256 else {})

    def get(
        self,
        sizes: Mapping[str, int],
        into: Path,
        accept: Accept,
        advance: Advance,
    ) -> None:
        """Downloads files, several at once.

        Args:
            sizes: bytes of each file, by its name relative to this folder, and to the local one.
            into: the local folder.
            accept: looks at each file before it gets its name.
            advance: is told of the bytes.

        Raises:
            DraftModelError: where the store or the file system refuses, or the disk is too small.
        """
        stop, turn = threading.Event(), threading.BoundedSemaphore(LARGE_AT_ONCE)

        def bring(name: str) -> None:
            key, size = self.prefix + name, sizes[name]
            with errors(f"{self.uri}/{name}"), local_errors(str(into)), landing(into / name) as partial:
                if size <= PART_SIZE:
                    data, _ = self._small.get(key)
                    partial.write_bytes(data)
                    advance(len(data))
                    sums: tuple[int, ...] = (crc32c(data),) if data else ()
                else:
                    with turn:
                        there = self._head(name)
                        sums = s3_parts.read_to_file(self.bucket, key, there.size, there.etag, partial, stop, advance)
                accept(name, partial, sums)

        check_free_disk(into, sum(sizes.values()))
        run_all(bring, sizes, abort=stop.set, at_once=REQUESTS_AT_ONCE)

    def list_objects(self) -> list[ListedObject]:
        """All objects of the folder, for a folder that has no manifest.

        Raises:
            DraftModelError: where the store refuses, or a key would lead out of the folder.
        """
        found = self._list()
        for listed in found:
            check_name(listed.name, self.uri)
        return found

    def _list(self) -> list[ListedObject]:
        with errors(self.uri):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            return [
                ListedObject(item["Key"].removeprefix(self.prefix), item["Size"], item["LastModified"], item["ETag"])
                for page in pages
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")  # consoles make such empty objects to show a folder
            ]


def _etag_of(path: Path, part_size: int) -> str:
    """The tag that stores give an object with this file's content; where one encrypts it, another."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if size <= part_size:
            return hashlib.file_digest(file, _md5).hexdigest()
        parts = [_md5(os.pread(file.fileno(), part_size, at)).digest() for at in range(0, size, part_size)]
    return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def _is_missing(error: ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") == "404"
