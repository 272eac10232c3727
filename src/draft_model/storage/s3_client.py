"""The one client of an object store, and what the store's refusals mean in words.

Endpoint, region and credentials come from where every AWS tool takes them (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, a role, a profile) and from nowhere else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.storage.transfer import FILES_AT_ONCE

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from mypy_boto3_s3.client import S3Client

Settings = tuple[tuple[str, str], ...]

REQUESTS_AT_ONCE = 16
_CHECK_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where the keys are temporary)"
_NO_KEYS = (
    "there are no credentials for the object store; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
    "this machine or pod a role"
)
_DENIED = f"access denied; {_CHECK_KEYS}, and that they may list (s3:ListBucket), read, write and delete there"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to that"
_REPLACED = "the object changed while it was read; try again when it is whole"
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
    "412": _REPLACED,
    "PreconditionFailed": _REPLACED,
    "507": "the object store is full; free some space there",
    "XMinioStorageFull": "the object store is full; free some space there",
    "QuotaExceeded": "the bucket's quota is used up; free some space there",
}


@contextmanager
def errors(uri: str) -> Iterator[None]:
    """Says in words, and without a secret, what the store refuses; its own answer stays as the cause."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        unknown = f"the object store refuses {error.operation_name} with {code or 'no code'}; see its log"
        busy = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500 and code not in _SENTENCES
        kind = StoreUnavailable if busy else DraftModelError
        raise kind(f"{uri}: {_SENTENCES.get(code, unknown)}") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise DraftModelError(f"{uri}: {_NO_KEYS}") from error
    except ParamValidationError as error:
        raise DraftModelError(f"{uri}: S3 allows no such bucket or key; correct the URI") from error
    except (NoConnectionError, HTTPClientError) as error:
        raise StoreUnavailable(
            f"{uri}: the object store at {_endpoint()} cannot be reached; check AWS_ENDPOINT_URL (host, "
            "port, http or https), the network and that the store is running"
        ) from error
    except IncompleteReadError as error:
        raise StoreUnavailable(
            f"{uri}: the object store at {_endpoint()} breaks off its answers again and again; check the network and "
            "the store"
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


def client(*, signs_bodies: bool | None = None) -> S3Client:
    """The process's client for the environment as it is now.

    Args:
        signs_bodies: whether the SHA-256 of what is sent is part of the signature; None: where it goes by plain http.

    Raises:
        DraftModelError: where the environment's AWS settings cannot be used.
    """
    return _client(os.getpid(), settings(), signs_bodies)


def credentials() -> Credentials | None:
    """Where the client takes its keys from; they are renewed there when they run out."""
    return _session(os.getpid(), settings()).get_credentials()


def settings() -> Settings:
    """What the environment says of the object store: new settings get a new client."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def has_own_endpoint(settings: Settings) -> bool:
    """Whether the object store is another than AWS; buckets are then part of paths, not of hosts."""
    return any(name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3") and value for name, value in settings)


@functools.lru_cache(maxsize=4)
def _session(process: int, settings: Settings) -> boto3.session.Session:
    return boto3.session.Session()


@functools.lru_cache(maxsize=4)
def _client(process: int, settings: Settings, signs_bodies: bool | None) -> S3Client:
    # The arguments are the cache's key: a forked process shares no sockets.
    special: Any = {
        "addressing_style": "path" if has_own_endpoint(settings) else "auto",
        "payload_signing_enabled": signs_bodies,
    }
    config = Config(
        retries={"mode": "standard"},
        connect_timeout=10,
        max_pool_connections=REQUESTS_AT_ONCE + FILES_AT_ONCE,
        s3=special,
    )
    try:
        return _session(process, settings).client("s3", config=config)
    except ValueError as error:
        raise DraftModelError(
            f"AWS_ENDPOINT_URL: given {_endpoint()!r}; allowed: http://host:port or https://host:port"
        ) from error
    except BotoCoreError as error:
        raise DraftModelError(f"{error}; check the AWS_* environment variables") from error
