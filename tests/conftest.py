"""Fixtures that tests of several packages share."""

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors lose by threads, most where others want the cores
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def object_store(tmp_path_factory):
    """A real S3 store on 127.0.0.1; the environment's AWS variables lead to it."""
    from draft_model.storage.embedded import EmbeddedStore  # not where a GPU machine has no boto3

    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store
