"""What the tests of storage share."""

import uuid

import pytest

from draft_model import storage
from draft_model.storage import s3

from .relay import Relay

ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
FILES = {"config.json": b"{}", "weights/model-1.bin": b"\0\1\2" * 1000, "weights/ü n.txt": b"x", "empty": b""}


def make(folder, files=FILES):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def content(folder, names=FILES):
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "source")


@pytest.fixture
def relay(object_store, monkeypatch):
    """Sees the requests of every client; retries are quick."""
    monkeypatch.setattr(s3, "_PAUSES", (0.01, 0.05))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with Relay(object_store.environment["AWS_ENDPOINT_URL"]) as relay, storage.patience(20):
        for name in ENDPOINTS:
            monkeypatch.setenv(name, relay.endpoint)
        yield relay


@pytest.fixture
def prefix(object_store):
    return f"s3://{object_store.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """The URI of a folder that does not exist yet, of each kind."""
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("prefix")
