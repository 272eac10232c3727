"""What the preflight can see of a real cluster with the run's own rights, before anything is created there."""

from __future__ import annotations

import pytest

from cluster.apiserver import NAMESPACE
from cluster.conftest import eventually
from draft_model.jobs.cluster import Cluster
from draft_model.jobs.compute import Compute
from draft_model.jobs.context import check_cluster
from draft_model.jobs.spec import Kind
from draft_model.parameters import Parameters

QUEUES = Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "LocalQueue")


def look(queue="", **values):
    return check_cluster(Parameters(**values), {"train": Compute("1", "1Gi", queue=queue)})


@pytest.mark.parametrize("backend", ["auto", "pytorchjob", "trainjob"])
def test_a_cluster_with_the_operators_and_the_roles_is_ready(as_coordinator, backend):
    assert look(training_backend=backend) == ([], [])


def test_an_account_without_the_role_is_told_what_it_lacks(server, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig_of("draft-model-worker")))
    (found,), notes = look(training_backend="pytorchjob")
    rights = "create pytorchjobs, get pytorchjobs, list pytorchjobs, watch pytorchjobs, delete pytorchjobs"
    assert f"may not {rights}, get pods, list pods, get pods/log in namespace {NAMESPACE}" in found
    assert "draft-model-coordinator" in found
    assert notes == []


def test_a_cluster_without_the_operator_is_told(as_coordinator, monkeypatch):
    monkeypatch.setattr(Cluster, "has", lambda self, kind: False)
    (found,), _ = look(training_backend="auto")
    assert found.startswith("training_backend: given 'auto', but this cluster has no PyTorchJob or TrainJob")
    assert "install Kubeflow's training operator, or use training_backend=local" in found


def test_an_api_server_that_is_away_is_told(as_coordinator, server):
    server.stop()
    try:
        (found,), _ = look(training_backend="pytorchjob")
    finally:
        server.start()
    assert found.startswith("training_backend: ")


def test_a_queue_without_kueue_is_told(as_coordinator):
    (found,), _ = look(queue="research")
    assert "but this cluster has no Kueue" in found


@pytest.fixture
def kueue(server):
    server.define_kind(QUEUES)
    admin = Cluster(server.api, NAMESPACE)
    eventually(lambda: admin.has(QUEUES))
    queue = {"apiVersion": f"{QUEUES.group}/{QUEUES.version}", "kind": QUEUES.kind, "metadata": {"name": "research"}}
    admin.create(QUEUES, queue)
    yield
    server.api.call_api(
        f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{QUEUES.plural}.{QUEUES.group}", "DELETE",
        auth_settings=["BearerToken"],
    )  # fmt: skip
    eventually(lambda: QUEUES.group not in admin.groups())


def test_a_queue_is_looked_for(as_coordinator, kueue, server, monkeypatch):
    assert look(queue="research") == ([], [])
    (found,), _ = look(queue="other")
    assert found.startswith("compute_map: the jobs of train wait in the queue other, but namespace ")
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig_of("draft-model-worker")))
    _, (note,) = look(queue="research")
    assert "cannot be seen with this service account's rights" in note
