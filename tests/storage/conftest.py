"""What the tests of the object store share."""

import pytest

from .relay import Relay


@pytest.fixture
def relay(object_store, monkeypatch):
    """Sees the requests of every client."""
    with Relay(object_store.environment["AWS_ENDPOINT_URL"]) as relay:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, relay.endpoint)
        yield relay
