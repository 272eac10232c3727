"""The images as a Docker daemon has them; without one, or without them, these tests are skipped."""

import os

import pytest

from kfp_pipeline.components import images
from kfp_pipeline.components.images import IMAGES

KINDS = tuple(kind for kind in images.KINDS if kind != "engine")  # that containers/build makes

HARDENED = {
    "user": "1000:1000",
    "read_only": True,
    "tmpfs": {"/tmp": "mode=1777,size=2g"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
}
"""How a cluster's pods run them."""


@pytest.fixture(scope="session")
def docker():
    """A client of the daemon, which has all images."""
    sdk = pytest.importorskip("docker")
    try:
        client = sdk.from_env(timeout=300)
        client.ping()
    except sdk.errors.DockerException as error:
        pytest.skip(f"no Docker daemon: {os.environ.get('DRAFT_MODEL_NO_DOCKER') or error}")
    missing = [kind for kind in KINDS if not client.images.list(IMAGES[kind])]
    if missing:
        pytest.skip(f"no image of {', '.join(missing)}: run `make images`")
    yield client
    client.close()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def python(docker):
    """Runs Python in an image as a cluster does, and gives what it prints."""

    def run(kind, code):
        output = docker.containers.run(
            IMAGES[kind], ["python3", "-c", code], remove=True, network_mode="none", **HARDENED
        )
        return output.decode().strip()

    return run
