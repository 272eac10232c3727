"""A model that an MLflow server keeps, by `models:/name/version`, `models:/name@alias` or `runs:/id/path`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draft_model.errors import DraftModelError, without_credentials
from draft_model.model_import.sources import File, Listing, list_stored

_STORED = ("s3://", "minio://", "file://", "/")


def find(uri: str, scratch: Path, server: str = "") -> Listing:
    """Lists a logged or registered model; where it lies in an object store or on a disk, it is read from there.

    Without the URI of a tracking server, MLFLOW_TRACKING_URI's is asked.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    from mlflow import MlflowClient

    with _errors(uri):
        client = MlflowClient(server or None, server or None)
        location = _run_location(client, uri) if uri.startswith("runs:/") else uri
        while location.startswith("models:/"):
            location = _model_location(client, location)
    if location.startswith(_STORED):
        return list_stored(location, scratch, "mlflow_model_path")
    with _errors(uri, location):
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository = get_artifact_repository(location, server or None, server or None)
        found = list(_below(repository, None))
    files = {file.path: File(int(file.file_size or 0), f"{location} {file.file_size}") for file in found}

    def bring(names: Iterable[str]) -> dict[str, Path]:
        scratch.mkdir(parents=True, exist_ok=True)
        paths = {name: scratch / name for name in names}
        for name, path in paths.items():
            if not (path.is_file() and path.stat().st_size == files[name].size):
                with _errors(uri, location):
                    repository.download_artifacts(name, str(scratch))
        return paths

    return Listing(files, bring)


@contextmanager
def _errors(uri: str, location: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # clients of stores raise anything, ImportError where they are not installed
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "check the name, and mlflow_tracking_uri or MLFLOW_TRACKING_URI"
        if location and not location.startswith(("mlflow-artifacts:", "http")):
            advice = (
                f"it lies at {location}, which this image has no client or no keys for: have the server serve its "
                "artifacts (mlflow-artifacts:), or copy the model to s3:// and give that URI"
            )
        raise DraftModelError(
            without_credentials(f"mlflow_model_path: {uri} cannot be downloaded: {reason}; {advice}")
        ) from error


def _model_location(client: Any, uri: str) -> str:
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    found = get_model_name_and_version(client, uri)
    if len(found) == 1:  # `models:/m-...`, an id of MLflow 3
        return str(client.get_logged_model(found[0]).artifact_location)
    return str(client.get_model_version_download_uri(*found))


def _run_location(client: Any, uri: str) -> str:
    """Where a run's model lies: MLflow 3 keeps it beside the run's files, 2.x among them."""
    from mlflow.exceptions import MlflowException

    run_id, _, name = uri.removeprefix("runs:/").rstrip("/").partition("/")
    info = client.get_run(run_id).info
    token: str | None = None
    while name and "/" not in name:
        try:
            page = client.search_logged_models([info.experiment_id], filter_string=f"name = '{name}'", page_token=token)
        except MlflowException as error:
            if error.get_http_status_code() in (404, 405, 501):  # a server of 2.x knows no logged models
                break
            raise
        if found := next((model for model in page if model.source_run_id == run_id), None):
            return str(found.artifact_location)
        if not (token := page.token):
            break
    return f"{info.artifact_uri.rstrip('/')}/{name}".rstrip("/")


def _below(repository: Any, folder: str | None) -> Iterator[Any]:
    for entry in repository.list_artifacts(folder):
        if entry.is_dir:
            yield from _below(repository, entry.path)
        else:
            yield entry
