"""What only a real API server can refuse or lose: schemas, rights, conflicts, watches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jobs.requests import GOLDEN, OWNER, other_settings

from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Unavailable
from draft_model.jobs.cluster import Cluster, Gone
from draft_model.jobs.kubernetes import delete_run
from draft_model.jobs.place import ALL_KINDS, choose
from draft_model.jobs.pytorchjob import PYTORCHJOB, PyTorchJobs
from draft_model.jobs.request import Kind
from draft_model.jobs.states import State
from draft_model.jobs.trainjob import TrainJobs

BACKENDS = {"pytorchjob": PyTorchJobs, "trainjob": TrainJobs}


@pytest.fixture
def cluster(as_coordinator):
    cluster = Cluster.connect()
    yield cluster
    for kind in ALL_KINDS:
        for found in cluster.objects(kind):
            cluster.delete(kind, found["metadata"]["name"])


def holds(there, wanted):
    """Whether all that is wanted is there; a schema may add defaults."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(key in there and holds(there[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(there) == len(wanted) and all(map(holds, there, wanted))
    return there == wanted


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_schemas_take_what_is_rendered_whole(cluster, backend, case):
    backend = BACKENDS[backend](cluster)
    manifests = backend.render(GOLDEN[case])
    job = backend.create_or_adopt(GOLDEN[case])
    for kind, manifest in zip(backend.kinds, manifests, strict=True):
        there = cluster.get(kind, job.name)
        assert holds(there["spec"], manifest["spec"]), "the schema pruned or changed something"
        assert there["metadata"]["ownerReferences"][0]["uid"] == OWNER["uid"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_schemas_really_look(cluster, backend):
    backend = BACKENDS[backend](cluster)
    manifest = backend.render(GOLDEN["1x1"])[-1]
    spec = manifest["spec"].get("runPolicy", manifest["spec"])
    spec["activeDeadlineSeconds"] = "soon"
    with pytest.raises(DraftModelError, match="activeDeadlineSeconds"):
        cluster.create(backend.kind, manifest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adopted_by_name_and_hash_and_refused_otherwise(cluster, backend):
    backend, wanted = BACKENDS[backend](cluster), GOLDEN["1x1"]
    first = backend.create_or_adopt(wanted)
    again = backend.create_or_adopt(replace(wanted, owner=None))
    assert (first.adopted, again.adopted) == (False, True)
    assert first.uid == again.uid
    assert backend.state(again).state is State.STARTING
    with pytest.raises(DraftModelError, match="other settings"):
        backend.create_or_adopt(other_settings(wanted))
    with pytest.raises(DraftModelError, match=f"belongs to the run {wanted.run_id}"):
        backend.create_or_adopt(replace(wanted, run_id=wanted.run_id[:8] + "-another"))
    backend.delete(replace(wanted, run_id=wanted.run_id[:8] + "-another"))  # of another run: stays
    assert backend.state(first).state is State.STARTING
    backend.delete(wanted)
    assert backend.state(first).state is State.DELETED
    second = backend.create_or_adopt(wanted)
    assert not second.adopted
    assert backend.state(first).state is State.DELETED  # another one of the same name is not it
    assert delete_run(cluster, ALL_KINDS, wanted.run_id)
    assert backend.state(second).state is State.DELETED
    backend.delete(wanted)


def test_pytorchjob_is_preferred_where_both_are_installed(cluster):
    assert choose(cluster, "auto").name == "pytorchjob"
    assert choose(cluster, "trainjob").name == "trainjob"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda c: c.config_map("someone-elses"), "get configmaps"),
        (lambda c: c.create(Kind("argoproj.io", "v1alpha1", "workflows", "Workflow"),
                            {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": {"name": "w"}}),
         "create workflows"),
        (lambda c: c.delete(Kind("argoproj.io", "v1alpha1", "workflows", "Workflow"), "w"), "delete workflows"),
    ],
)  # fmt: skip
def test_what_the_role_does_not_grant_is_refused_in_words(cluster, what, words):
    with pytest.raises(DraftModelError, match=rf"does not let this service account {words}.*manifests/base"):
        what(cluster)


def test_no_secret_can_be_read_but_the_object_stores(cluster):
    for path in ("secrets", "secrets/somebody-elses"):
        with pytest.raises(DraftModelError, match="does not let"):
            cluster._listed(cluster._core(path), {}, "get secrets")


def test_a_watch_from_a_version_that_is_too_old_says_so(cluster):
    backend = PyTorchJobs(cluster)
    backend.create_or_adopt(GOLDEN["1x1"])
    with pytest.raises(Gone):
        list(cluster.watch(PYTORCHJOB, GOLDEN["1x1"].name, "1"))


def test_a_server_that_is_away_is_no_missing_job(cluster, server):
    job = PyTorchJobs(cluster).create_or_adopt(GOLDEN["1x1"])
    server.stop()
    try:
        with pytest.raises(Unavailable):
            PyTorchJobs(cluster).state(job)
    finally:
        server.start()
    assert PyTorchJobs(cluster).state(job).state is State.STARTING
