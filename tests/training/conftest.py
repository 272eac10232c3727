"""Inputs that all trainings of the tests share, and a process that is left as it was found."""

import logging
import signal

import pytest
import torch

from training.case import Trainer, make_inputs


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


@pytest.fixture(scope="session")
def plain(inputs, tmp_path_factory):
    """The training that others are held against: 13 steps in four epochs, never disturbed."""
    return Trainer(inputs, tmp_path_factory.mktemp("plain"))()
