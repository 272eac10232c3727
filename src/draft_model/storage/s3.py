"""A folder in an S3 object store (AWS, MinIO, SeaweedFS, Ceph, R2), by boto3 and its transfer manager.

Endpoint, region, credentials, retries and checksums come from where every AWS tool takes them (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_REQUEST_CHECKSUM_CALCULATION, a role, a profile). An object appears when it is complete, so
nothing is renamed; its SHA-256 is in its metadata, so a second upload moves only what differs. botocore retries for
seconds; around it every request is repeated for minutes while the store is away.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.storage.local import CHANGED, LocalFolder, partial_file
from draft_model.storage.manifest import FileRecord, record_of
from draft_model.storage.transfer import (
    FILES_AT_ONCE,
    PATIENCE,
    Advance,
    Stopped,
    check_free_disk,
    in_parallel,
    local_errors,
)
from draft_model.storage.uri import ObjectAddress, without_credentials

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

KFP_STORE = "http://minio-service.kubeflow:9000"
"""The object store of Kubeflow Pipelines, which `minio://` means where no endpoint is set."""
PART_SIZE = 8 * 2**20
"""Bytes; a larger file goes in parts."""
FIRST_ANSWER = 20.0
"""Seconds to wait for a store that has not answered yet: its address may be wrong."""
_PAUSES = (0.5, 30.0)
"""Seconds between two tries: the first, and the longest, doubling."""
_REQUESTS_PER_FILE = 8
_TRANSFER = TransferConfig(
    multipart_threshold=PART_SIZE,
    multipart_chunksize=2 * PART_SIZE,
    max_concurrency=_REQUESTS_PER_FILE,
    io_chunksize=2**20,
    preferred_transfer_client="classic",  # the CRT client failed with an endpoint of its own when it was tried
)
_HASH, _SOURCE = "sha256", "source-etag"
"""Metadata of our objects: SHA-256 of the content, and ETag of the object that it was copied from."""
_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where the keys are temporary)"
_MISSING = ("404", "NoSuchKey")
_SENTENCES = {
    ("NoSuchBucket",): "there is no such bucket; create it or correct its name",
    _MISSING: "there is no such bucket or object; check the URI",
    ("403", "AccessDenied"): f"access denied; {_KEYS}, and that they may list (s3:ListBucket), read, write and delete",
    ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken"): f"the store refuses the keys; {_KEYS}",
    ("ExpiredToken",): f"the keys have expired; {_KEYS}",
    ("RequestTimeTooSkewed",): "the clock of this machine is wrong; set it",
    ("301", "PermanentRedirect", "AuthorizationHeaderMalformed"): "the bucket is in another region; set "
    "AWS_DEFAULT_REGION to that",
    ("412", "PreconditionFailed"): "the object changed while it was read; try again when it is whole",
    ("507", "XMinioStorageFull", "QuotaExceeded"): "the store is full or the quota of the bucket used up; free some "
    "space there",
    ("NotImplemented",): "the store does not support this request; without x-amz-checksum headers (R2, B2, older Ceph) "
    "it needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required",
}
_BY_CODE = {code: sentence for codes, sentence in _SENTENCES.items() for code in codes}
_BUSY = {"429", "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests"}
_FOREIGN = (ClientError, BotoCoreError, Boto3Error, OSError, RecursionError)


class Store:
    """boto3's client of the store that the environment names, and whether it has answered."""

    def __init__(self, scheme: str) -> None:
        self._endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if not self._endpoint and scheme == "minio":
            self._endpoint = KFP_STORE
        self._answered = False
        if self._endpoint:
            parts, given = urlsplit(self._endpoint), without_credentials(self._endpoint)
            try:
                valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # the port is no number
                valid = False
            if not valid:
                hint = "" if "://" in given else f", such as http://{given}"
                raise DraftModelError(
                    f"AWS_ENDPOINT_URL: given {given!r}; allowed: http://host:port or https://host:port{hint}"
                )
        special: Any = {"addressing_style": "path" if self._endpoint else "auto"}
        config = Config(
            retries={"mode": cast(Any, os.environ.get("AWS_RETRY_MODE", "standard"))},
            connect_timeout=10,
            max_pool_connections=FILES_AT_ONCE * _REQUESTS_PER_FILE,
            s3=special,
        )
        try:
            self.client: S3Client = boto3.session.Session().client("s3", endpoint_url=self._endpoint, config=config)
        except BotoCoreError as error:
            raise DraftModelError(f"{without_credentials(error)}; check the AWS_* environment variables") from error

    def request(self, uri: str, work: Callable[[S3Client], Result], stop: threading.Event | None = None) -> Result:
        """Calls `work`, again while the store is away or too busy; with AWS_MAX_ATTEMPTS=1 only once.

        Args:
            uri: what it is about, for messages.
            work: makes requests that may be repeated.
            stop: ends the waiting between two tries.

        Raises:
            DraftModelError: the store refuses (the answer of the store is the cause) or stays away (StoreUnavailable).
        """
        began, pause = time.monotonic(), _PAUSES[0]
        while True:
            try:
                result = work(self.client)
            except _FOREIGN as error:
                problem = self._explain(error, uri)
                if problem is None:
                    raise
                self._answered |= isinstance(problem.__cause__, ClientError)
                away = time.monotonic() - began
                limit = PATIENCE.get() if self._answered else min(FIRST_ANSWER, PATIENCE.get())
                once = os.environ.get("AWS_MAX_ATTEMPTS") == "1"
                if once or away + pause > limit or not isinstance(problem, StoreUnavailable):
                    raise problem from problem.__cause__
                logger.warning("%s; away for %.0f s, next try in %.1f s", problem, away, pause)
                if (stop or threading.Event()).wait(pause):
                    raise Stopped from error
                pause = min(2 * pause, _PAUSES[1])
            else:
                self._answered = True
                return result

    def _explain(self, error: BaseException, uri: str) -> DraftModelError | None:
        """What an exception of boto3 means, without secrets; its cause is the exception. None for those of the disk."""
        if isinstance(error, Boto3Error):  # S3UploadFailedError and RetriesExceededError hide what they are made of
            error = getattr(error, "last_exception", None) or error.__cause__ or error.__context__ or error
        where = without_credentials(self._endpoint) if self._endpoint else "AWS (AWS_ENDPOINT_URL is not set)"
        if self._endpoint == KFP_STORE:
            where += " (the store of Kubeflow Pipelines, which minio:// means without AWS_ENDPOINT_URL)"
        token, kind = os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"), DraftModelError
        untrusted = any(sign in str(error) for sign in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER"))
        match error:
            case ClientError():
                kind, text = _refusal(error)
            case NoCredentialsError() | PartialCredentialsError():
                text = (
                    "there are no credentials for the object store; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "or give this machine or pod a role"
                )
            case RecursionError():  # botocore follows a redirect that names no region again and again
                text = (
                    f"the object store at {where} redirects every request; correct http or https in AWS_ENDPOINT_URL, "
                    "or set AWS_DEFAULT_REGION to the region of the bucket"
                )
            case ParamValidationError():
                text = "S3 allows no such bucket or key; correct the URI"
            case _ if untrusted:
                text = (
                    f"no trusted TLS connection to the object store at {where}; set AWS_CA_BUNDLE to the file of its "
                    "certificate authority, or correct http or https in AWS_ENDPOINT_URL"
                )
            case HTTPClientError() | EndpointConnectionError() | ConnectTimeoutError() | IncompleteReadError():
                kind = StoreUnavailable
                text = (
                    f"the object store at {where} cannot be reached; check that the store is running, the network, "
                    "and AWS_ENDPOINT_URL (host, port, http or https)"
                )
            case BotoCoreError() | Boto3Error():
                text = f"the AWS client gives up: {without_credentials(error)}; check the AWS_* environment variables"
            case OSError() if token and error.filename == token:
                uri = "AWS_WEB_IDENTITY_TOKEN_FILE"
                text = (
                    f"given {token!r}, which cannot be read ({error.strerror}); check the service account of the "
                    "pod and the annotation of its role, or unset it and AWS_ROLE_ARN"
                )
            case _:
                return None
        if text.startswith("STS "):
            uri = "AWS_ROLE_ARN"
        problem = kind(f"{uri}: {text}")
        problem.__cause__ = error
        return problem


def _refusal(error: ClientError) -> tuple[type[DraftModelError], str]:
    code, status = _code(error)
    if error.operation_name.startswith("AssumeRole"):
        message = without_credentials(error.response.get("Error", {}).get("Message", ""))
        return DraftModelError, (
            f"STS does not give this process the role {os.environ.get('AWS_ROLE_ARN', 'of its profile')} "
            f"({code}: {message}); check the trust policy of the role, the identity provider and the service account"
        )
    if code in _BUSY or status == 429 or (status >= 500 and code not in _BY_CODE):
        return StoreUnavailable, f"the object store is too busy or away ({code or status}); try again later"
    unknown = f"the object store refuses {error.operation_name} with {code or status or 'no code'}; see its log"
    return DraftModelError, _BY_CODE.get(code, unknown)


def _code(error: BaseException | None) -> tuple[str, int]:
    """Error code and HTTP status of what the store refused."""
    response: Any = error.response if isinstance(error, ClientError) else {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return "NotImplemented" if status == 501 else response.get("Error", {}).get("Code", ""), status


def store(scheme: str = "s3") -> Store:
    """Store of this process for the environment as it is now."""
    for name, value in list(os.environ.items()):
        if name.startswith("AWS_") and (value != value.strip() or not value):
            del os.environ[name]  # Secrets made by `echo` end with a line break; blank means unset
            if value.strip():
                os.environ[name] = value.strip()
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _store(os.getpid(), settings, scheme)


@functools.lru_cache(maxsize=8)
def _store(process: int, settings: tuple[tuple[str, str], ...], scheme: str) -> Store:
    return Store(scheme)  # the arguments are the key of the cache: a forked process shares no sockets


class S3Folder:
    """A prefix of a bucket to publish to and fetch from; `uri` is its name in messages."""

    def __init__(self, address: ObjectAddress, uri: str) -> None:
        self.bucket = address.bucket
        self.prefix = f"{address.key}/" if address.key else ""
        self.uri = uri.removesuffix("/")
        self.store = store(address.scheme)

    def _request(
        self, name: str, work: Callable[[Any, dict[str, Any]], Result], stop: threading.Event | None = None
    ) -> Result:
        """Calls `work` with the client and the object's Bucket and Key."""
        to = {"Bucket": self.bucket, "Key": self.prefix + name}
        return self.store.request(f"{self.uri}/{name}", lambda client: work(client, to), stop)

    def read(self, name: str, limit: int = 2**63) -> tuple[bytes, str] | None:
        """Content of an object and its version (its ETag), or None where there is no such object."""

        def get(client: S3Client, to: Any) -> tuple[bytes, str]:
            answer = client.get_object(**to)
            if answer["ContentLength"] > limit:
                raise DraftModelError(f"{self.uri}/{name} is larger than {limit} bytes, so it is not what it should be")
            return answer["Body"].read(), answer["ETag"]

        return self._unless_missing(lambda: self._request(name, get))

    def read_range(self, name: str, offset: int, length: int, version: str = "") -> bytes:
        """Bytes [offset, offset + length) of an object, fewer at its end; refused if its version (ETag) is another."""
        span: Any = {"Range": f"bytes={offset}-{offset + length - 1}"} | ({"IfMatch": version} if version else {})
        try:
            return bytes(self._request(name, lambda client, to: client.get_object(**to, **span)["Body"].read()))
        except DraftModelError as error:
            if _code(error.__cause__)[1] == 416:  # nothing is there from this offset on
                return b""
            raise

    def _unless_missing(self, ask: Callable[[], Result]) -> Result | None:
        try:
            return ask()
        except DraftModelError as error:
            if _code(error.__cause__)[0] in _MISSING:
                return None
            raise

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name; HEAD would not tell a missing bucket from a missing object."""
        return self._unless_missing(lambda: self.read_range(name, 0, 1)) is not None

    def head(self, name: str) -> HeadObjectOutputTypeDef | None:
        """What the store says of an object, or None where there is no such object."""
        return self._unless_missing(lambda: self._request(name, lambda client, to: client.head_object(**to)))

    def has(self, record: FileRecord) -> bool:
        """Whether an object is there with the content of its record; one without SHA-256 in its metadata is read."""
        head = self.head(record.path)
        same_size = head is not None and head["ContentLength"] == record.size
        return same_size and self._sha256(record.path, cast(Any, head)) == record.sha256

    def _sha256(self, name: str, head: HeadObjectOutputTypeDef) -> str:
        def read(client: S3Client, to: Any) -> str:
            digest = hashlib.sha256()
            for block in client.get_object(**to, IfMatch=head["ETag"])["Body"].iter_chunks(2**20):
                digest.update(block)
            return digest.hexdigest()

        return head["Metadata"].get(_HASH) or self._request(name, read)

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a small object."""
        self._request(name, lambda client, to: client.put_object(**to, Body=data))

    def create(self, name: str, data: bytes) -> bool:
        """Makes a small object unless there is one; of several writers one gets True."""
        return self._put_if(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Replaces a small object if it still has this version; returns whether it did."""
        return self._put_if(name, data, IfMatch=version)

    def _put_if(self, name: str, data: bytes, **condition: str) -> bool:
        tries = 0

        def put(client: S3Client, to: Any) -> None:
            nonlocal tries
            tries += 1
            client.put_object(**to, Body=data, **condition)  # type: ignore[arg-type]

        try:
            self._request(name, put)
        except DraftModelError as error:
            code, status = _code(error.__cause__)
            if code == "NotImplemented":
                raise DraftModelError(
                    f"{self.uri}/{name}: the store does not support conditional writes ({', '.join(condition)}), which "
                    "keep two runs out of one folder; use another store or a folder on a disk"
                ) from error.__cause__
            if status not in (409, 412) and code != "NoSuchKey":
                raise
            answer: Any = cast(ClientError, error.__cause__).response["ResponseMetadata"]
            if tries == 1 and not answer.get("RetryAttempts"):
                return False
            found = self.read(name)  # an earlier try may have been written although its answer was lost
            return found is not None and found[0] == data
        return True

    def remove(self, name: str, version: str | None = None) -> bool:
        """Removes an object, if it has this version where one is given; that there is none is no error."""
        if version is None:
            self._request(name, lambda client, to: client.delete_object(**to))
            return True
        found = self.head(name)
        if found is None or found["ETag"] != version:
            return False
        try:
            self._request(name, lambda client, to: client.delete_object(**to, IfMatch=version))
        except DraftModelError as error:
            if _code(error.__cause__)[0] == "NotImplemented":
                return self.remove(name)
            if _code(error.__cause__)[1] in (404, 409, 412):
                return False
            raise
        return True

    def remove_all(self) -> None:
        """Removes every object of the folder, and the parts of unfinished uploads."""
        in_parallel(lambda name, _: self.remove(name), self.objects())

        def abort(client: S3Client) -> None:
            for upload in client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix).get("Uploads", []):
                client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

        self.store.request(self.uri, abort)

    def objects(self) -> dict[str, tuple[int, str, datetime]]:
        """Size, ETag and time of all objects of the folder by their relative names."""

        def pages(client: S3Client) -> dict[str, tuple[int, str, datetime]]:
            return {
                item["Key"].removeprefix(self.prefix): (item["Size"], item["ETag"], item["LastModified"])
                for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")  # consoles make such empty objects to show a folder
            }

        return self.store.request(self.uri, pages)

    def files(self) -> dict[str, tuple[int, str]]:
        """Size and stamp (ETag) of every object below the folder."""
        return {name: (size, etag) for name, (size, etag, _) in self.objects().items()}

    def put(self, sources: Mapping[str, Path]) -> list[FileRecord]:
        """Uploads local files to their names in the folder, those that are not there yet; returns their records."""

        def send(name: str, advance: Advance) -> FileRecord:
            path = sources[name]
            before = path.stat()
            record = record_of(path, name)
            if self.has(record):
                advance(record.size)
                return record
            more: Any = {"ExtraArgs": {"Metadata": {_HASH: record.sha256}}, "Config": _TRANSFER, "Callback": advance}
            self._request(name, lambda client, to: client.upload_file(str(path), **to, **more), advance.stop)
            after = path.stat()
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                self.remove(name)
                raise DraftModelError(f"{path} {CHANGED}")
            return record

        with local_errors(self.uri):
            return in_parallel(send, sources, f"to {self.uri}", sum(path.stat().st_size for path in sources.values()))

    def get(self, sizes: Mapping[str, int], into: Path, accept: Callable[[str, Path], None]) -> None:
        """Downloads objects of these sizes by name; `accept` checks each file before it gets its name in `into`."""
        with local_errors(str(into)):
            into.mkdir(parents=True, exist_ok=True)
            folder = LocalFolder(into.resolve(), str(into))

            def receive(name: str, advance: Advance) -> None:
                target = folder.inside(name, write=True)
                with partial_file(target) as partial:
                    more: Any = {"Filename": str(partial), "Config": _TRANSFER, "Callback": advance}
                    self._request(name, lambda client, to: client.download_file(**to, **more), advance.stop)
                    accept(name, partial)
                    partial.replace(target)

            check_free_disk(into, sum(sizes.values()))
            in_parallel(receive, sizes, f"from {self.uri}", sum(sizes.values()))

    def copy(self, source: S3Folder, names: Iterable[str]) -> list[FileRecord]:
        """Copies objects within the store; one without SHA-256 in its metadata is read once for it, and not kept."""

        def copy(name: str, advance: Advance) -> FileRecord:
            head, there = source.head(name), self.head(name)
            if head is None:
                raise DraftModelError(f"{source.uri}/{name}: {_BY_CODE['404']}")
            etag, size = head["ETag"], head["ContentLength"]
            if there and there["ContentLength"] == size and there["Metadata"].get(_SOURCE) == etag.strip('"'):
                advance(size)
                return FileRecord(name, size, there["Metadata"][_HASH])

            sha256 = source._sha256(name, head)
            noted = {_HASH: sha256, _SOURCE: etag.strip('"')}
            extra: Any = {"Metadata": noted, "MetadataDirective": "REPLACE", "CopySourceIfMatch": etag}
            origin: Any = {"Bucket": source.bucket, "Key": source.prefix + name}
            more: Any = {"ExtraArgs": extra, "Config": _TRANSFER, "Callback": advance}
            self._request(name, lambda client, to: client.copy(origin, **to, **more), advance.stop)
            return FileRecord(name, size, sha256)

        return in_parallel(copy, names)
