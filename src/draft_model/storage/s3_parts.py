"""Large objects in parts and ranges, several at once, by boto3.

boto3's own transfers copy every byte several times in Python; here a range goes from the socket to the disk in pieces
that stay in the processor's cache, and is taken up again where it was cut.
"""

from __future__ import annotations

import base64
import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from draft_model.storage import manifest
from draft_model.storage.s3_client import client
from draft_model.storage.transfer import Advance, Stopped, run_all

_PARTS_AT_ONCE = 6
"""Of one object that is being written; so many are in memory."""
_RANGES_AT_ONCE = 8
"""Of one object that is read."""
_PIECE = 2**18
"""Bytes; twice as many no longer fit the processor's cache, and take a third longer."""
_ATTEMPTS = 3
"""At a range, each of which brings nothing more; botocore tries requests again, and not their bodies."""


def write(bucket: str, key: str, parts: Iterable[bytes], metadata: Mapping[str, str]) -> None:
    """Makes or replaces an object from its parts; it appears when all of them are there.

    Args:
        bucket: its bucket.
        key: of the object.
        parts: of the content, all but the last at least 5 MiB; the store checks each one's checksum.
        metadata: to be noted with it.

    Raises:
        Exception: what the parts raise; nothing is left of them in the store.
        ClientError: the store refuses.
        HTTPClientError: it cannot be reached.
    """
    store: Any = client(signs_bodies=False)  # each part has a checksum, which costs a fifth of a signature's
    to = {"Bucket": bucket, "Key": key}
    created = store.create_multipart_upload(**to, Metadata=dict(metadata), ChecksumAlgorithm="CRC32C")
    to["UploadId"] = created["UploadId"]

    def send(number: int, part: bytes) -> dict[str, Any]:
        checksum = base64.b64encode(manifest.crc32c(part).to_bytes(4)).decode()
        sent = store.upload_part(**to, PartNumber=number, Body=part, ChecksumCRC32C=checksum)
        return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumCRC32C": checksum}

    try:
        done: list[dict[str, Any]] = []
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            under_way: set[Future[dict[str, Any]]] = set()
            try:
                for number, part in enumerate(parts, 1):
                    under_way.add(pool.submit(send, number, part))
                    if len(under_way) == _PARTS_AT_ONCE:
                        ready, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                        done += [sent.result() for sent in ready]
                done += [sent.result() for sent in under_way]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        done.sort(key=lambda part: part["PartNumber"])
        store.complete_multipart_upload(**to, MultipartUpload={"Parts": done})
    except BaseException:
        with contextlib.suppress(ClientError, BotoCoreError):  # what went wrong first is what is told
            store.abort_multipart_upload(**to)
        raise


def pieces(bucket: str, key: str, start: int, length: int, etag: str) -> Iterator[bytes]:
    """Reads a range of an object.

    Args:
        bucket: its bucket.
        key: of the object.
        start: first byte.
        length: bytes; fewer come where the object ends.
        etag: the tag that the object must have; empty for whatever there is.

    Yields:
        The bytes in order.

    Raises:
        ClientError: the store refuses, or the object has another tag.
        HTTPClientError: it cannot be reached.
        IncompleteReadError: it ends its answers early.
    """
    version: Any = {"IfMatch": etag} if etag else {}
    came = in_vain = 0
    while came < length:
        before = came
        try:
            said = f"bytes={start + came}-{start + length - 1}"
            answer = client().get_object(Bucket=bucket, Key=key, Range=said, **version)
            with contextlib.closing(answer["Body"]) as body:
                while piece := body.read(min(_PIECE, length - came)):
                    came += len(piece)
                    yield piece
            return
        except (IncompleteReadError, HTTPClientError):
            in_vain = in_vain + 1 if came == before else 1
            if in_vain == _ATTEMPTS:
                raise


def read_to_file(
    bucket: str, key: str, size: int, etag: str, path: Path, stop: threading.Event, advance: Advance
) -> tuple[int, ...]:
    """Brings an object, several ranges at once.

    Args:
        bucket: its bucket.
        key: of the object.
        size: bytes of the object.
        etag: its tag, which all that comes must have.
        path: of the file to write.
        stop: set where the transfer is to end early.
        advance: is told of the bytes.

    Returns:
        The checksums of its ranges, as a manifest has them.

    Raises:
        ClientError: the store refuses, or the object changed.
        HTTPClientError: it cannot be reached.
        OSError: the file cannot be written.
    """
    ended = threading.Event()
    with path.open("wb", buffering=0) as file:

        def bring(start: int) -> int:
            at, checksum = start, 0
            for piece in pieces(bucket, key, start, min(manifest.RANGE, size - start), etag):
                if stop.is_set() or ended.is_set():
                    raise Stopped
                checksum = manifest.crc32c(piece, checksum)
                left = memoryview(piece)
                while left:
                    written = os.pwrite(file.fileno(), left, at)
                    at, left = at + written, left[written:]
                advance(len(piece))
            return checksum

        return tuple(run_all(bring, range(0, size, manifest.RANGE), abort=ended.set, at_once=_RANGES_AT_ONCE))
