"""The inputs of the training tests, and one thread in every process."""

import logging
import signal

import pytest
import torch
from training.case import Trainer, make_inputs


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _process_as_before():
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("draft_model").level
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("draft_model").setLevel(level)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def train(inputs, tmp_path):
    return Trainer(inputs, tmp_path)
