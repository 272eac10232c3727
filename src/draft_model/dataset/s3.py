"""S3 as an fsspec file system over the project's own client, for reading; s3fs would pin another botocore."""

from __future__ import annotations

from typing import Any

from botocore.exceptions import ClientError
from fsspec.spec import AbstractFileSystem

from draft_model.storage.s3_client import client, errors


class S3FileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Paths are `bucket/key`. A folder is a prefix; `info` of a file has size and ETag, which `cat_file` insists on."""

    protocol = ("s3", "minio")
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self._infos: dict[str, dict[str, Any]] = {}

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any
    ) -> Any:
        bucket, _, key = path.strip("/").partition("/")
        prefix = f"{key}/" if key else ""
        with errors(f"s3://{path}"):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            listed = [item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]
        found = {
            name: self._keep(name, item["Size"], item["ETag"])
            for item in listed
            if (name := f"{bucket}/{item['Key']}")
            and (maxdepth is None or item["Key"].count("/", len(prefix)) < maxdepth)
        }
        return found if detail else sorted(found)

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        found = self.find(path, maxdepth=1, detail=True)
        return list(found.values()) if detail else sorted(found)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path in self._infos:
            return self._infos[path]
        bucket, _, key = path.partition("/")
        with errors(f"s3://{path}"):
            try:
                head = client().head_object(Bucket=bucket, Key=key) if key else None
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                head = None
            if head:
                return self._keep(path, head["ContentLength"], head["ETag"])
            prefix = f"{key}/" if key else ""
            if client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"):
                return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(f"there is no s3://{path}")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        bucket, _, key = path.partition("/")
        wanted = f"bytes={start}-{(end or 0) - 1}"
        with errors(f"s3://{path}"):
            answer = client().get_object(Bucket=bucket, Key=key, Range=wanted, IfMatch=self.ukey(path))
            return answer["Body"].read()

    def ukey(self, path: str) -> str:
        return str(self.info(path)["etag"])

    def _keep(self, path: str, size: int, etag: str) -> dict[str, Any]:
        self._infos[path] = {"name": path, "size": size, "type": "file", "etag": etag}
        return self._infos[path]
