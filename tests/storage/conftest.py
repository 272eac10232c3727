"""What the tests of the object store share."""

import uuid

import pytest

from draft_model import storage
from draft_model.storage import s3

from .relay import Relay


@pytest.fixture
def relay(object_store, monkeypatch):
    """Sees the requests of every client; retries are quick."""
    monkeypatch.setattr(s3, "_PAUSES", (0.01, 0.05))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with Relay(object_store.environment["AWS_ENDPOINT_URL"]) as relay, storage.patience(20):
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, relay.endpoint)
        yield relay


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """The URI of a folder that does not exist yet, of each kind."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"s3://{request.getfixturevalue('object_store').bucket}/{uuid.uuid4().hex}"
