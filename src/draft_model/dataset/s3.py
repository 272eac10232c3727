"""S3 as an fsspec file system over the project's own client, for reading; s3fs would pin another botocore."""

from __future__ import annotations

from typing import Any

from botocore.exceptions import ClientError
from fsspec.spec import AbstractFileSystem

from draft_model.storage.s3 import store


class S3FileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Paths are `bucket/key`, a folder is a prefix. `cat_file` insists on the ETag that was listed first."""

    protocol = ("s3", "minio")
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self._infos: dict[str, dict[str, Any]] = {}

    def find(self, path: str, maxdepth: int | None = None, **options: Any) -> Any:  # noqa: D102
        bucket, _, key = path.strip("/").partition("/")
        prefix = f"{key}/" if key else ""

        def list_all(client: Any) -> list[Any]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]

        listed = store().request(f"s3://{path}", list_all)
        near = [item for item in listed if maxdepth is None or item["Key"].count("/", len(prefix)) < maxdepth]
        infos = [self._keep(f"{bucket}/{item['Key']}", item["Size"], item["ETag"]) for item in near]
        found = {info["name"]: info for info in infos}
        return found if options.get("detail") else sorted(found)

    def info(self, path: str, **__: Any) -> dict[str, Any]:  # noqa: D102
        if path in self._infos:
            return self._infos[path]
        bucket, _, key = path.partition("/")

        def look_up(client: Any) -> dict[str, Any] | None:
            try:
                head = client.head_object(Bucket=bucket, Key=key) if key else None
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                head = None
            if head:
                return self._keep(path, head["ContentLength"], head["ETag"])
            below = client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)
            return {"name": path, "size": 0, "type": "directory"} if below.get("KeyCount") else None

        found = store().request(f"s3://{path}", look_up)
        if found is None:
            raise FileNotFoundError(path)
        return found

    def cat_file(self, path: str, start: int = 0, end: int = 0, **__: Any) -> bytes:  # noqa: D102
        bucket, _, key = path.partition("/")
        tag, span = self.ukey(path), f"bytes={start}-{end - 1}"

        def read(client: Any) -> bytes:
            data: bytes = client.get_object(Bucket=bucket, Key=key, Range=span, IfMatch=tag)["Body"].read()
            return data

        return store().request(f"s3://{path}", read)

    def ukey(self, path: str) -> str:  # noqa: D102
        return str(self.info(path)["etag"])

    def _keep(self, path: str, size: int, etag: str) -> dict[str, Any]:
        self._infos[path] = {"name": path, "size": size, "type": "file", "etag": etag}
        return self._infos[path]
