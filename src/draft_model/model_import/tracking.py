"""A model that an MLflow server keeps, by `models:/name/version` or `runs:/id/path`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.storage import Content, LocalContent
from draft_model.storage.contents import Reader
from draft_model.storage.transfer import check_free_disk


@dataclass(frozen=True)
class ArtifactContent:
    """A file that the server hands out itself, whole or not at all: it is downloaded once and stays.

    Attributes:
        repository: MLflow's artifact repository.
        name: of the file.
        size: bytes.
        scratch: where it is downloaded to.
        uri: the model's name in messages.
    """

    repository: Any
    name: str
    size: int
    scratch: Path
    uri: str
    sha256: str = ""

    @property
    def stamp(self) -> str:
        """Size: a logged artifact is never changed, says MLflow; its model's URI is in the manifest."""
        return f"{self.uri}/{self.name} {self.size}"

    @property
    def on_disk(self) -> int:
        """Bytes that reading all of it takes up on this machine's disk."""
        return self.size

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes."""
        with self.open() as reader:
            return reader(offset, length)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """For reading all of it."""
        path = self.scratch / self.name
        if not path.is_file() or path.stat().st_size != self.size:
            check_free_disk(self.scratch, self.size)
            self.scratch.mkdir(parents=True, exist_ok=True)
            with _errors(self.uri):
                self.repository.download_artifacts(self.name, str(self.scratch))
        with LocalContent(path).open() as reader:
            yield reader


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, DraftModelError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DraftModelError(
            f"mlflow_model_path: {uri} cannot be downloaded: {reason}; check the name, and mlflow_tracking_uri or "
            "MLFLOW_TRACKING_URI"
        ) from error


def find(uri: str, scratch: Path, server: str = "") -> dict[str, Content]:
    """What a logged or registered model holds.

    Where the server says that the files lie in an object store or on a disk, they are read from there.

    Args:
        uri: `models:/...` or `runs:/...`.
        scratch: where files are downloaded to that come by the server.
        server: its URI; empty: MLFLOW_TRACKING_URI.

    Raises:
        DraftModelError: where there is no such model, or the server cannot be reached.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with _errors(uri):
        repository = get_artifact_repository(_logged_model(uri, server) or uri, server or None, server or None)
        while (inner := getattr(repository, "repo", None)) is not None:
            repository = inner
        place = str(repository.artifact_uri)
        if place.startswith(("s3://", "file://", "/")):
            return storage.contents_of(place)
        return {
            file.path: ArtifactContent(repository, file.path, int(file.file_size), scratch, uri)
            for file in _below(repository, None)
        }


def _logged_model(uri: str, server: str) -> str | None:
    """The model that a run has logged by this name: MLflow 3 keeps it beside the run's files, not among them."""
    from mlflow import MlflowClient

    run, _, name = uri.removeprefix("runs:/").rstrip("/").partition("/")
    if not uri.startswith("runs:/") or not name or "/" in name:
        return None
    client = MlflowClient(server or None, server or None)
    experiment = client.get_run(run).info.experiment_id
    token: str | None = None
    while True:
        page = client.search_logged_models([experiment], filter_string=f"name = '{name}'", page_token=token)
        if found := next((model for model in page if model.source_run_id == run), None):
            return f"models:/{found.model_id}"
        if not (token := page.token):
            return None


def _below(repository: Any, folder: str | None) -> Iterator[Any]:
    for entry in repository.list_artifacts(folder):
        if entry.is_dir:
            yield from _below(repository, entry.path)
        else:
            yield entry
