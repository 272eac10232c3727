"""One API server for all tests of this folder, with the operators' CRDs and the project's own Roles."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from cluster.apiserver import CRDS, NAMESPACE, ApiServer, missing
from cluster.operator import Operator
from draft_model.jobs.backends import ALL_KINDS
from draft_model.jobs.cluster import Cluster
from draft_model.jobs.spec import WORKFLOW

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    """Skips what needs an API server where there is none."""
    reason = missing()
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(600))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as server:
        server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for file in sorted(Path(os.environ[CRDS]).glob("*.yaml")):
            if file.name.startswith("pipelines."):
                continue
            server.define(yaml.load(file.read_text(), yaml.CSafeLoader))
        server.define_kind(WORKFLOW)
        for name in ("base/steps", "base/coordinator", "base/worker", "components/trainer-v2/role"):
            for document in yaml.safe_load_all((ROOT / f"manifests/{name}.yaml").read_text()):
                for subject in document.get("subjects", ()):
                    subject["namespace"] = NAMESPACE
                server.create(document)
        admin = Cluster(server.api, NAMESPACE)
        eventually(lambda: all(map(admin.has, ALL_KINDS)))
        yield server


@pytest.fixture(scope="session")
def coordinator(server):
    """Kubeconfig of the account that may create jobs."""
    return server.kubeconfig_of("draft-model-coordinator")


@pytest.fixture
def as_coordinator(coordinator, monkeypatch):
    """This process is the coordinator's, as far as the cluster can see."""
    monkeypatch.setenv("KUBECONFIG", str(coordinator))
    monkeypatch.setenv("DRAFT_MODEL_IMAGE", "stage:test")
    return coordinator


@pytest.fixture(scope="session")
def operator(server, tmp_path_factory):
    with Operator(server, tmp_path_factory.mktemp("pods")) as operator:
        yield operator


@pytest.fixture(scope="session")
def store_secret(server, object_store):
    """The object store's keys, as KFP's own Secret has them."""
    keys = {"accesskey": os.environ["AWS_ACCESS_KEY_ID"], "secretkey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    metadata = {"name": "mlpipeline-minio-artifact"}
    server.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys})


def eventually(look, seconds: float = 60.0):
    """What `look` gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
    return found
