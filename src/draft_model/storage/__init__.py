"""URIs, manifests and transfers: how one stage's folder gets to the next, whole or not at all."""

from draft_model.storage.contents import BytesContent, Content, JoinedContent, LocalContent, Piece, bring, contents_of
from draft_model.storage.folders import (
    exists,
    extend,
    fetch,
    fetch_file,
    fetch_tree,
    is_whole,
    publish,
    publish_contents,
    read_bytes,
    read_manifest,
    remove,
    remove_manifest,
    write_bytes,
)
from draft_model.storage.growing import create, list_files, put_file, read_file, write_manifest
from draft_model.storage.manifest import MANIFEST, FileRecord, Manifest
from draft_model.storage.uri import is_remote, join

__all__ = [
    "MANIFEST",
    "BytesContent",
    "Content",
    "FileRecord",
    "JoinedContent",
    "LocalContent",
    "Manifest",
    "Piece",
    "bring",
    "contents_of",
    "create",
    "exists",
    "extend",
    "fetch",
    "fetch_file",
    "fetch_tree",
    "is_remote",
    "is_whole",
    "join",
    "list_files",
    "publish",
    "publish_contents",
    "put_file",
    "read_bytes",
    "read_file",
    "read_manifest",
    "remove",
    "remove_manifest",
    "write_bytes",
    "write_manifest",
]
