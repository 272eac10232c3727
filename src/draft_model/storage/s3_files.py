"""Files between this disk and an object store, by the AWS Common Runtime (awscrt).

It cuts large files into parts, moves them in parallel, each with a checksum, and tries again what broke, natively:
a request of boto3's takes more than a millisecond of Python, which is most of what a small file costs. The SHA-256 is
taken meanwhile.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from awscrt.auth import AwsCredentialsProvider
from awscrt.exceptions import AwsCrtError
from awscrt.http import HttpHeaders, HttpRequest
from awscrt.io import ClientBootstrap, ClientTlsContext, DefaultHostResolver, EventLoopGroup, TlsContextOptions
from awscrt.s3 import (
    S3ChecksumAlgorithm,
    S3ChecksumConfig,
    S3ChecksumLocation,
    S3Client,
    S3RequestTlsMode,
    S3RequestType,
    S3ResponseError,
    S3RetryConfig,
    create_default_s3_signing_config,
)
from botocore.exceptions import ClientError, HTTPClientError
from botocore.httpsession import get_cert_path
from s3transfer.crt import BotocoreCRTCredentialsWrapper

from draft_model.errors import DraftModelError
from draft_model.storage.manifest import FileRecord, check_size
from draft_model.storage.s3_client import REQUESTS_AT_ONCE, Settings, client, credentials, settings
from draft_model.storage.transfer import Advance

HASH = "sha256"
"""Name of the metadata that says an object's SHA-256."""
_MOST_THREADS = 8
_BLOCK = 4 * 2**20
_md5 = functools.partial(hashlib.md5, usedforsecurity=False)
_one_at_a_time = threading.Lock()
_CODE = re.compile(rb"<Code>([^<]+)</Code>")
_UPLOAD_CHECKSUM = S3ChecksumConfig(algorithm=S3ChecksumAlgorithm.CRC32, location=S3ChecksumLocation.HEADER)


class FileTransfers:
    """Uploads and downloads of one bucket, which can be ended together.

    Args:
        bucket: its name.
        part_size: bytes; larger files go in parts.
    """

    def __init__(self, bucket: str, part_size: int) -> None:
        with _one_at_a_time:
            tls, self._host, self._path = _address(os.getpid(), settings(), bucket)
            self._client = _native_client(os.getpid(), settings(), tls, part_size)
        self._under_way: set[Any] = set()
        self._ended = False

    def upload(self, path: Path, key: str, size: int, part_size: int, advance: Advance) -> str:
        """Sends a file.

        Args:
            path: the file.
            key: of the object.
            size: bytes of the file.
            part_size: bytes of its parts.
            advance: is told of the bytes.

        Returns:
            The SHA-256.

        Raises:
            DraftModelError: the file is no longer of that size.
            ClientError: the store refuses.
            HTTPClientError: it cannot be reached.
        """
        sending = self._send(key, size, part_size, advance, {}, path=str(path))
        with path.open("rb", buffering=0) as file:
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
            record = FileRecord(key, size, digest.hexdigest())
            try:
                check_size(record, file.tell(), str(path))
            except DraftModelError:
                sending.cancel()
                raise
        self._finish(sending, "PutObject")
        return record.sha256

    def upload_parts(self, parts: Iterable[bytes], key: str, size: int, part_size: int, sha256: str) -> None:
        """Sends what comes in parts; the object appears when all of it is there.

        Args:
            parts: of the content. The runtime's own threads wait for them: they must not come by this class.
            key: of the object.
            size: bytes of all parts.
            part_size: bytes of a part.
            sha256: is noted with the object, where it is known.

        Raises:
            Exception: what the parts raise.
            ClientError: the store refuses.
            HTTPClientError: it cannot be reached.
        """
        body = _Body(parts)
        sending = self._send(key, size, part_size, lambda _: None, {HASH: sha256} if sha256 else {}, body=body)
        try:
            self._finish(sending, "PutObject")
        finally:
            if body.error:
                raise body.error

    def download(self, key: str, path: Path, advance: Advance) -> str:
        """Brings an object; every part is of the same version of it.

        Args:
            key: of the object.
            path: of the file to write.
            advance: is told of the bytes.

        Returns:
            The SHA-256.

        Raises:
            ClientError: the store refuses.
            HTTPClientError: it cannot be reached.
            OSError: the file cannot be written.
        """
        digest = hashlib.sha256()
        with path.open("wb", buffering=0) as file:

            def write(chunk: bytes, offset: int, **_: Any) -> None:
                if offset != file.tell():
                    raise RuntimeError(f"{key}: {offset} came after {file.tell()}")
                left = memoryview(chunk)
                while left:
                    left = left[file.write(left) :]
                digest.update(chunk)

            self._finish(
                self._begin(
                    advance,
                    type=S3RequestType.GET_OBJECT,
                    request=HttpRequest("GET", self._path + quote(key), HttpHeaders([("Host", self._host)])),
                    on_body=write,  # in order, in a thread of the runtime's
                ),
                "GetObject",
            )
        return digest.hexdigest()

    def end(self) -> None:
        """Cancels what is under way, and what is begun after this."""
        self._ended = True
        for request in list(self._under_way):
            request.cancel()

    def _send(
        self,
        key: str,
        size: int,
        part_size: int,
        advance: Advance,
        metadata: Mapping[str, str],
        path: str | None = None,
        body: io.RawIOBase | None = None,
    ) -> Any:
        noted = [(f"x-amz-meta-{name}", value) for name, value in metadata.items()]
        headers = HttpHeaders([("Host", self._host), ("Content-Length", str(size)), *noted])
        return self._begin(
            advance,
            type=S3RequestType.PUT_OBJECT,
            request=HttpRequest("PUT", self._path + quote(key), headers, body),
            send_filepath=path,
            checksum_config=_UPLOAD_CHECKSUM,
            part_size=part_size,
            multipart_upload_threshold=part_size,
        )

    def _begin(self, advance: Callable[[int], object], **what: Any) -> Any:
        request = self._client.make_request(on_progress=advance, **what)
        self._under_way.add(request)
        if self._ended:
            request.cancel()
        return request

    def _finish(self, request: Any, operation: str) -> None:
        try:
            request.finished_future.result()
        except AwsCrtError as error:
            raise _as_botocore(error, operation) from error
        finally:
            self._under_way.discard(request)


class _Body(io.RawIOBase):
    """A file of parts that are made as it is read.

    What they raise is kept, and the file ends there: too early for the request, which fails by that.
    """

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts, self._left = iter(parts), memoryview(b"")
        self.error: BaseException | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._left and (part := next(self._parts, None)) is not None:
                self._left = memoryview(part)
        except BaseException as error:
            self.error = error
            return 0
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def etag_of(path: Path, part_size: int) -> str:
    """The tag that stores give an object with this file's content; where one encrypts it, another.

    Args:
        path: the file.
        part_size: bytes of the parts it is sent in.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if size <= part_size:
            return hashlib.file_digest(file, _md5).hexdigest()
        parts = [_md5(os.pread(file.fileno(), part_size, at)).digest() for at in range(0, size, part_size)]
    return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def _as_botocore(error: AwsCrtError, operation: str) -> Exception:
    """What boto3 would raise, so that each refusal is said in words in one place."""
    if isinstance(error, S3ResponseError):
        code = _CODE.search(error.body or b"")
        said = {
            "Error": {"Code": code[1].decode(errors="replace") if code else str(error.status_code)},
            "ResponseMetadata": {"HTTPStatusCode": error.status_code},
        }
        return ClientError(said, error.operation_name or operation)  # type: ignore[arg-type]
    if error.name == "AWS_ERROR_S3_OBJECT_MODIFIED":
        return ClientError({"Error": {"Code": "PreconditionFailed"}}, operation)
    return HTTPClientError(error=error)


@functools.lru_cache(maxsize=16)
def _address(process: int, settings: Settings, bucket: str) -> tuple[bool, str, str]:
    """Whether by TLS, host, and the path before keys: botocore knows all the rules of addressing."""
    url = urlsplit(client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "key"}))
    return url.scheme == "https", url.netloc.rpartition("@")[2], url.path.removesuffix("key")


@functools.lru_cache(maxsize=4)
def _native_client(process: int, settings: Settings, tls: bool, part_size: int) -> Any:
    # AWS_MAX_ATTEMPTS
    attempts = client().meta.config.retries.get("total_max_attempts", 0)  # type: ignore[attr-defined]
    loops = EventLoopGroup(min(os.cpu_count() or 1, _MOST_THREADS))
    region = client().meta.region_name or "us-east-1"
    provider: AwsCredentialsProvider = BotocoreCRTCredentialsWrapper(credentials()).to_crt_credentials_provider()
    trust = None
    if tls:
        options = TlsContextOptions()
        options.override_default_trust_store_from_path(None, os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True))
        trust = ClientTlsContext(options).new_connection_options()
    return S3Client(
        bootstrap=ClientBootstrap(loops, DefaultHostResolver(loops)),
        region=region,
        tls_mode=S3RequestTlsMode.ENABLED if tls else S3RequestTlsMode.DISABLED,
        tls_connection_options=trust,
        signing_config=create_default_s3_signing_config(region=region, credential_provider=provider),
        part_size=part_size,
        max_active_connections_override=REQUESTS_AT_ONCE,
        retry_config=S3RetryConfig(max_retries=max(attempts - 1, 1) if attempts else 0),  # 0: its own number
    )
