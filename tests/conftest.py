"""Fixtures that tests of several packages share."""

import gc
import os
from pathlib import Path

import hypothesis
import pytest

gc.set_threshold(50_000)  # libraries make a million objects that stay
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors lose by threads, most where others want the cores
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

LONGEST = (
    "kfp_pipeline/test_local_run", "training/test_killed", "training/test_parallel", "training/test_lease",
    "kfp_pipeline/test_launcher", "jobs/test_local", "evaluation", "model_import", "dataset", "training", "regenerate",
    "tracking", "storage",
)  # fmt: skip
"""Where most of the time goes: these begin first, so that no long file is left for one of the processes at the end."""


def pytest_collection_modifyitems(items):
    """The longest first; `make test` runs a file's tests in one process, which makes the file's fixtures once."""

    def rank(item):
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((number for number, start in enumerate(LONGEST) if path.startswith(start)), len(LONGEST))

    items.sort(key=rank)


def pytest_collection_finish():
    gc.freeze()


def pytest_unconfigure():
    gc.freeze()  # at the end nothing is searched


@pytest.fixture(scope="session")
def object_store(tmp_path_factory):
    """A real S3 store on 127.0.0.1; the environment's AWS variables lead to it."""
    from draft_model.storage.embedded import EmbeddedStore  # not where a GPU machine has no boto3

    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """What trainings and evaluations read."""
    from training.case import make_inputs

    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def plain(inputs, tmp_path_factory):
    """The training that others are held against: 13 steps in four epochs, never disturbed."""
    from training.case import Trainer

    return Trainer(inputs, tmp_path_factory.mktemp("plain"))()
