"""What the reaper deletes with the rights of its own account, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from jobs.requests import GOLDEN
from kubernetes import client

from cluster.apiserver import NAMESPACE
from draft_model.jobs.cluster import Cluster
from draft_model.jobs.place import ALL_KINDS
from draft_model.jobs.pytorchjob import PYTORCHJOB, PyTorchJobs
from draft_model.jobs.reaper import _WORKFLOW, reap
from draft_model.jobs.request import Kind
from draft_model.jobs.trainjob import RUNTIME, TRAINJOB, TrainJobs

NOW = datetime.now(UTC)
DEADLINE = timedelta(seconds=GOLDEN["1x1"].deadline)


@pytest.fixture
def admin(server):
    cluster = Cluster(server.api, NAMESPACE)
    yield cluster
    for kind in (*ALL_KINDS, _WORKFLOW):
        for found in cluster.objects(kind):
            cluster.delete(kind, found["metadata"]["name"])


@pytest.fixture
def reaper(server, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig_of("draft-model-reaper")))
    return Cluster.connect()


def workflow(admin: Cluster, name: str, phase: str) -> dict:
    manifest = {"apiVersion": _WORKFLOW.api_version, "kind": "Workflow", "metadata": {"name": name},
                "status": {"phase": phase}}  # fmt: skip
    return owner("Workflow", admin.create(_WORKFLOW, manifest)["metadata"])


def owner(kind: str, metadata: dict) -> dict:
    version = "v1" if kind == "Pod" else _WORKFLOW.api_version
    return {"apiVersion": version, "kind": kind, "name": metadata["name"], "uid": metadata["uid"]}


def pod(server, name: str) -> dict:
    spec = {"containers": [{"name": "main", "image": "stage:test"}]}
    made = client.CoreV1Api(server.api).create_namespaced_pod(NAMESPACE, {"metadata": {"name": name}, "spec": spec})
    return owner("Pod", {"name": name, "uid": made.metadata.uid})


def job(admin: Cluster, name: str, owned_by: dict | None = None, began: datetime | None = None) -> None:
    """A PyTorchJob of a run of that name."""
    manifest = PyTorchJobs.render(replace(GOLDEN["1x1"], run_id=name, owner=owned_by))[0]
    manifest["metadata"]["name"] = name
    made = admin.create(PYTORCHJOB, manifest)
    if began is not None:
        made["status"] = {"startTime": began.isoformat(timespec="seconds").replace("+00:00", "Z")}
        client.CustomObjectsApi(admin._api).replace_namespaced_custom_object_status(
            "kubeflow.org", "v1", NAMESPACE, "pytorchjobs", name, made
        )


def names(admin: Cluster, kind: Kind) -> set[str]:
    return {found["metadata"]["name"] for found in admin.objects(kind)}


def test_a_job_goes_with_its_run(admin, reaper, server):
    job(admin, "running", workflow(admin, "w-running", "Running"))
    job(admin, "ended", workflow(admin, "w-ended", "Failed"))
    job(admin, "gone", {**workflow(admin, "w-gone", "Running"), "name": "w-never-was"})
    job(admin, "another", {**workflow(admin, "w-another", "Running"), "uid": "of-an-earlier-one"})
    job(admin, "pod-there", pod(server, "p-there"))
    job(admin, "pod-gone", {**pod(server, "p-gone"), "name": "p-never-was"})
    deleted = reap(reaper, NOW)
    assert set(deleted) == {f"pytorchjobs/{name}" for name in ("ended", "gone", "another", "pod-gone")}
    assert names(admin, PYTORCHJOB) == {"running", "pod-there"}
    assert reap(reaper, NOW) == []


def test_a_job_that_its_operator_forgot_goes_after_its_deadline(admin, reaper):
    job(admin, "in-time", began=NOW - DEADLINE)
    job(admin, "late", began=NOW - DEADLINE - timedelta(minutes=11))
    job(admin, "late-of-a-run", workflow(admin, "w", "Running"), began=NOW - 2 * DEADLINE)
    waits = PyTorchJobs.render(replace(GOLDEN["queue"], run_id="waits", owner=None))[0]
    admin.create(PYTORCHJOB, waits)
    later = NOW + timedelta(minutes=1)
    assert set(reap(reaper, later)) == {"pytorchjobs/late", "pytorchjobs/late-of-a-run"}
    assert reap(reaper, later + 2 * DEADLINE) == ["pytorchjobs/in-time"]
    assert names(admin, PYTORCHJOB) == {waits["metadata"]["name"]}  # a queue holds no GPU


def test_trainjobs_and_their_runtimes(admin, reaper):
    kept, left = workflow(admin, "w-kept", "Running"), workflow(admin, "w-left", "Succeeded")
    made = {}
    for run, owned_by in (("11111111", kept), ("22222222", left), ("33333333", kept)):
        made[run] = GOLDEN["1x1"].name.replace("3f2c9a10", run)
        for kind, manifest in zip(
            TrainJobs.kinds, TrainJobs.render(replace(GOLDEN["1x1"], run_id=run, owner=owned_by)), strict=True
        ):
            admin.create(kind, manifest)
    admin.delete(TRAINJOB, made["33333333"])
    assert set(reap(reaper, NOW)) == {f"{kind.plural}/{made['22222222']}" for kind in (TRAINJOB, RUNTIME)}
    assert reap(reaper, NOW + timedelta(hours=1)) == [f"trainingruntimes/{made['33333333']}"]
    assert names(admin, TRAINJOB) == names(admin, RUNTIME) == {made["11111111"]}
    assert reap(reaper, NOW + 2 * DEADLINE) == [f"trainjobs/{made['11111111']}"]


def test_what_is_not_the_pipelines_is_left_alone(admin, reaper):
    manifest = PyTorchJobs.render(replace(GOLDEN["1x1"], owner=None))[0]
    manifest["metadata"] = {"name": "somebody-elses"}
    admin.create(PYTORCHJOB, manifest)
    assert reap(reaper, NOW + 10 * DEADLINE) == []
    assert names(admin, PYTORCHJOB) == {"somebody-elses"}


def test_the_command_of_the_cronjob(admin, reaper, server):
    def run() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "draft_model.jobs.reaper"], capture_output=True, text=True)

    job(admin, "ended", workflow(admin, "w-ended", "Error"))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "pytorchjobs/ended deleted: its run has ended (w-ended: Error)" in done.stderr
    assert names(admin, PYTORCHJOB) == set()
    server.stop()
    try:
        away = run()
    finally:
        server.start()
    assert away.returncode == 2
    assert "the reaper's next turn looks again" in away.stderr
