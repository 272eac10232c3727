"""URIs, manifests and transfers: the folder of one stage gets to the next one, whole or not at all."""

from draft_model.storage.folders import (
    copy,
    create,
    delete,
    exists,
    extend,
    fetch,
    fetch_file,
    fetch_tree,
    is_whole,
    list_files,
    probe,
    publish,
    put_file,
    read_bytes,
    read_file,
    read_manifest,
    read_range,
    read_versioned,
    remove,
    remove_manifest,
    replace,
    write_bytes,
    write_manifest,
)  # fmt: skip
from draft_model.storage.manifest import MANIFEST, FileRecord, Manifest
from draft_model.storage.transfer import patience
from draft_model.storage.uri import is_remote, join, without_credentials

__all__ = [
    "MANIFEST", "FileRecord", "Manifest", "copy", "create", "delete", "exists", "extend", "fetch", "fetch_file",
    "fetch_tree", "is_remote", "is_whole", "join", "list_files", "patience", "probe", "publish", "put_file",
    "read_bytes", "read_file", "read_manifest", "read_range", "read_versioned", "remove", "remove_manifest", "replace",
    "without_credentials", "write_bytes", "write_manifest",
]  # fmt: skip
