"""Where things lie: a local path, `file://`, or `s3://` (`minio://`, as Kubeflow writes it, is the same).

A name inside a folder (a manifest's path, the key below a prefix) is held to stricter rules than the folder's
own URI: it may lead nowhere but into that folder, on any operating system.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from urllib.request import url2pathname

from draft_model.errors import DraftModelError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ALLOWED = "allowed: a local path, file:///path, s3://bucket/key or minio://bucket/key"


@dataclass(frozen=True)
class ObjectAddress:
    """An object, or the prefix of a folder of them.

    Attributes:
        bucket: the bucket's name.
        key: without a slash at either end; empty for the bucket itself.
    """

    bucket: str
    key: str


def parse(uri: str) -> Path | ObjectAddress:
    """Takes a URI apart.

    Args:
        uri: a local path (`~` is the home folder), `file://`, `s3://` or `minio://`.

    Returns:
        A path for what is local, an address for what is in an object store.

    Raises:
        DraftModelError: where it is none of these, or its key would lead out of its folder.
    """
    scheme = _SCHEME.match(uri)
    if not uri or "\0" in uri:
        raise DraftModelError(f"given {uri!r} as a path or URI; {_ALLOWED}")
    if scheme is None:
        return Path(uri).expanduser()
    rest = uri[scheme.end() :]
    match scheme[1].lower():
        case "file":
            host, slash, path = rest.partition("/")
            if host not in ("", "localhost") or not path:
                raise DraftModelError(f"given {uri!r}; a file URI has three slashes: file:///path")
            return Path(url2pathname(slash + path))
        case "s3" | "minio":
            return _object_address(uri, rest)
    raise DraftModelError(f"given {uri!r}; {_ALLOWED}")


def _object_address(uri: str, rest: str) -> ObjectAddress:
    bucket, _, key = rest.partition("/")
    key = key.removesuffix("/")
    if "?" in rest:
        raise DraftModelError(
            f"given {uri!r}; a URI has no query here: give the store's endpoint and region by the "
            "environment variables AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"
        )
    if not bucket:
        raise DraftModelError(f"given {uri!r}, which names no bucket; {_ALLOWED}")
    if key and (problem := name_problem(key)):
        raise DraftModelError(f"given {uri!r}, whose key {problem}; use a key of plain segments: s3://bucket/a/b")
    return ObjectAddress(bucket, key)


def name_problem(name: str) -> str | None:
    """Says why a name could lead out of the folder that it is in, or None where it cannot.

    Args:
        name: relative, with forward slashes.
    """
    segments = name.split("/")
    if "\0" in name or "\\" in name:
        return "has a NUL or a backslash"
    if name.startswith("/") or name[1:2] == ":":
        return "is absolute, or so on Windows"
    if not all(segments):
        return "has an empty segment"
    if "." in segments or ".." in segments:
        return "has a segment `.` or `..`"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return None


def check_name(name: str, where: str) -> str:
    """Refuses a name that could lead out of its folder.

    Args:
        name: relative, with forward slashes.
        where: the folder, for the message.

    Returns:
        The name.

    Raises:
        DraftModelError: where it could.
    """
    if problem := name_problem(name):
        raise DraftModelError(f"{where}: the file name {name!r} {problem}; rename the file or remove it")
    return name


def is_remote(uri: str) -> bool:
    """Whether the URI is in an object store, so that reading it means downloading it.

    Raises:
        DraftModelError: where it is no URI we can read.
    """
    return isinstance(parse(uri), ObjectAddress)


def join(uri: str, *parts: str) -> str:
    """Names something inside a folder.

    Args:
        uri: the folder.
        parts: relative names, each of one or more segments.

    Returns:
        The URI of the same scheme.

    Raises:
        DraftModelError: where a part could lead out of the folder, or the URI is none we can read.
    """
    parse(uri)
    names = [check_name(part, uri) for part in parts]
    if uri.lower().startswith("file://"):
        names = [urllib.parse.quote(name) for name in names]
    return uri.removesuffix("/") + "".join(f"/{name}" for name in names)


def split(uri: str) -> tuple[str, str]:
    """Takes a file's URI apart into the folder's URI and the file's name.

    Args:
        uri: of one file.

    Raises:
        DraftModelError: where it can name no file: a bucket, a path that ends in `..`.
    """
    match parse(uri):
        case ObjectAddress(bucket, key) if key:
            folder, _, name = key.rpartition("/")
            return f"s3://{bucket}/{folder}".removesuffix("/"), name
        case Path() as path if path.name:
            return str(path.parent), check_name(path.name, str(path.parent))
    raise DraftModelError(f"given {uri!r}, which is a folder; give the URI of a file")
