"""URIs, manifests and transfers: how one stage's folder gets to the next, whole or not at all."""

from draft_model.storage.folders import (
    exists,
    extend,
    fetch,
    fetch_file,
    fetch_tree,
    publish,
    read_bytes,
    read_manifest,
    remove_manifest,
    write_bytes,
)
from draft_model.storage.manifest import MANIFEST, FileRecord, Manifest
from draft_model.storage.uri import is_remote, join

__all__ = [
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "exists",
    "extend",
    "fetch",
    "fetch_file",
    "fetch_tree",
    "is_remote",
    "join",
    "publish",
    "read_bytes",
    "read_manifest",
    "remove_manifest",
    "write_bytes",
]
