"""Trainings, a process that is left as it was found, and jobs that are looked at without pauses."""

import pytest
from training.conftest import _process_as_before, train

from draft_model.jobs import cluster, follow

__all__ = ["_process_as_before", "train"]


@pytest.fixture
def at_once(monkeypatch):
    for name in ("POLL_SECONDS", "POLL_ALONE_SECONDS", "LOG_SECONDS"):
        monkeypatch.setattr(follow, name, 0.001)
    monkeypatch.setattr(cluster, "AGAIN_SECONDS", 0.0)
