"""Files of conversations on a disk, in an object store, on the Hub or at an https address, read by byte ranges."""

from __future__ import annotations

import gzip
import hashlib
import io
import ipaddress
import re
import socket
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fsspec.utils import glob_translate

from draft_model import storage
from draft_model.errors import DraftModelError

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
"""File names that are taken from a folder. A file that is named itself may have any ending."""

_GIVE = f"give a file of JSON lines ({', '.join(ENDINGS)}), a folder of them or a glob"
_BOM = b"\xef\xbb\xbf"
_OTHERS = {b"PAR1": "Parquet", b"PK\x03\x04": "a zip archive", b"BZh": "bzip2", b"\xfd7zX": "xz",
           b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text"}  # fmt: skip
_ONE_DOCUMENT = re.compile(rb"\s*(\[\s*(\{.*)?|\{\s*)", re.DOTALL)  # as the first line
_BLOCK = 8 << 20
LONGEST_LINE = 1 << 30
"""Bytes: a few compressed megabytes may be one line that takes all memory."""
_ATTEMPTS = 4
_PAUSE = 0.2  # seconds; four times as long before each further retry

T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """One file of conversations."""

    name: str  # relative to the folder or glob that was given
    uri: str  # for messages: without query and password
    size: int  # bytes as stored
    tag: str  # the store's version of the content (ETag, generation, blob id); empty where there is none
    fetch: Callable[[int, int], bytes]  # bytes [start, start + length), which lie inside the file

    def read(self, start: int, length: int) -> bytes:
        """Reads bytes [start, start + length), fewer at the end of the file."""
        length = min(length, self.size - start)
        return self.fetch(start, length) if length > 0 else b""

    def identity(self) -> str:
        """Returns what changes with the content: size and tag, else the SHA-256 of all bytes."""
        if self.tag:
            return f"{self.size}:{self.tag}"
        stream: Any = io.BufferedReader(_Ranges(self), _BLOCK)
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"

    def open(self) -> io.BufferedReader[Any]:
        """Opens the lines as a stream, without byte-order mark, decompressed where it begins as gzip or zstd does."""
        stream: io.BufferedReader[Any] = io.BufferedReader(_Ranges(self), _BLOCK)
        head = self.read(0, 4)
        if other := next((name for start, name in _OTHERS.items() if head.startswith(start)), ""):
            raise DraftModelError(
                f"{self.uri}: is {other}; give JSON lines in UTF-8, plain, gzip or zstd (from Parquet: docs/data.md)"
            )
        if head.startswith(b"\x1f\x8b"):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), _BLOCK)
        elif head == b"\x28\xb5\x2f\xfd":
            import pyarrow as pa

            stream = io.BufferedReader(pa.CompressedInputStream(stream, "zstd"), _BLOCK)
        if stream.peek(3).startswith(_BOM):
            stream.read(3)
        if _ONE_DOCUMENT.fullmatch(stream.peek(4096)[:4096].lstrip().split(b"\n", 1)[0]):
            raise DraftModelError(
                f"{self.uri}: is one JSON document; give one conversation per line: jq -c '.[]' FILE > FILE.jsonl"
            )
        return stream


def read_line(stream: io.BufferedReader[Any], uri: str) -> bytes:
    """The rest of a line; empty at the end of the file."""
    if len(line := stream.readline(LONGEST_LINE)) == LONGEST_LINE:
        raise DraftModelError(f"{uri}: has a line of more than {LONGEST_LINE >> 20} MiB; {_GIVE}")
    return line


class _Ranges(io.RawIOBase):
    """A file as a stream of range requests: no connection stays open while the workers are busy."""

    def __init__(self, file: File) -> None:
        self._file, self._offset = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(self._offset, len(buffer))
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


@contextmanager
def read_errors(uri: str, parameter: str = "") -> Iterator[None]:
    """Turns the errors of reading and decompressing a file into a DraftModelError that names parameter and file."""
    prefix = f"{parameter}: " if parameter else ""
    try:
        yield
    except DraftModelError as error:
        raise DraftModelError([f"{prefix}{problem}" for problem in error.problems]) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DraftModelError(f"{prefix}{uri}: is damaged gzip data ({error}); give a whole file") from error
    except OSError as error:
        raise DraftModelError(f"{prefix}{uri}: cannot be read ({error}); give a whole, readable file") from error


def find(given: str) -> list[File]:
    """Finds the files of a split, at least one, sorted by name.

    `given` is the path or URI of a file, of a folder (all below it with one of ENDINGS) or a glob (`**` for any depth).
    """
    scheme = given.partition("://")[0].lower() if "://" in given else "file"
    if scheme == "https":
        return [_https_file(given)]
    if scheme in ("http", "ftp") or "::" in scheme:
        raise DraftModelError(f"{given}: {scheme}:// is not read; use https://, or copy the file to s3:// or a disk")
    try:
        found = _in_store(given) if scheme in ("s3", "minio") else _retry(lambda: _in_file_system(scheme, given), given)
    except (ImportError, ValueError) as error:
        raise DraftModelError(f"{given}: {error}; install what is missing, or copy the file to s3://") from error
    if not found:
        raise DraftModelError(f"{given}: there is no file of conversations; {_GIVE}")
    return sorted(found, key=lambda file: file.name)


def identify(given: str) -> list[tuple[File, str]]:
    """The files of a split with their identities."""
    with read_errors(given):
        return [(file, file.identity()) for file in find(given)]


def _above(pattern: str) -> str | None:
    """The folder above the first part of a path that is a pattern; None where none is."""
    mark = re.search(r"[*?\[]", pattern)
    return pattern[: mark.start()].rpartition("/")[0] if mark else None


def _in_store(given: str) -> list[File]:
    top = _above(given)
    folder, pattern = (given.rstrip("/"), "") if top is None else (top, glob_translate(given[len(top) + 1 :]))
    listed = storage.list_files(folder)
    if not listed and top is None:
        raise DraftModelError(f"given {given!r}, but there is no {given}; {_GIVE}")
    single = list(listed) == [folder.rpartition("/")[2]] and storage.exists(folder)

    def make(name: str, size: int, etag: str) -> File:
        uri = folder if single else storage.join(folder, name)
        return File(name, uri, size, etag, lambda start, length: storage.read_range(uri, start, length, etag))

    chosen = [name for name in listed if single or (re.match(pattern, name) if pattern else _is_taken(name))]
    return [make(name, *listed[name]) for name in chosen]


def _is_taken(name: str) -> bool:
    return name.endswith(ENDINGS) and "/." not in f"/{name}"


def _in_file_system(scheme: str, given: str) -> list[File]:
    import fsspec

    local = url2pathname(urlsplit(given).path) if given.lower().startswith("file://") else given
    store, path = fsspec.core.url_to_fs(str(Path(local).expanduser()) if scheme == "file" else given)
    store.invalidate_cache()  # listings are kept for the life of the process
    if (top := _above(path)) is not None and not (scheme == "file" and Path(path).exists()):
        infos = {name: info for name, info in store.glob(path, detail=True).items() if info["type"] != "directory"}
    elif store.isdir(path):
        top, below = path.rstrip("/"), store.find(path, detail=True)
        infos = {name: info for name, info in below.items() if _is_taken(name[len(top) + 1 :])}
    else:
        top, infos = path.rpartition("/")[0], {path: store.info(path)}

    def make(path: str, info: dict[str, Any]) -> File:
        uri = path if scheme == "file" else store.unstrip_protocol(path)

        def fetch(start: int, length: int) -> bytes:
            return _retry(lambda: bytes(store.cat_file(path, start=start, end=start + length)), uri)

        # Times on a disk can lie, and some stores tell no version: then the content itself is hashed.
        versioned = scheme != "file" and info.keys() - {"name", "size", "type"}
        return File(path[len(top) :].lstrip("/"), uri, info["size"], store.ukey(path) if versioned else "", fetch)

    return [make(path, info) for path, info in infos.items()]


def _https_file(given: str) -> File:
    """A file at an https address; its server has to support byte ranges."""
    parts = urlsplit(given)
    shown = f"https://{parts.netloc.rpartition('@')[2]}{parts.path}"
    opener = urllib.request.build_opener(_Redirects(shown, private=_is_private(parts.hostname)))

    def request(start: int, length: int) -> tuple[bytes, int, dict[str, str]]:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{start + length - 1}"}
        asked = urllib.request.Request(given, headers=headers)  # noqa: S310 - the scheme is https
        with opener.open(asked, timeout=60) as answer:
            named = {name.lower(): value for name, value in answer.headers.items()}
            return (answer.read(length + 1) if answer.status == 206 else b""), answer.status, named

    def fetch(start: int, length: int) -> bytes:
        data, _, headers = _retry(lambda: request(start, length), shown)
        if len(data) != length or headers.get("etag", "") != etag:
            raise DraftModelError(f"{shown}: the file changed, or was cut off, while it was read; try again")
        return data

    _, status, headers = _retry(lambda: request(0, 1), shown)
    etag, total = headers.get("etag", ""), headers.get("content-range", "").rpartition("/")[2]
    if status != 206 or not total.isdigit():
        raise DraftModelError(f"{shown}: its server does not serve byte ranges; download the file and give its path")
    tag = "" if etag.startswith("W/") else etag
    return File(parts.path.rpartition("/")[2] or parts.netloc, shown, int(total), tag, fetch)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only, and to private addresses only from a private one."""

    def __init__(self, shown: str, *, private: bool) -> None:
        self._shown, self._private = shown, private

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        target = urlsplit(newurl)
        if target.scheme != "https" or (not self._private and _is_private(target.hostname)):
            kind = "a private address" if target.scheme == "https" else "another scheme than https"
            raise DraftModelError(f"{self._shown}: the server redirects to {kind}; give the file's own address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_private(host: str | None) -> bool:
    try:
        found = {ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
    except OSError:
        return False  # nothing to connect to
    return not all((getattr(address, "ipv4_mapped", None) or address).is_global for address in found)


def _retry(request: Callable[[], T], shown: str) -> T:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return request()
        except FileNotFoundError as error:
            raise DraftModelError(f"given {shown!r}, but there is no {shown}; {_GIVE}") from error
        except OSError as error:
            code: int = getattr(error, "code", 0) or getattr(getattr(error, "response", None), "status_code", 0)
            final = isinstance(error, PermissionError) or "://" not in shown or (0 < code < 500 and code != 429)
            if attempt == _ATTEMPTS or final:
                why = f"the server answers {code}" if code else f"cannot be reached ({error})"
                raise DraftModelError(f"{shown}: {why}; check the address and the network") from None
        time.sleep(_PAUSE * 4**attempt)
    raise AssertionError
