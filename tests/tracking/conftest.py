"""An MLflow store, made once: its tables take seconds."""

import shutil

import pytest


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Copies an empty store to a file and gives its URI."""
    from mlflow import MlflowClient

    made = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments()

    def copy(file):
        shutil.copy(made, file)
        return f"sqlite:///{file}"

    return copy
