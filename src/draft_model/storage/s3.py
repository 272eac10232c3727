"""A folder in an S3 object store: AWS, MinIO, SeaweedFS, Ceph.

Endpoint, region and credentials come from where every AWS tool takes them (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, a role, a profile) and from nowhere else. An object appears when it is complete, so nothing
is renamed; what a folder holds is known from its manifest, so nothing is listed but the folders of strangers.
Files go in parallel, and large ones in parts, all through one pool of connections.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from s3transfer.exceptions import RetriesExceededError

from draft_model.errors import DraftModelError
from draft_model.storage.local import landing
from draft_model.storage.manifest import FileRecord, check_size
from draft_model.storage.transfer import FILES_AT_ONCE, Advance, check_free_disk, local_errors, run_all
from draft_model.storage.uri import ObjectAddress, check_name

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from s3transfer.futures import TransferFuture

PART_SIZE = 8 * 2**20
REQUESTS_AT_ONCE = 16
_HASH = "sha256"
"""Name of the metadata that says an object's SHA-256."""

_CHECK_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where the keys are temporary)"
_NO_KEYS = (
    "there are no credentials for the object store; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
    "this machine or pod a role"
)
_DENIED = f"access denied; {_CHECK_KEYS}, and that they may list (s3:ListBucket), read, write and delete there"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to that"
_SENTENCES = {
    "NoSuchBucket": "there is no such bucket; create it or correct its name",
    "404": "there is no such bucket or object; check the URI",
    "NoSuchKey": "there is no such object; check the URI",
    "403": _DENIED,
    "AccessDenied": _DENIED,
    "SignatureDoesNotMatch": f"the store refuses the keys; {_CHECK_KEYS}",
    "InvalidAccessKeyId": f"the store does not know the access key; {_CHECK_KEYS}",
    "InvalidToken": f"the store refuses the session token; {_CHECK_KEYS}",
    "ExpiredToken": f"the keys have expired; {_CHECK_KEYS}",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "301": _REGION,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "507": "the object store is full; free some space there",
    "XMinioStorageFull": "the object store is full; free some space there",
    "QuotaExceeded": "the bucket's quota is used up; free some space there",
}


@dataclass(frozen=True)
class ListedObject:
    """What a store says of an object.

    Attributes:
        name: relative to its folder.
        size: bytes.
        modified: when it was written.
    """

    name: str
    size: int
    modified: datetime


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Says in words, and without a secret, what the store refuses; its own answer stays as the cause."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        unknown = f"the object store refuses {error.operation_name} with {code or 'no code'}; see its log"
        raise DraftModelError(f"{uri}: {_SENTENCES.get(code, unknown)}") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise DraftModelError(f"{uri}: {_NO_KEYS}") from error
    except ParamValidationError as error:
        raise DraftModelError(f"{uri}: S3 allows no such bucket or key; correct the URI") from error
    except (NoConnectionError, HTTPClientError, RetriesExceededError) as error:
        raise DraftModelError(
            f"{uri}: the object store at {_endpoint()} cannot be reached; check AWS_ENDPOINT_URL (host, "
            "port, http or https), the network and that the store is running"
        ) from error
    except BotoCoreError as error:
        raise DraftModelError(
            f"{uri}: the AWS client gives up: {error}; try again, and check the AWS_* environment variables"
        ) from error


def _endpoint() -> str:
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not given:
        return "AWS (AWS_ENDPOINT_URL is not set)"
    parts = urlsplit(given)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # a user and password stay out of messages


def client() -> S3Client:
    """The process's client for the environment as it is now.

    Raises:
        DraftModelError: where the environment's AWS settings cannot be used.
    """
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _client(os.getpid(), tuple(sorted(settings.items())))


@functools.lru_cache(maxsize=4)
def _client(process: int, settings: tuple[tuple[str, str], ...]) -> S3Client:
    # The arguments are the cache's key: a forked process shares no sockets, new settings get a new client.
    own = any(name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3") and value for name, value in settings)
    config = Config(
        retries={"mode": "standard"},
        connect_timeout=10,
        max_pool_connections=REQUESTS_AT_ONCE + FILES_AT_ONCE,
        s3={"addressing_style": "path" if own else "auto"},
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise DraftModelError(
            f"AWS_ENDPOINT_URL: given {_endpoint()!r}; allowed: http://host:port or https://host:port"
        ) from error
    except BotoCoreError as error:
        raise DraftModelError(f"{error}; check the AWS_* environment variables") from error


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
        with _errors(f"{self.uri}/{name}"):
            try:
                return client().get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read()
            except client().exceptions.NoSuchKey:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a small object."""
        with _errors(f"{self.uri}/{name}"):
            client().put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data)

    def remove(self, name: str) -> None:
        """Removes an object; that there is none is no error."""
        with _errors(f"{self.uri}/{name}"):
            client().delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        with _errors(f"{self.uri}/{name}"):
            try:
                # Not HEAD: its answer has no body, so a mistyped bucket would look like a missing object.
                client().get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].close()
            except client().exceptions.NoSuchKey:
                return False
        return True

    def look(self, name: str) -> ListedObject:
        """An object's size and time.

        Raises:
            DraftModelError: where there is no such object.
        """
        with _errors(f"{self.uri}/{name}"):
            head = client().head_object(Bucket=self.bucket, Key=self.prefix + name)
        return ListedObject(name, head["ContentLength"], head["LastModified"])

    def holds(self, record: FileRecord) -> bool:
        """Whether the object is there already, with the recorded size, and SHA-256 among its metadata."""
        with _errors(f"{self.uri}/{record.path}"):
            try:
                head = client().head_object(Bucket=self.bucket, Key=self.prefix + record.path)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") == "404":
                    return False
                raise
        return head["ContentLength"] == record.size and head["Metadata"].get(_HASH) == record.sha256

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
            with _errors(f"{self.uri}/{record.path}"), local_errors(str(source)):
                upload = transfers.manager.upload(
                    str(source),
                    self.bucket,
                    key,
                    extra_args={"Metadata": {_HASH: record.sha256}},
                    subscribers=[ProgressCallbackInvoker(advance)],
                )
                transfers.finish(upload)
                head = client().head_object(Bucket=self.bucket, Key=key)
            check_size(record, head["ContentLength"], str(source))

        with _Transfers() as transfers:
            run_all(send, sources.items(), abort=transfers.end)

    def get(
        self,
        names: Iterable[str],
        into: Path,
        size: int,
        accept: Callable[[str, Path], None],
        advance: Advance,
    ) -> None:
        """Downloads files, several at once.

        Args:
            names: relative to this folder, and to the local one.
            into: the local folder.
            size: bytes of all of them.
            accept: looks at each file before it gets its name, and raises where it must not.
            advance: is told of the bytes.

        Raises:
            DraftModelError: where the store or the file system refuses, or the disk is too small.
        """

        def receive(name: str) -> None:
            with _errors(f"{self.uri}/{name}"), local_errors(str(into)), landing(into / name) as partial:
                download = transfers.manager.download(
                    self.bucket,
                    self.prefix + name,
                    str(partial),
                    subscribers=[ProgressCallbackInvoker(advance)],
                )
                transfers.finish(download)
                accept(name, partial)

        check_free_disk(into, size)
        with _Transfers() as transfers:
            run_all(receive, names, abort=transfers.end)

    def list_objects(self) -> list[ListedObject]:
        """All objects of the folder, for a folder that has no manifest.

        Raises:
            DraftModelError: where the store refuses, or a key would lead out of the folder.
        """
        with _errors(self.uri):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            return [
                ListedObject(
                    check_name(item["Key"].removeprefix(self.prefix), self.uri),
                    item["Size"],
                    item["LastModified"],
                )
                for page in pages
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")  # consoles make such empty objects to show a folder
            ]
