"""Trainings, and a process that is left as it was found."""

import logging
import shutil
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
def two_epochs(plain, tmp_path):
    """A copy of the undisturbed training's output as it was after two epochs."""
    output = shutil.copytree(plain.output, tmp_path / "two_epochs")
    for name in ("epoch_3", "epoch_4", "final"):
        shutil.rmtree(output / name)
    (output / "checkpoints.json").write_text('["epoch_1", "epoch_2"]')
    return output


@pytest.fixture
def train(inputs, tmp_path):
    return Trainer(inputs, tmp_path)
