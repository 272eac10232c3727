"""What happens to a run when something breaks: none ends green, none leaves a job behind, none trains twice.

The coordinator is a process of its own with the rights of its service account, against a real API server. In most of
these runs the pods' program is `stand_in.py`, which takes the trainer's configuration and leaves a trainer's output
without training, at the moment the test wants.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kubernetes import client

from cluster.apiserver import NAMESPACE
from cluster.conftest import eventually
from draft_model import storage
from draft_model.parameters import Parameters
from draft_model.training import TrainConfig

STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in.py"))]
COORDINATOR = r"""
import re, sys
from pathlib import Path
from draft_model import entrypoint, jobs
from draft_model.training import TrainConfig
code = entrypoint.exit_code(lambda: print(jobs.run(TrainConfig.from_json(sys.argv[1]), sys.argv[2])))
peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
print("torch" in sys.modules, int(peak[1]) // 1024)
sys.exit(code)
"""
PATIENCE = 60  # seconds
CPU_POOL = {"compute_draft_model_training": "cpu-pool", "training_backend": "pytorchjob"}


@dataclass
class Run:
    """A run whose coordinator is a process."""

    config: TrainConfig
    run_id: str
    environment: dict[str, str]
    process: subprocess.Popen | None = None
    log: list[str] = field(default_factory=list)  # what it has printed so far

    @property
    def job(self) -> str:
        return f"draft-{self.run_id[:8]}-a0"

    def start(self) -> Run:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COORDINATOR, self.config.to_json(), self.run_id], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        return self

    def _read(self, process) -> None:
        for line in process.stdout:
            self.log.append(line)

    def says(self, text: str, times: int = 1):
        """Waits until the coordinator has printed something so often."""
        deadline = time.monotonic() + PATIENCE
        while sum(text in line for line in self.log) < times:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)

    def end(self) -> int:
        """Waits for the coordinator's end; gives its exit code."""
        code = self.process.wait(PATIENCE)
        eventually(lambda: self.process.stdout.closed or self.log)
        return code

    @property
    def text(self) -> str:
        return "".join(self.log)


@pytest.fixture(scope="module")
def jobs_there(server):
    """The run's PyTorchJobs that exist."""
    api = client.CustomObjectsApi(server.api)

    def jobs_there(run):
        found = api.list_namespaced_custom_object(
            "kubeflow.org", "v1", NAMESPACE, "pytorchjobs", label_selector=f"draft-model/run-id={run.run_id}"
        )
        return [job["metadata"]["name"] for job in found["items"]]

    return jobs_there


@pytest.fixture(scope="module")
def begin(operator, coordinator, object_store, store_secret, tmp_path_factory):
    """Starts runs and waits until they have said something; ends what is left of them."""
    runs = []

    def begin(until="RUNNING", run_id=None, more=(), **parameters):
        run_id = run_id or str(uuid.uuid4())
        root = f"s3://{object_store.bucket}/{run_id}"
        values = Parameters(**{**CPU_POOL, **parameters})
        config = TrainConfig(
            f"{root}/model", f"{root}/dataset", f"{root}/output", tmp_path_factory.mktemp("work"), values
        )
        environment = {**os.environ, "KUBECONFIG": str(coordinator), "DRAFT_MODEL_IMAGE": "stage:test", **dict(more)}
        operator.programs[run_id] = STAND_IN
        runs.append(Run(config, run_id, environment).start())
        if until:
            runs[-1].says(until)
        return runs[-1]

    yield begin
    for run in runs:
        print(f"--- {run.run_id}\n{run.text}")  # pytest shows it where something failed
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def let_end(run, result="whole"):
    """Tells the stand-ins how to end."""
    storage.write_bytes(storage.join(run.config.output, "stand-in"), result.encode())


def record_of(run):
    return json.loads(storage.read_bytes(storage.join(run.config.output, "train_job.json")))


def test_a_run_without_faults(begin, jobs_there, operator):
    run = begin()
    let_end(run)
    assert run.end() == 0, run.text
    assert "QUEUED" not in run.text
    assert "SUCCEEDED" in run.text
    assert "[node 0] stand-in begins" in run.text
    assert jobs_there(run) == []
    assert record_of(run)["state"] == "SUCCEEDED"
    logs = storage.join(run.config.output, "logs", run.job, f"{run.job}-master-0.log")
    assert b"stand-in begins" in storage.read_bytes(logs)
    torch, megabytes = run.log[-1].split()
    assert torch == "False"
    assert int(megabytes) < 200

    run.start()  # KFP may start a step again that had just ended
    assert run.end() == 0
    assert "has succeeded already" in run.text
    assert operator.started[f"{run.job}-master-0"] == 1


def test_a_coordinator_that_was_killed_takes_its_job_over(begin, jobs_there, operator):
    run = begin()
    run.process.kill()
    run.process.wait()
    assert jobs_there(run) == [run.job]
    run.start()
    run.says("took over the PyTorchJob")
    let_end(run)
    assert run.end() == 0, run.text
    assert operator.started[f"{run.job}-master-0"] == 1
    assert jobs_there(run) == []


def test_a_terminated_run_leaves_no_job(begin, jobs_there, operator):
    run = begin(num_nodes_draft_model_training=2)
    asked = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    eventually(lambda: not jobs_there(run), 10)
    assert run.end() == 143
    assert time.monotonic() - asked < 60
    eventually(lambda: not operator.of_job(run.job))


def test_an_evicted_step_leaves_its_job_and_a_terminated_one_does_not(begin, server, jobs_there, operator):
    """KFP's Terminate sets the Workflow's deadline to 0 before it ends the pods; an eviction does not."""
    custom, workflows = client.CustomObjectsApi(server.api), ("argoproj.io", "v1alpha1", NAMESPACE, "workflows")
    body = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": {"name": "run-1"}, "spec": {}}
    workflow = custom.create_namespaced_custom_object(*workflows, body)
    owner = {"apiVersion": body["apiVersion"], "kind": "Workflow", "name": "run-1", "uid": workflow["metadata"]["uid"]}
    metadata = {"name": "step-1", "ownerReferences": [owner]}
    spec = {"containers": [{"name": "main", "image": "stage:test"}]}
    server.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    run = begin(more={"KFP_POD_NAME": "step-1"})
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 143
    assert "runs on without this step" in run.text
    assert jobs_there(run) == [run.job]
    run.start()
    run.says("took over the PyTorchJob")
    custom.patch_namespaced_custom_object(*workflows, "run-1", {"spec": {"activeDeadlineSeconds": 0}})
    run.process.send_signal(signal.SIGTERM)
    eventually(lambda: not jobs_there(run), 10)
    assert run.end() == 143
    assert operator.started[f"{run.job}-master-0"] == 1


def test_a_run_that_was_killed_is_cleaned_up_by_the_pipelines_exit_task(begin, jobs_there, coordinator, monkeypatch):
    from draft_model.jobs import cleanup

    run = begin()
    run.process.kill()
    monkeypatch.setenv("KUBECONFIG", str(coordinator))
    assert "no job was left" in cleanup.clean_up("of-another-run", "pytorchjob", state="RUNNING")
    assert jobs_there(run) == [run.job]
    told = cleanup.clean_up(run.run_id, "pytorchjob", state="RUNNING")
    assert f"a step left pytorchjobs/{run.job}: deleted" in told
    assert jobs_there(run) == []


def test_a_job_that_somebody_deletes_fails_the_run(begin, server, jobs_there):
    run = begin()
    client.CustomObjectsApi(server.api).delete_namespaced_custom_object(
        "kubeflow.org", "v1", NAMESPACE, "pytorchjobs", run.job
    )
    assert run.end() == 2
    assert f"error: {run.job} was deleted while it was RUNNING" in run.text
    assert jobs_there(run) == []


def test_success_without_an_output_is_a_failure(begin, jobs_there, operator):
    run = begin()
    let_end(run, "nothing")
    assert run.end() == 2
    assert "ended with success, but without its output" in run.text
    assert "no manifest.json" in run.text
    assert jobs_there(run) == []
    run.environment["KFP_RETRY_INDEX"] = "1"  # KFP starts failed steps again; the same end would come
    run.start()
    assert run.end() == 2
    assert operator.started[f"{run.job}-master-0"] == 1


def test_a_trainers_own_problem_reaches_the_user_as_it_was_told(begin, jobs_there):
    run = begin()
    let_end(run, "mistake")
    assert run.end() == 2
    assert "error: draft_model_config: is no JSON" in run.text
    assert "Traceback" not in run.text
    assert jobs_there(run) == []


def test_machines_that_fail_are_followed_by_another_attempt_and_not_for_ever(begin, jobs_there):
    run = begin(training_attempts=2)
    let_end(run, "killed")
    assert run.end() == 2
    assert "attempt 2 of 2 follows" in run.text
    assert "training_attempts: this was attempt 2" in run.text
    assert [attempt["reason"] for attempt in record_of(run)["attempts"]] == ["Killed", "Killed"]
    assert jobs_there(run) == []


def test_the_api_server_may_be_away_while_a_job_runs(begin, server, jobs_there, operator):
    run = begin()
    server.stop()
    run.says("asking again")  # a watch that breaks says why, too
    server.start()
    run.says("answers again")
    let_end(run)
    assert run.end() == 0, run.text
    assert operator.started[f"{run.job}-master-0"] == 1
    assert jobs_there(run) == []


def test_two_runs_at_once_do_not_disturb_each_other(begin, jobs_there):
    one, two = begin(), begin()
    let_end(one, "mistake")
    assert one.end() == 2
    assert jobs_there(two) == [two.job]
    let_end(two)
    assert two.end() == 0, two.text
    assert jobs_there(two) == []


def test_a_foreign_job_of_the_same_name_is_left_alone(begin, server, jobs_there):
    first = begin()
    other = begin(until="", run_id=first.run_id[:8] + str(uuid.uuid4())[8:])
    assert other.job == first.job
    assert other.end() == 2
    assert f"belongs to the run {first.run_id}" in other.text
    assert jobs_there(first) == [first.job]
    assert first.process.poll() is None
    let_end(first)
    assert first.end() == 0, first.text


@pytest.fixture(scope="module")
def unmanaged(begin, tmp_path_factory):
    """A run whose queue nothing manages, and when it began."""
    compute_map = tmp_path_factory.mktemp("map") / "map.json"
    compute_map.write_text('{"computes": {"team": {"cpus": 1, "memory_gib": 1, "queue": "team-queue"}}}')
    return begin(until="", compute_map=str(compute_map), compute_draft_model_training="team"), time.monotonic()


def test_a_job_that_is_suspended_for_30_seconds_goes_on(begin, server, jobs_there, operator, unmanaged):
    api = client.CustomObjectsApi(server.api)

    def suspend(value):
        api.patch_namespaced_custom_object(
            "kubeflow.org", "v1", NAMESPACE, "pytorchjobs", run.job, {"spec": {"runPolicy": {"suspend": value}}}
        )

    run = begin()
    suspend(True)
    run.says("QUEUED")
    eventually(lambda: not operator.of_job(run.job))
    since = time.monotonic()
    assert unmanaged[0].end() == 2  # takes 30 seconds: see the next test
    time.sleep(max(0.0, since + 30 - time.monotonic()))
    assert run.process.poll() is None
    suspend(False)
    run.says("RUNNING", times=2)
    let_end(run)
    assert run.end() == 0, run.text
    assert operator.started[f"{run.job}-master-0"] == 2
    assert jobs_there(run) == []


def test_a_queue_that_nothing_manages_is_found_out_within_a_minute(unmanaged, jobs_there):
    run, began = unmanaged
    assert run.end() == 2
    assert time.monotonic() - began < 60
    assert "queue 'team-queue' of the compute map: after 30 s Kueue has no Workload" in run.text
    assert jobs_there(run) == []
