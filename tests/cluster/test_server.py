"""What only a real API server can refuse or lose: schemas, rights, conflicts, watches."""

from __future__ import annotations

import time
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import yaml
from jobs.requests import GOLDEN, OWNER, other_settings

from cluster.apiserver import holds
from draft_model.errors import DraftModelError
from draft_model.jobs import cluster as cluster_module
from draft_model.jobs.backends import ALL_KINDS, Backend, choose, jobs_of_run
from draft_model.jobs.cluster import Cluster, Unavailable
from draft_model.jobs.spec import PYTORCHJOB, WORKFLOW
from draft_model.jobs.states import State

BACKENDS = ("pytorchjob", "trainjob")


@pytest.fixture
def cluster(as_coordinator):
    cluster = Cluster.connect()
    yield cluster
    for kind in ALL_KINDS:
        for found in cluster.objects(kind):
            cluster.delete(kind, found["metadata"]["name"])


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_schemas_take_what_is_rendered_whole(cluster, backend, case):
    backend = Backend(cluster, backend)
    manifests = backend.render(GOLDEN[case])
    job = backend.create_or_adopt(GOLDEN[case])
    for kind, manifest in zip(backend.kinds, manifests, strict=True):
        there = cluster.get(kind, job.name)
        assert holds(there["spec"], manifest["spec"]), "the schema pruned or changed something"
        assert there["metadata"]["ownerReferences"][0]["uid"] == OWNER["uid"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_schemas_really_look(cluster, backend):
    backend = Backend(cluster, backend)
    manifest = backend.render(GOLDEN["1x1"])[-1]
    spec = manifest["spec"].get("runPolicy", manifest["spec"])
    spec["activeDeadlineSeconds"] = "soon"
    with pytest.raises(DraftModelError, match="activeDeadlineSeconds"):
        cluster.create(backend.kind, manifest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adopted_by_name_and_hash_and_refused_otherwise(cluster, backend):
    backend, wanted = Backend(cluster, backend), GOLDEN["1x1"]
    first = backend.create_or_adopt(wanted)
    again = backend.create_or_adopt(replace(wanted, owner=None))
    assert (first.adopted, again.adopted) == (False, True)
    assert first.uid == again.uid
    assert backend.read(again)[0].state is not State.DELETED  # other tests' operator may run it
    with pytest.raises(DraftModelError, match="other settings"):
        backend.create_or_adopt(other_settings(wanted))
    with pytest.raises(DraftModelError, match=f"belongs to the run {wanted.run_id}"):
        backend.create_or_adopt(replace(wanted, run_id=wanted.run_id[:8] + "-another"))
    backend.delete(replace(wanted, run_id=wanted.run_id[:8] + "-another"))  # of another run: stays
    assert backend.read(first)[0].state is not State.DELETED
    backend.delete(wanted)
    assert backend.read(first)[0].state is State.DELETED
    second = backend.create_or_adopt(wanted)
    assert not second.adopted
    assert backend.read(first)[0].state is State.DELETED  # another one of the same name is not it
    assert len(jobs_of_run(cluster, wanted.run_id)) == len(backend.kinds)
    backend.delete(wanted)
    backend.delete(wanted)
    assert backend.read(second)[0].state is State.DELETED
    assert jobs_of_run(cluster, wanted.run_id) == []


def test_pytorchjob_is_preferred_where_both_are_installed(cluster):
    assert choose(cluster, "auto").name == "pytorchjob"
    assert choose(cluster, "trainjob").name == "trainjob"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda c: c.config_map("someone-elses"), "get configmaps"),
        (lambda c: c.create(WORKFLOW, {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow",
                                       "metadata": {"name": "w"}}), "create workflows"),
        (lambda c: c.delete(WORKFLOW, "w"), "delete workflows"),
    ],
)  # fmt: skip
def test_what_the_role_does_not_grant_is_refused_in_words(cluster, what, words):
    with pytest.raises(DraftModelError, match=rf"does not let this service account {words}.*manifests/base"):
        what(cluster)


def test_a_role_in_a_pod_with_the_coordinators_token(cluster, server, as_coordinator, tmp_path, monkeypatch):
    """Where a step has the mounted token, it is the coordinator; its pod's own account may nothing here."""
    config = yaml.safe_load(as_coordinator.read_text())
    address = urlsplit(config["clusters"][0]["cluster"]["server"])
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", address.hostname)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))
    ca = (server.folder / "certs/apiserver.crt").read_text()
    steps = yaml.safe_load(server.kubeconfig_of("draft-model-steps").read_text())
    for name, account in (("coordinator", config), ("steps", steps)):
        (tmp_path / name).mkdir()
        for file, text in (("token", account["users"][0]["user"]["token"]), ("namespace", "team"), ("ca.crt", ca)):
            (tmp_path / name / file).write_text(text)
    monkeypatch.setattr(cluster_module, "_POD_ACCOUNT", tmp_path / "steps")
    assert not Cluster.connect().may("create", "kubeflow.org", "pytorchjobs")
    monkeypatch.setattr(cluster_module, "ACCOUNT", tmp_path / "coordinator")
    assert Cluster.connect().may("create", "kubeflow.org", "pytorchjobs")


def test_a_change_since_the_job_was_read_ends_the_wait_for_it(cluster):
    backend = Backend(cluster, "pytorchjob")
    job = backend.create_or_adopt(GOLDEN["1x1"])
    backend.read(job)
    backend.delete(GOLDEN["1x1"])
    started = time.monotonic()
    backend.wait(job, 30)
    assert time.monotonic() < started + 15


def test_a_server_that_is_away_is_no_missing_job(cluster, server):
    backend = Backend(cluster, "pytorchjob")
    job = backend.create_or_adopt(GOLDEN["1x1"])
    server.stop()
    try:
        for ask in (lambda: backend.read(job), cluster.groups, lambda: cluster.has(PYTORCHJOB),
                    lambda: cluster.may("get", "", "pods"), lambda: backend.workload(job)):  # fmt: skip
            with pytest.raises(Unavailable):
                ask()
    finally:
        server.start()
    assert backend.read(job)[0].state is not State.DELETED
