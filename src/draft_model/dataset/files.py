"""The files that conversations come from, wherever they lie, read by byte ranges and never fetched whole.

What is given may be one file, a folder or a glob, on disk, in an object store, at an https:// address, or at gs://
where the package `gcsfs` is installed. A file has an identity that changes with its content: the store's own tag of the
object where there is one, else the SHA-256 of its bytes.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from draft_model.errors import DraftModelError
from draft_model.storage import exists
from draft_model.storage.transfer import local_errors
from draft_model.storage.uri import ObjectAddress, parse

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
"""Of the files that are taken from a folder; a file that is named may have any, for its content is looked at."""

_WILD = re.compile(r"[*?\[]")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BLOCK = 8 << 20
_ATTEMPTS = 4
_PAUSE = 0.2
"""Seconds before a request is tried again, growing fourfold."""
_GIVE = f"give a file of JSON lines ({', '.join(ENDINGS)}), a folder of them or a glob"

T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """One file of conversations.

    Attributes:
        name: relative to what was given; in reports.
        uri: as in messages.
        size: bytes, compressed or not.
        tag: the store's tag of the content; empty where there is none.
        fetch: gives bytes [start, start + length) of the file, which are inside it.
    """

    name: str
    uri: str
    size: int
    tag: str
    fetch: Callable[[int, int], bytes]

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer where the file ends."""
        length = min(length, self.size - start)
        return self.fetch(start, length) if length > 0 else b""

    def identity(self) -> str:
        """Changes with the content."""
        if self.tag:
            return f"{self.size}:{self.tag}"
        digest = hashlib.sha256()
        for start in range(0, self.size, _BLOCK):
            digest.update(self.read(start, _BLOCK))
        return f"sha256:{digest.hexdigest()}"

    def is_compressed(self) -> bool:
        """Whether it is gzip or zstd, told by its first bytes."""
        return self.read(0, 4).startswith((_GZIP, _ZSTD))

    def open(self, start: int = 0) -> BinaryIO:
        """A stream of what is in the file, decompressed.

        Args:
            start: where to begin; 0 for a compressed file.

        Raises:
            OSError, EOFError, zlib.error: in reading, where the compressed data is damaged.
        """
        raw = io.BufferedReader(_Ranges(self, start), _BLOCK)
        head = self.read(0, 4)
        if head.startswith(_GZIP):
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        if head.startswith(_ZSTD):
            import pyarrow as pa

            return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), _BLOCK))
        return cast(BinaryIO, raw)


class _Ranges(io.RawIOBase):
    """A file as a stream of range requests, so that no connection stays open while workers are busy."""

    def __init__(self, file: File, start: int) -> None:
        self._file = file
        self._at = start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def damage_told(name: str) -> Iterator[None]:
    """Says that a file cannot be read or decompressed.

    Args:
        name: the parameter and the file.

    Raises:
        DraftModelError: in place of what the decompressors raise.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DraftModelError(f"{name}: is damaged gzip data ({error}); give a whole file") from error
    except OSError as error:
        raise DraftModelError(f"{name}: cannot be read ({error}); give a whole, readable file") from error


def find(given: str) -> list[File]:
    """Finds the files of a split.

    Args:
        given: path or URI of a file, of a folder (all files below it with one of ENDINGS) or a glob (`**` for
            any depth).

    Returns:
        At least one file, in the order of their names.

    Raises:
        DraftModelError: there is none, or it cannot be reached.
    """
    scheme = given.partition("://")[0].lower() if "://" in given else ""
    if scheme == "https":
        return [_at_address(given)]
    if scheme == "gs":
        return _by_fsspec(given)
    address = parse(given.split("*", 1)[0] if scheme else given)
    found = _in_store(given) if isinstance(address, ObjectAddress) else _on_disk(given, parse(given))
    if not found:
        raise DraftModelError(f"{given} has no file of conversations; {_GIVE}")
    return found


def _on_disk(given: str, path: Path | ObjectAddress) -> list[File]:
    assert isinstance(path, Path)
    with local_errors(given):
        if path.is_dir():
            names = sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*") if _is_data(entry))
            return [_local(path / name, name) for name in names]
        if path.is_file():
            return [_local(path, path.name)]
        if not _WILD.search(str(path)):
            raise DraftModelError(f"given {given!r}, but there is no {given}; {_GIVE}")
        top = _WILD.split(str(path))[0].rpartition("/")[0] or "/"
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - `Path.glob` takes no absolute pattern
        return [_local(Path(name), Path(name).relative_to(top).as_posix()) for name in names if Path(name).is_file()]


def _is_data(path: Path) -> bool:
    return path.name.endswith(ENDINGS) and not path.name.startswith(".") and path.is_file()


def _local(path: Path, name: str) -> File:
    def read(start: int, length: int) -> bytes:
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    return File(name, str(path), path.stat().st_size, "", read)


def _in_store(given: str) -> list[File]:
    from draft_model.storage.s3 import S3Folder

    fixed, wild = _fixed_part(given)
    address = parse(fixed)
    assert isinstance(address, ObjectAddress)
    if not wild and not address.key.endswith(ENDINGS) and address.key:
        listed = {item.name: item for item in S3Folder(address, fixed).list_objects()}
        if listed:
            return _stored(address, fixed, [name for name in listed if name.endswith(ENDINGS)], listed)
    if not wild and address.key:
        if not exists(given):
            raise DraftModelError(f"given {given!r}, but there is no {given}; {_GIVE}")
        parent, _, name = address.key.rpartition("/")
        above = ObjectAddress(address.bucket, parent)
        looked = S3Folder(above, f"s3://{address.bucket}/{parent}".removesuffix("/")).look(name)
        return _stored(above, fixed.rpartition("/")[0], [name], {name: looked})
    listed = {item.name: item for item in S3Folder(address, fixed).list_objects()}
    matches = _matcher(wild) if wild else None
    names = [name for name in listed if (matches.fullmatch(name) if matches else name.endswith(ENDINGS))]
    return _stored(address, fixed, names, listed)


def _fixed_part(given: str) -> tuple[str, str]:
    """The folder before the first wildcard, and what follows it; a URI has no `?`."""
    wild = re.search(r"[*\[]", given)
    if wild is None:
        return given, ""
    cut = given.rfind("/", 0, wild.start())
    return given[:cut], given[cut + 1 :]


def _matcher(pattern: str) -> re.Pattern[str]:
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern))


def _stored(address: ObjectAddress, uri: str, names: list[str], listed: dict) -> list[File]:  # type: ignore[type-arg]
    from draft_model.storage.s3 import S3Folder

    folder = S3Folder(address, uri)

    def file(name: str) -> File:
        def read(start: int, length: int) -> bytes:
            return folder.read_range(name, start, length, listed[name].etag)

        return File(name, f"{uri}/{name}", listed[name].size, listed[name].etag, read)

    return [file(name) for name in sorted(names)]


def _by_fsspec(given: str) -> list[File]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(given)
        if _WILD.search(path):
            top, paths = _WILD.split(path)[0].rpartition("/")[0], store.glob(path)
        elif store.isdir(path):
            top, paths = path, [found for found in store.find(path) if found.endswith(ENDINGS)]
        else:
            top, paths = path.rpartition("/")[0], [path]
        infos = {found: store.info(found) for found in sorted(paths)}
    except ImportError as error:
        raise DraftModelError(f"{given}: {error}; install it, or copy the file to s3://") from error
    except OSError as error:
        raise DraftModelError(f"{given}: cannot be read ({error}); {_GIVE}") from error
    if not infos:
        raise DraftModelError(f"{given} has no file of conversations; {_GIVE}")

    def file(found: str) -> File:
        def read(start: int, length: int) -> bytes:
            return bytes(_again(lambda: store.cat_file(found, start=start, end=start + length), given))

        name = found.removeprefix(top).lstrip("/")
        return File(name, store.unstrip_protocol(found), infos[found]["size"], store.ukey(found), read)

    return [file(found) for found in infos]


def _at_address(given: str) -> File:
    """A file at an https:// address; the server has to know byte ranges, as every server of files does."""

    def request(**headers: str) -> tuple[bytes, int, dict[str, str]]:
        asked = urllib.request.Request(given, headers={"Accept-Encoding": "identity", **headers})  # noqa: S310
        with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310 - the scheme is https
            named = {name.lower(): value for name, value in answer.headers.items()}
            return (answer.read() if answer.status == 206 else b""), answer.status, named

    def read(start: int, length: int) -> bytes:
        end = start + length - 1
        data, status, _ = _again(lambda: request(Range=f"bytes={start}-{end}"), shown)
        if status != 206 or len(data) != length:
            raise DraftModelError(f"{shown}: the file changed, or was cut off, while it was read; try again")
        return data

    parts = urlsplit(given)
    shown = f"https://{parts.netloc.rpartition('@')[2]}{parts.path}"  # a signature or password stays out of messages
    _, status, headers = _again(lambda: request(Range="bytes=0-0"), shown)
    total = headers.get("content-range", "").rpartition("/")[2]
    if status != 206 or not total.isdigit():
        raise DraftModelError(f"{shown}: its server does not serve byte ranges; download the file and give its path")
    size = int(total)
    tag = headers.get("etag", "")
    return File(parts.path.rpartition("/")[2] or parts.netloc, shown, size, "" if tag.startswith("W/") else tag, read)


def _again(step: Callable[[], T], what: str) -> T:
    """Tries a request a few times: servers and connections fail for a moment."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return step()
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == _ATTEMPTS:
                raise DraftModelError(
                    f"{what}: the server answers {error.code} {error.reason}; check the address"
                ) from None
        except OSError as error:
            if attempt == _ATTEMPTS:
                raise DraftModelError(f"{what}: cannot be reached ({error}); check the address and network") from error
        time.sleep(_PAUSE * 4**attempt)
    raise AssertionError
