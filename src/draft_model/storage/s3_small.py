"""Small objects, whole, by obstore (object_store, in Rust).

A request of boto3's takes more than a millisecond of Python, which is most of what a small file costs. Where the bytes
are the cost, boto3 serves (s3_parts.py); it also knows endpoint, keys and certificates, which are asked of it here.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore
from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError
from botocore.httpsession import get_cert_path
from botocore.utils import check_dns_name
from obstore.exceptions import BaseError
from obstore.store import S3Store

from draft_model.storage.s3_client import Settings, client, credentials, has_own_endpoint, settings

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential

_KEYS_FOR = timedelta(minutes=5)
"""Temporary keys are asked for again after this; botocore renews them in time."""
_ATTEMPTS = 3
"""At a request, where AWS_MAX_ATTEMPTS does not say: as many as boto3 makes."""
_one_at_a_time = threading.Lock()
_CODE = re.compile(r"<Code>([^<]+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")


class SmallObjects:
    """Of one bucket of the object store that the environment names now.

    Args:
        bucket: its name.
    """

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        with _one_at_a_time:
            self._store = _store(os.getpid(), settings(), bucket)

    def put(self, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        """Makes or replaces an object.

        Args:
            key: of the object.
            data: the content; its SHA-256 is part of the signature, so the store checks it.
            metadata: to be noted with it.

        Raises:
            ClientError: the store refuses.
            HTTPClientError, SSLError: it cannot be reached.
        """
        try:
            with _as_botocore("PutObject"):
                obstore.put(self._store, key, data, attributes=dict(metadata), use_multipart=False)
        except _CertificateRefused:
            client().put_object(Bucket=self._bucket, Key=key, Body=data, Metadata=dict(metadata))

    def get(self, key: str, etag: str = "") -> tuple[bytes, dict[str, str]]:
        """Reads an object.

        Args:
            key: of the object.
            etag: the tag that it must have; empty for whatever there is.

        Returns:
            The content, and what was noted with it.

        Raises:
            ClientError: the store refuses, or the object has another tag.
            HTTPClientError, SSLError: it cannot be reached.
        """
        try:
            with _as_botocore("GetObject"):
                found = obstore.get(self._store, key, options={"if_match": etag} if etag else None)
                return found.bytes().to_bytes(), dict(found.attributes)
        except _CertificateRefused:
            version: Any = {"IfMatch": etag} if etag else {}
            answer = client().get_object(Bucket=self._bucket, Key=key, **version)
            return answer["Body"].read(), answer["Metadata"]


class _CertificateRefused(Exception):
    """rustls takes no certificate that is its own authority, as stores often have; OpenSSL, and so boto3, decides."""


@contextmanager
def _as_botocore(operation: str) -> Iterator[None]:
    """What boto3 would raise, so that each refusal is said in words in one place."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        said = str(error)
        status = _STATUS.search(said)
        if "InvalidCertificate" in said:
            raise _CertificateRefused from error
        if status is None:
            raise HTTPClientError(error=error) from error
        code = _CODE.search(said)
        raise ClientError(
            {
                "Error": {"Code": code[1] if code else status[1]},
                "ResponseMetadata": {"HTTPStatusCode": int(status[1])},  # type: ignore[typeddict-item]
            },
            operation,
        ) from error


@functools.lru_cache(maxsize=16)
def _store(process: int, settings: Settings, bucket: str) -> S3Store:
    url = urlsplit(client().meta.endpoint_url)
    host = url.netloc.rpartition("@")[2] + url.path.rstrip("/")
    by_host = not has_own_endpoint(settings) and check_dns_name(bucket)
    trusted = os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True) or ""
    options: ClientConfig = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=5)}
    if url.scheme == "https":
        options["root_certificate"] = Path(trusted).read_bytes()
    else:
        options["allow_http"] = True
    attempts = client().meta.config.retries.get("total_max_attempts", _ATTEMPTS)  # type: ignore[attr-defined]
    return S3Store(
        bucket,
        endpoint=f"{url.scheme}://{bucket}.{host}" if by_host else f"{url.scheme}://{host}",
        region=client().meta.region_name or "us-east-1",
        virtual_hosted_style_request=by_host,
        credential_provider=_keys,
        client_options=options,
        retry_config={"max_retries": attempts - 1},
    )


def _keys() -> S3Credential:
    found = credentials()
    if found is None:
        raise NoCredentialsError
    keys = found.get_frozen_credentials()
    return {
        "access_key_id": keys.access_key or "",
        "secret_access_key": keys.secret_key or "",
        "token": keys.token or None,
        "expires_at": datetime.now(UTC) + _KEYS_FOR if keys.token else None,
    }
