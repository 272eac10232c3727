"""A folder in an S3 object store: AWS, MinIO, SeaweedFS, Ceph.

An object appears when it is complete, so nothing is renamed; what a folder holds is known from its manifest, so
nothing is listed but the folders of strangers. Files go in parallel, and large ones in parts, all through one pool
of connections.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore.exceptions import (
    ClientError,
    HTTPClientError,
    IncompleteReadError,
)

from draft_model.storage.contents import Reader
from draft_model.storage.local import landing
from draft_model.storage.manifest import FileRecord, check_size
from draft_model.storage.s3_client import REQUESTS_AT_ONCE, client, errors
from draft_model.storage.stream import Parts
from draft_model.storage.transfer import Advance, check_free_disk, local_errors, run_all
from draft_model.storage.uri import ObjectAddress, check_name

if TYPE_CHECKING:
    from s3transfer.futures import TransferFuture

PART_SIZE = 8 * 2**20
_MOST_PARTS = 10_000
_READ_ATTEMPTS = 3
HASH = "sha256"
"""Name of the metadata that says an object's SHA-256."""


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


class _Transfers:
    """Uploads and downloads through one pool of connections, which can be ended together."""

    def __init__(self) -> None:
        config = TransferConfig(
            multipart_threshold=PART_SIZE,
            multipart_chunksize=PART_SIZE,
            max_concurrency=REQUESTS_AT_ONCE,
            preferred_transfer_client="classic",
        )
        self.manager = create_transfer_manager(client(), config)
        self._under_way: list[TransferFuture] = []
        self._ended = False

    def __enter__(self) -> _Transfers:
        return self

    def __exit__(self, *raised: object) -> None:
        self.manager.shutdown()

    def finish(self, transfer: TransferFuture) -> None:
        """Waits for one transfer."""
        self._under_way.append(transfer)
        if self._ended:
            transfer.cancel()
        transfer.result()

    def end(self) -> None:
        """Cancels what is under way, and what is begun after this."""
        self._ended = True
        for transfer in self._under_way:
            transfer.cancel()


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
            head = client().head_object(Bucket=self.bucket, Key=self.prefix + name)
        return ListedObject(name, head["ContentLength"], head["LastModified"], head["ETag"])

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
        version: Any = {"IfMatch": etag} if etag else {}
        with errors(f"{self.uri}/{name}"):
            for attempt in range(1, _READ_ATTEMPTS + 1):
                try:
                    answer = client().get_object(
                        Bucket=self.bucket,
                        Key=self.prefix + name,
                        Range=f"bytes={start}-{start + length - 1}",
                        **version,
                    )
                    return answer["Body"].read()
                except (IncompleteReadError, HTTPClientError):
                    if attempt == _READ_ATTEMPTS:  # botocore tries requests again, and not their bodies
                        raise
        raise AssertionError

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
                if error.response.get("Error", {}).get("Code") == "404":
                    return False
                raise
        return head["ContentLength"] == record.size and head["Metadata"].get(HASH) == record.sha256

    def put(self, sources: Mapping[FileRecord, Path], advance: Advance) -> None:
        """Uploads files, several at once, and looks whether they arrived.

        Args:
            sources: the local file of each record.
            advance: is told of the bytes.

        Raises:
            DraftModelError: where the store refuses or cannot be reached.
        """

        def send(item: tuple[FileRecord, Path]) -> None:
            record, source = item
            key = self.prefix + record.path
            with errors(f"{self.uri}/{record.path}"), local_errors(str(source)):
                if record.size <= PART_SIZE:
                    data = source.read_bytes()
                    check_size(record, len(data), str(source))
                    client().put_object(Bucket=self.bucket, Key=key, Body=data, Metadata={HASH: record.sha256})
                    advance(record.size)
                    return
                upload = transfers.manager.upload(
                    str(source),
                    self.bucket,
                    key,
                    extra_args={"Metadata": {HASH: record.sha256}},
                    subscribers=[ProgressCallbackInvoker(advance)],
                )
                transfers.finish(upload)
                head = client().head_object(Bucket=self.bucket, Key=key)
            check_size(record, head["ContentLength"], str(source))

        with _Transfers() as transfers:
            run_all(send, sources.items(), abort=transfers.end)

    def stamp(self, name: str) -> str:
        """Changes with an object's content; empty where there is no such object."""
        with errors(f"{self.uri}/{name}"):
            try:
                return client().head_object(Bucket=self.bucket, Key=self.prefix + name)["ETag"]
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") == "404":
                    return ""
                raise

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
        bucket, key = self.bucket, self.prefix + name
        with errors(f"{self.uri}/{name}"):
            if parts.size <= PART_SIZE:
                data = b"".join(parts)
                client().put_object(Bucket=bucket, Key=key, Body=data, Metadata={HASH: parts.sha256})
                return
            metadata = {HASH: sha256} if sha256 else {}
            upload = client().create_multipart_upload(Bucket=bucket, Key=key, Metadata=metadata)["UploadId"]

            def put(number: int, data: bytes) -> str:
                return client().upload_part(
                    Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data
                )["ETag"]  # fmt: skip

            try:
                tags = enumerate(parts.pass_on(put), 1)
                client().complete_multipart_upload(
                    Bucket=bucket, Key=key, UploadId=upload,
                    MultipartUpload={"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in tags]},
                )  # fmt: skip
            except BaseException:
                client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
                raise

    def get(
        self,
        sizes: Mapping[str, int],
        into: Path,
        accept: Callable[[str, Path, str], None],
        advance: Advance,
    ) -> None:
        """Downloads files, several at once.

        Args:
            sizes: bytes of each file, by its name relative to this folder, and to the local one.
            into: the local folder.
            accept: looks at each file and its SHA-256 before it gets its name, and raises where it must not.
            advance: is told of the bytes.

        Raises:
            DraftModelError: where the store or the file system refuses, or the disk is too small.
        """
        stop = threading.Event()

        def receive(name: str) -> None:
            with errors(f"{self.uri}/{name}"), local_errors(str(into)), landing(into / name) as partial:
                with partial.open("wb") as file:
                    read = _writing_to(file.fileno(), self._reader(name, sizes[name]))
                    parts = Parts(read, sizes[name], PART_SIZE, pool, stop, advance)
                    for _ in parts:
                        pass
                accept(name, partial, parts.sha256)

        check_free_disk(into, sum(sizes.values()))
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            run_all(receive, sizes, abort=stop.set)

    def _reader(self, name: str, size: int) -> Reader:
        """Reads ranges of one version of an object; a small one is one range."""
        etag = self.look(name).etag if size > PART_SIZE else ""
        return lambda offset, length: self.read_range(name, offset, length, etag)

    def list_objects(self) -> list[ListedObject]:
        """All objects of the folder, for a folder that has no manifest.

        Raises:
            DraftModelError: where the store refuses, or a key would lead out of the folder.
        """
        with errors(self.uri):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            return [
                ListedObject(
                    check_name(item["Key"].removeprefix(self.prefix), self.uri),
                    item["Size"],
                    item["LastModified"],
                    item["ETag"],
                )
                for page in pages
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")  # consoles make such empty objects to show a folder
            ]


def _writing_to(file: int, read: Reader) -> Reader:
    """A reader whose parts are in the file when they are read: each thread writes what it has read."""

    def read_and_write(offset: int, length: int) -> bytes:
        data = read(offset, length)
        written = 0
        while written < len(data):
            written += os.pwrite(file, memoryview(data)[written:], offset + written)
        return data

    return read_and_write
