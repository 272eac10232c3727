"""Objects as contents: read in ranges, without a file between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from draft_model.storage.contents import Reader
from draft_model.storage.s3 import PART_SIZE, S3Folder
from draft_model.storage.uri import ObjectAddress


@dataclass(frozen=True)
class ObjectContent:
    """An object; every range is read of the same version of it.

    Attributes:
        folder: that it is in.
        name: relative to that.
        size: bytes.
        etag: as the store gave it.
    """

    folder: S3Folder
    name: str
    size: int
    etag: str
    on_disk: int = 0
    _noted: list[str] = field(default_factory=list, compare=False)

    @property
    def stamp(self) -> str:
        """The object's ETag."""
        return self.etag

    @property
    def sha256(self) -> str:
        """As this project's uploads note it; empty for the objects of strangers."""
        if not self._noted:
            self._noted.append(self.folder.noted_hash(self.name))
        return self._noted[0]

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes."""
        if (offset, length) == (0, self.size) and length <= PART_SIZE:
            data, noted = self.folder.read_whole(self.name, self.etag)
            self._noted[:] = [noted]
            return data
        return self.folder.read_range(self.name, offset, length, self.etag) if length else b""

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """For reading all of it."""
        yield self.read


def object_contents(address: ObjectAddress, uri: str) -> dict[str, ObjectContent]:
    """The objects of a folder, or the one object.

    Args:
        address: of the folder or object.
        uri: its name in messages.

    Raises:
        DraftModelError: where the store refuses, or a key would lead out of the folder.
    """
    folder = S3Folder(address, uri)
    listed = folder.list_objects()
    if not listed and address.key:
        parent, _, name = address.key.rpartition("/")
        folder = S3Folder(ObjectAddress(address.bucket, parent), uri.removesuffix("/").removesuffix(f"/{name}"))
        if folder.exists(name):
            listed = [folder.look(name)]
    return {found.name: ObjectContent(folder, found.name, found.size, found.etag) for found in listed}
