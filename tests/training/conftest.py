"""Trainings, and a process that is left as it was found."""

import logging
import signal

import pytest
import torch

from training.case import Trainer


@pytest.fixture(autouse=True)
def _process_as_before():
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("draft_model").level
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("draft_model").setLevel(level)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def train(inputs, tmp_path):
    return Trainer(inputs, tmp_path)
