"""URIs: a local path, `file://`, `s3://`, or `minio://` (as Kubeflow Pipelines writes its own store).

A name inside a folder is held to stricter rules than the folder's own URI: it must stay below that folder on any
operating system.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import NamedTuple
from urllib.request import url2pathname

from draft_model.errors import DraftModelError, without_credentials

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ONE_SLASH = re.compile(r"(?:s3a?|minio|gs|hf|file|https?):(?!//)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ALLOWED = "allowed: a local path, file:///path, s3://bucket/key or minio://bucket/key"


class ObjectAddress(NamedTuple):
    """An object, or the prefix of a folder of objects."""

    bucket: str
    key: str  # without a slash at either end; empty for the bucket itself
    scheme: str = "s3"  # or `minio`: without AWS_ENDPOINT_URL that is the store of Kubeflow Pipelines, not AWS


def parse(uri: str) -> Path | ObjectAddress:
    """Takes a URI apart: a path for what is local (`~` is the home folder), an address for an object store."""
    if not uri:
        raise DraftModelError(f"given {uri!r} as a path or URI; {_ALLOWED}")
    if _CONTROL.search(uri):
        raise DraftModelError(
            f"given {uri!r}, which has a line break or control character; write it on one line (in YAML without `|`)"
        )
    if _ONE_SLASH.match(uri):
        raise DraftModelError(f"given {uri!r}, without two slashes after the scheme; {_ALLOWED}")
    if (match := _SCHEME.match(uri)) is None:
        return Path(uri).expanduser()
    scheme, rest = match[1].lower(), uri[match.end() :]
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not path:
            raise DraftModelError(f"given {uri!r}; a file URI has three slashes: file:///path")
        return Path(url2pathname(slash + path))
    if scheme == "gs":
        raise DraftModelError(
            f"given {uri!r}; Google Cloud Storage is used by its S3 interface: set AWS_ENDPOINT_URL="
            f"https://storage.googleapis.com and HMAC keys, and give s3://{rest}"
        )
    if scheme not in ("s3", "minio"):
        raise DraftModelError(f"given {without_credentials(uri)!r}; {_ALLOWED}")
    if "?" in rest:
        raise DraftModelError(
            f"given {uri!r}; a query is not supported: give the endpoint and region of the store by the environment "
            "variables AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"
        )
    bucket, _, key = rest.removesuffix("/").partition("/")
    if not bucket:
        raise DraftModelError(f"given {uri!r}, which names no bucket; {_ALLOWED}")
    if key and (problem := name_problem(key)):
        raise DraftModelError(f"given {uri!r}, whose key {problem}; use a key of plain segments: s3://bucket/a/b")
    return ObjectAddress(bucket, key, scheme)


def name_problem(name: str) -> str | None:
    """Says why a relative name with forward slashes could leave its folder, or None."""
    segments = name.split("/")
    if _CONTROL.search(name) or "\\" in name:
        return "has a control character or a backslash"
    if name.startswith("/") or name[1:2] == ":":
        return "is absolute, or so on Windows"
    if not all(segments):
        return "has an empty segment"
    if "." in segments or ".." in segments:
        return "has a segment `.` or `..`"
    return "is not valid UTF-8" if re.search("[\ud800-\udfff]", name) else None


def check_name(name: str, where: str) -> str:
    """Returns the name, or raises DraftModelError where it could leave the folder `where`."""
    if problem := name_problem(name):
        raise DraftModelError(f"{where}: the file name {name!r} {problem}; rename the file or remove it")
    return name


def is_remote(uri: str) -> bool:
    """Whether the URI is in an object store, so that reading it means downloading it."""
    return isinstance(parse(uri), ObjectAddress)


def join(uri: str, *parts: str) -> str:
    """URI of something inside a folder; raises DraftModelError where a relative name could leave the folder."""
    parse(uri)
    names = [check_name(part, uri) for part in parts]
    if uri.lower().startswith("file://"):
        names = [urllib.parse.quote(name) for name in names]
    return uri.removesuffix("/") + "".join(f"/{name}" for name in names)


def split(uri: str) -> tuple[str, str]:
    """Takes the URI of a file apart into the URI of its folder and its name."""
    match parse(uri):
        case ObjectAddress(bucket, key, scheme) if key:
            folder, _, name = key.rpartition("/")
            return f"{scheme}://{bucket}/{folder}".removesuffix("/"), name
        case Path() as path if path.name:
            return str(path.parent), check_name(path.name, str(path.parent))
    raise DraftModelError(f"given {uri!r}, which is a folder or bucket; give the URI of a file")
