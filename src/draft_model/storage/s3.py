"""A folder in an S3 object store (AWS, MinIO, SeaweedFS, Ceph, R2), by boto3 and its transfer manager.

Endpoint, region, credentials, retries and checksums come from where every AWS tool takes them (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_REQUEST_CHECKSUM_CALCULATION, a role, a profile). An object appears when it is complete, so
nothing is renamed; its SHA-256 is in its metadata, so a second upload moves only what differs. botocore retries for
seconds; around it every request is repeated for minutes while the store is away.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.config import Config

from draft_model.errors import DraftModelError, StoreUnavailable, without_credentials
from draft_model.storage.local import LocalFolder, partial_file
from draft_model.storage.manifest import FileRecord
from draft_model.storage.transfer import FILES_AT_ONCE, PATIENCE, Stat, Stopped, check_free_disk, in_parallel, progress
from draft_model.storage.uri import ObjectAddress

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

KFP_STORE = "http://minio-service.kubeflow:9000"
"""The object store of Kubeflow Pipelines, which `minio://` means where no endpoint is set."""
FIRST_ANSWER = 20.0  # seconds to wait for a store that has not answered yet: its address may be wrong
_PAUSES = (0.5, 30.0)  # seconds between two tries: the first, and the longest, doubling
_REQUESTS_PER_FILE = 8
_TRANSFER = TransferConfig(
    multipart_threshold=8 * 2**20,  # bytes; a larger file goes in parts
    multipart_chunksize=16 * 2**20,
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
    ("412", "PreconditionFailed", "InvalidRange"): "the object changed while it was read; try again when it is whole",
    ("507", "XMinioStorageFull", "QuotaExceeded"): "the store is full or the quota of the bucket used up; free some "
    "space there",
    ("NotImplemented",): "the store does not support this request; without x-amz-checksum headers (R2, B2, older Ceph) "
    "it needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required",
}
_BY_CODE = {code: sentence for codes, sentence in _SENTENCES.items() for code in codes}
_BUSY = {
    "429", "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests",
    "NoSuchUpload",  # of an upload in parts whose answer was lost, or that a rule of the bucket ended
}  # fmt: skip


class _NotS3(aws.BotoCoreError):
    """Something else answers at the endpoint, such as a console or a login page."""


def _check_answer(http_response: Any, parsed: Mapping[str, Any], model: Any, **_: Any) -> None:
    """Called by botocore, which makes status 500 of a page with 200 where it expects XML."""
    page = http_response.headers.get("Content-Type", "").startswith(("text/html", "application/json"))
    untagged = model.name in ("GetObject", "HeadObject") and "ETag" not in parsed
    if untagged if http_response.status_code < 300 else (page and http_response.status_code == 500):
        raise _NotS3


_AWAY = (aws.HTTPClientError, aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.IncompleteReadError)
_BY_CLASS: dict[type[Exception] | tuple[type[Exception], ...], str] = {
    _NotS3: "{where} answers, but not as a store does; AWS_ENDPOINT_URL must name the port of its S3 API, and no "
    "console, login page or other server",
    (aws.NoCredentialsError, aws.PartialCredentialsError): "there are no credentials for the object store; set "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine or pod a role",
    # botocore follows a redirect that names no region again and again.
    RecursionError: "{where} redirects every request; correct http or https in AWS_ENDPOINT_URL, or set "
    "AWS_DEFAULT_REGION to the region of the bucket",
    aws.ParamValidationError: "S3 allows no such bucket or key; correct the URI",
    _AWAY: "{where} cannot be reached; check that the store is running, the network, and AWS_ENDPOINT_URL (host, "
    "port, http or https)",
    (aws.BotoCoreError, Boto3Error): "the AWS client gives up: {error}; check the AWS_* environment variables",
}


class Store:
    """boto3's client of the store that the environment names, and whether it has answered."""

    def __init__(self, scheme: str) -> None:
        self.endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if not self.endpoint and scheme == "minio":
            self.endpoint = KFP_STORE
        self._answered = False
        if self.endpoint:
            parts, given = urlsplit(self.endpoint), without_credentials(self.endpoint)
            try:
                valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # the port is no number
                valid = False
            if not valid:
                hint = "" if "://" in given else f", such as http://{given}"
                raise DraftModelError(
                    f"AWS_ENDPOINT_URL: given {given!r}; allowed: http://host:port or https://host:port{hint}"
                )
        config = Config(
            retries={"mode": cast(Any, os.environ.get("AWS_RETRY_MODE", "standard"))},
            connect_timeout=10,
            max_pool_connections=FILES_AT_ONCE * _REQUESTS_PER_FILE,
            s3={"addressing_style": "path" if self.endpoint else "auto"},
        )
        try:
            self.client: S3Client = boto3.session.Session().client("s3", endpoint_url=self.endpoint, config=config)
        except aws.BotoCoreError as error:
            raise DraftModelError(f"{without_credentials(error)}; check the AWS_* environment variables") from error
        self.client.meta.events.register("after-call.s3", _check_answer)

    def request(self, uri: str, work: Callable[[S3Client], Result]) -> Result:
        """Calls `work`, and again while the store is away or too busy; with AWS_MAX_ATTEMPTS=1 only once.

        Raises DraftModelError about the URI where the store refuses (its answer: the cause), StoreUnavailable if away.
        """
        began, pause = time.monotonic(), _PAUSES[0]
        while True:
            try:
                result = work(self.client)
                self._answered = True
                return result
            except (aws.BotoCoreError, aws.ClientError, Boto3Error, OSError, RecursionError) as error:
                problem = self._explain(error, uri)
                if problem is None:
                    raise
                self._answered |= isinstance(problem.__cause__, aws.ClientError)
                away = time.monotonic() - began
                limit = PATIENCE.get() if self._answered else min(FIRST_ANSWER, PATIENCE.get())
                once = os.environ.get("AWS_MAX_ATTEMPTS") == "1"
                if once or away + pause > limit or not isinstance(problem, StoreUnavailable):
                    raise problem from problem.__cause__
                logger.warning("%s; away for %.0f s, next try in %.1f s", problem, away, pause)
                if progress().stop.wait(pause):
                    raise Stopped from error
                pause = min(2 * pause, _PAUSES[1])

    def _explain(self, error: BaseException, uri: str) -> DraftModelError | None:
        """What an exception of boto3 means, without secrets; its cause is the exception. None for those of the disk."""
        if isinstance(error, Boto3Error):  # S3UploadFailedError and RetriesExceededError hide what they are made of
            error = getattr(error, "last_exception", None) or error.__cause__ or error.__context__ or error
        where = f"the object store at {without_credentials(self.endpoint or 'AWS (AWS_ENDPOINT_URL is not set)')}"
        if self.endpoint == KFP_STORE:
            where += " (the store of Kubeflow Pipelines, which minio:// means without AWS_ENDPOINT_URL)"
        token, kind = os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"), DraftModelError
        code, status = _code(error)
        if isinstance(error, aws.ClientError):
            if error.operation_name.startswith("AssumeRole"):
                uri, role = "AWS_ROLE_ARN", os.environ.get("AWS_ROLE_ARN", "of its profile")
                said = without_credentials(error.response.get("Error", {}).get("Message", ""))
                text = (
                    f"STS does not give this process the role {role} ({code}: {said}); check the trust policy of the "
                    "role, the identity provider and the service account"
                )
            elif code in _BUSY or status == 429 or (status >= 500 and code not in _BY_CODE):
                kind = StoreUnavailable
                text = f"the object store is too busy or away ({code or status}); try again later"
            else:
                unknown = f"the object store refuses {error.operation_name} with {code or status or 'no code'}"
                text = _BY_CODE.get(code, f"{unknown}; see its log")
        elif any(sign in str(error) for sign in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")):
            text = (
                f"no trusted TLS connection to {where}; set AWS_CA_BUNDLE to the file of its certificate authority, or "
                "correct http or https in AWS_ENDPOINT_URL"
            )
        elif isinstance(error, OSError) and token and error.filename == token:
            uri = "AWS_WEB_IDENTITY_TOKEN_FILE"
            text = (
                f"given {token!r}, which cannot be read ({error.strerror}); check the service account of the pod and "
                "the annotation of its role, or unset it and AWS_ROLE_ARN"
            )
        elif sentence := next((text for kinds, text in _BY_CLASS.items() if isinstance(error, kinds)), ""):
            kind = StoreUnavailable if isinstance(error, (_NotS3, *_AWAY)) else DraftModelError
            text = sentence.format(where=where, error=without_credentials(error))
        else:
            return None
        problem = kind(f"{uri}: {text}")
        problem.__cause__ = error
        return problem


def _code(error: BaseException | None) -> tuple[str, int]:
    """Error code and HTTP status of what the store refused."""
    response: Any = error.response if isinstance(error, aws.ClientError) else {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return "NotImplemented" if status == 501 else response.get("Error", {}).get("Code", ""), status


def store(scheme: str = "s3") -> Store:
    """Store of this process for the environment as it is now; a forked process shares no sockets."""
    for name, value in list(os.environ.items()):
        if name.startswith("AWS_") and (value != value.strip() or not value):
            del os.environ[name]  # Secrets made by `echo` end with a line break; blank means unset
            if value.strip():
                os.environ[name] = value.strip()
    return _store(scheme, os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.cache
def _store(scheme: str, *_process_and_environment: object) -> Store:
    return Store(scheme)


class S3Folder:
    """A prefix of a bucket to publish to and fetch from; `uri` is its name in messages."""

    def __init__(self, address: ObjectAddress, uri: str) -> None:
        self.bucket = address.bucket
        self.prefix = f"{address.key}/" if address.key else ""
        self.uri = uri.removesuffix("/")
        self.store = store(address.scheme)

    def _request(self, name: str, work: Callable[[Any, dict[str, Any]], Result]) -> Result:
        """Calls `work` with the client and the object's Bucket and Key."""
        to = {"Bucket": self.bucket, "Key": self.prefix + name}
        return self.store.request(f"{self.uri}/{name}", lambda client: work(client, to))

    def _request_if_there(self, name: str, work: Callable[[Any, dict[str, Any]], Result]) -> Result | None:
        try:
            return self._request(name, work)
        except DraftModelError as error:
            if _code(error.__cause__)[0] in _MISSING:
                return None
            raise

    def read(self, name: str, limit: int = 2**63) -> tuple[bytes, str] | None:
        """Content of an object and its version (its ETag), or None where there is no such object."""

        def get(client: S3Client, to: Any) -> tuple[bytes, str]:
            answer = client.get_object(**to)
            if answer["ContentLength"] > limit:
                raise DraftModelError(f"{self.uri}/{name} is larger than {limit} bytes, so it is not what it should be")
            return answer["Body"].read(), answer["ETag"]

        return self._request_if_there(name, get)

    def read_range(self, name: str, offset: int, length: int, version: str = "") -> bytes:
        """Bytes [offset, offset + length) of an object, fewer at its end; refused if its version (ETag) is another."""
        span = {"Range": f"bytes={offset}-{offset + length - 1}"} | ({"IfMatch": version} if version else {})
        return bytes(self._request(name, lambda client, to: client.get_object(**to, **span)["Body"].read()))

    def head(self, name: str) -> HeadObjectOutputTypeDef | None:
        """What the store says of an object, or None where there is no such object."""
        return self._request_if_there(name, lambda client, to: client.head_object(**to))

    def stat(self, name: str) -> Stat | None:
        """Size, stamp (ETag) and time of an object, or None where there is no such object."""
        head = self.head(name)
        return Stat(head["ContentLength"], head["ETag"], head["LastModified"].timestamp()) if head else None

    def has(self, record: FileRecord) -> bool:
        """Whether an object is there with the content of its record; one without SHA-256 in its metadata is read."""
        if (head := self.head(record.path)) is None or head["ContentLength"] != record.size:
            return False
        return self._sha256(record.path, head) == record.sha256

    def _sha256(self, name: str, head: HeadObjectOutputTypeDef) -> str:
        def read(client: S3Client, to: Any) -> str:
            body: Any = client.get_object(**to, IfMatch=head["ETag"])["Body"]
            return hashlib.file_digest(body, "sha256").hexdigest()

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
        tries = itertools.count()
        try:
            self._request(name, lambda client, to: (next(tries), client.put_object(**to, Body=data, **condition)))
        except DraftModelError as error:
            code, status = _code(error.__cause__)
            if code == "NotImplemented":
                raise DraftModelError(
                    f"{self.uri}/{name}: the store does not support conditional writes ({', '.join(condition)}), which "
                    "keep two runs out of one folder; use another store or a folder on a disk"
                ) from error.__cause__
            if status not in (409, 412) and code != "NoSuchKey":
                raise
            repeated = next(tries) > 1 or cast(Any, error.__cause__).response["ResponseMetadata"].get("RetryAttempts")
            # An earlier try may have been written although its answer was lost.
            return bool(repeated) and (found := self.read(name)) is not None and found[0] == data
        return True

    def remove(self, name: str, version: str | None = None) -> bool:
        """Removes an object, if it has this version where one is given; that there is none is no error."""
        if version is None:
            self._request(name, lambda client, to: client.delete_object(**to))
            return True
        if (found := self.head(name)) is None or found["ETag"] != version:
            return False
        try:
            self._request(name, lambda client, to: client.delete_object(**to, IfMatch=version))
        except DraftModelError as error:
            code, status = _code(error.__cause__)
            if code == "NotImplemented":
                return self.remove(name)
            if status not in (404, 409, 412):
                raise
            return False
        return True

    def remove_all(self) -> None:
        """Removes every object of the folder, and the parts of unfinished uploads."""
        in_parallel(self.remove, self.files())

        def abort(client: S3Client) -> None:
            for upload in client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix).get("Uploads", []):
                client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

        self.store.request(self.uri, abort)

    def files(self) -> dict[str, Stat]:
        """What `stat` says of every object below the folder, by their relative names."""

        def list_all(client: S3Client) -> dict[str, Stat]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            return {
                name: Stat(item["Size"], item["ETag"], item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", [])
                # Consoles make empty objects that end with a slash to show a folder.
                if (name := item["Key"].removeprefix(self.prefix)) and not name.endswith("/")
            }

        return self.store.request(self.uri, list_all)

    def put(self, path: Path, record: FileRecord) -> None:
        """Uploads a local file to its name in the folder."""
        more = {"ExtraArgs": {"Metadata": {_HASH: record.sha256}}, "Config": _TRANSFER, "Callback": progress()}
        self._request(record.path, lambda client, to: client.upload_file(str(path), **to, **more))

    def get(self, sizes: Mapping[str, int], folder: LocalFolder, accept: Callable[[str, Path], None]) -> None:
        """Downloads objects of these sizes by name; `accept` checks each file before it gets its name."""

        def receive(name: str) -> None:
            target = folder.inside(name, write=True)
            more = {"Config": _TRANSFER, "Callback": progress()}
            with partial_file(target) as partial:
                self._request(name, lambda client, to: client.download_file(**to, Filename=str(partial), **more))
                accept(name, partial)
                partial.replace(target)

        folder.path.mkdir(parents=True, exist_ok=True)
        check_free_disk(folder.path, sum(sizes.values()))
        in_parallel(receive, sizes, f"from {self.uri}", sum(sizes.values()))

    def copy(self, source: S3Folder, names: Iterable[str]) -> list[FileRecord]:
        """Copies objects within the store; one without SHA-256 in its metadata is read once for it, and not kept."""

        def copy(name: str) -> FileRecord:
            head, there = source.head(name), self.head(name)
            if head is None:
                raise DraftModelError(f"{source.uri}/{name}: {_BY_CODE['404']}")
            etag, size = head["ETag"], head["ContentLength"]
            if there and there["ContentLength"] == size and there["Metadata"].get(_SOURCE) == etag.strip('"'):
                return FileRecord(name, size, there["Metadata"][_HASH])
            noted = {_HASH: source._sha256(name, head), _SOURCE: etag.strip('"')}
            extra = {"Metadata": noted, "MetadataDirective": "REPLACE", "CopySourceIfMatch": etag}
            more = {"ExtraArgs": extra, "Config": _TRANSFER, "Callback": progress()}
            origin = {"Bucket": source.bucket, "Key": source.prefix + name}
            self._request(name, lambda client, to: client.copy(origin, **to, **more))
            return FileRecord(name, size, noted[_HASH])

        return in_parallel(copy, names)
