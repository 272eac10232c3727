"""A KFP API server, which is asked often, and a user who has set up nothing."""

import os

import kfp
import pytest
from kfp_api import KfpApi


@pytest.fixture
def nothing_of_this_machine(monkeypatch, tmp_path):
    """No address, token, kubeconfig or settings that this machine has."""
    for name in (name for name in os.environ if name.startswith(("KF_", "KUBE", "DRAFT_MODEL_IMAGE"))):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    monkeypatch.setattr("kfp_pipeline.watch.PAUSES", (0.01, 0.05))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))


@pytest.fixture
def api():
    with KfpApi() as api:
        yield api
