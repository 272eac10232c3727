"""What ends a job and what does not: a person, a lost coordinator, an API server or a store that is away."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from answers import answering
from kubernetes import client

from draft_model import jobs, storage
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.jobs import cleanup, context, follow
from draft_model.jobs.backends import Backend, _difference
from draft_model.jobs.cluster import Cluster, Forbidden, Unavailable
from draft_model.jobs.coordinate import Coordinator
from draft_model.jobs.spec import PYTORCHJOB, RUNTIME, TRAINJOB, pytorchjob
from draft_model.parameters import STAGES, Parameters
from draft_model.training import TrainConfig
from draft_model.training.config import list_checkpoints
from jobs.fake import Clock, FakeCluster, pod, status
from jobs.requests import GOLDEN, OWNER, RUN

KEY = {"name": "mlflow-login", "key": "token"}
HUB = {"name": "draft-model-hub", "key": "token", "optional": True}
RUNNING, DONE = status("Running"), status("Succeeded", pods=[])
WORKFLOW = {"metadata": {"name": OWNER["name"]}, "spec": {}}
ENDS = [
    ({**WORKFLOW, "spec": {"activeDeadlineSeconds": 0}}, True),  # KFP's Terminate
    ({**WORKFLOW, "spec": {"shutdown": "Terminate"}}, True),  # Argo's
    ({**WORKFLOW, "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, True),
    (None, True),  # the run was deleted
    ({**WORKFLOW, "spec": {"activeDeadlineSeconds": 86400}}, False),
    (WORKFLOW, False),
]


@pytest.fixture
def coordinate_(tmp_path, at_once):
    """Coordinates a job through scripted looks; gives the cluster, and lets the test change the rest."""
    cluster = FakeCluster(clock=Clock())

    def run(*script, **changes):
        cluster.script = [*script]
        job = replace(GOLDEN["1x1"], output=str(tmp_path / "output"), **changes)
        Coordinator(cluster, job, tmp_path / "work").run()
        return json.loads((tmp_path / f"output/{job.stage}_job.json").read_text())

    run.cluster = cluster
    return run


def test_a_retry_of_a_failed_run_goes_on_from_what_the_run_has_written(coordinate_, tmp_path, monkeypatch):
    """KFP's Retry starts the step again as a first attempt; a command is a new run each time."""
    seen = []

    def prepare(*, again):
        seen.append(again)

    with pytest.raises(DraftModelError, match="quota"):
        coordinate_(status("Failed", "quota"), prepare=prepare)
    assert coordinate_(RUNNING, DONE, prepare=prepare)["state"] == "SUCCEEDED"
    assert seen == [False, True]
    monkeypatch.setattr(jobs, "run_job", lambda job, work: job.prepare(again=bool(seen)))
    config = TrainConfig("m", "d", str(tmp_path / "out"), tmp_path / "work", Parameters(training_backend="pytorchjob"))
    for run_id, left in ((RUN, ["epoch_1"]), ("", [])):
        storage.write_bytes(f"{config.output}/checkpoints.json", b'["epoch_1"]')
        storage.write_bytes(f"{config.output}/final/training.json", b'{"steps": 1, "acceptance_length": 1, "log": []}')
        jobs.run(config, run_id)
        assert list_checkpoints(config.checkpoints) == left


@pytest.mark.parametrize(("workflow", "ended"), ENDS)
def test_a_run_is_seen_to_be_ended_by_a_person(workflow, ended):
    cluster = FakeCluster()
    cluster.workflow = workflow
    assert context.run_ended(cluster, OWNER) is ended


def test_an_error_of_the_coordinator_ends_no_healthy_job(coordinate_):
    coordinate_.cluster.workflow = WORKFLOW
    for error in (Forbidden("may not get pytorchjobs"), RuntimeError("a fault of ours"), SystemExit(143)):
        with pytest.raises(type(error)):
            coordinate_(error)
        assert len(coordinate_.cluster.there) == 1
    assert coordinate_(RUNNING, DONE)["attempts"][0]["name"] == "draft-3f2c9a10-a0"  # started again, it adopts the job


def test_a_store_that_is_away_costs_no_finished_job(coordinate_):
    answers = iter([StoreUnavailable("away"), StoreUnavailable("away"), []])

    def check():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert coordinate_(RUNNING, DONE, check=check)["state"] == "SUCCEEDED"


def test_auto_takes_the_other_kind_where_an_operator_does_not_run(coordinate_, caplog, monkeypatch):
    monkeypatch.setattr(follow, "OPERATOR_SECONDS", 0.0)
    cluster, away = coordinate_.cluster, iter([Unavailable("503")] * 2)

    def has(kind):
        if cluster.there and (error := next(away, None)):
            raise error
        return kind in (PYTORCHJOB, TRAINJOB, RUNTIME)

    monkeypatch.setattr(cluster, "has", has)
    parameters = GOLDEN["1x1"].parameters
    record = coordinate_({}, {}, status("Complete"))
    assert record["state"] == "SUCCEEDED"
    assert "its operator does not run" in caplog.text
    fixed = parameters.model_copy(update={"training_backend": "pytorchjob"})
    with pytest.raises(DraftModelError, match="its operator does not run"):
        coordinate_({}, parameters=fixed, config="another")


@pytest.mark.parametrize("stage", STAGES)
def test_a_pod_of_any_stage_that_no_node_fits_ends_the_run_with_the_schedulers_words(coordinate_, stage):
    stuck = pod(job="draft-3f2c9a10-a0" if stage == "train" else f"draft-3f2c9a10-{stage}-a0")
    said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/5 nodes have a GPU"}
    stuck["status"] = {"conditions": [said]}
    parameters = GOLDEN["1x1"].parameters.model_copy(update={"start_limit": 0})  # minutes
    with pytest.raises(DraftModelError, match=r"start_limit: draft-.* exceeded 0 minutes") as caught:
        coordinate_(status("Created", pods=[stuck]), stage=stage, parameters=parameters)
    assert "0/5 nodes have a GPU" in caught.value.problems[1]
    assert coordinate_.cluster.there == {}


@pytest.mark.parametrize("whole", [True, False])
def test_a_stages_result_is_what_its_process_left_in_the_store(tmp_path, monkeypatch, whole):
    """Neither the process' end nor another run's result counts."""
    output, model = str(tmp_path / "jobs"), str(tmp_path / "model")
    if whole:
        (tmp_path / "files").mkdir()
        storage.publish(tmp_path / "files", model, stage="import", properties={})
    seen = []

    def run_job(sent, work):
        storage.write_bytes(f"{output}/import_result.json", b'{"run_id": "another"}')
        assert sent.check() == [f"there is no result of this run at {output}/import_result.json"]
        job = json.loads(sent.config)
        result = {"run_id": job["run_id"], "uri": model, "written_by": "import", "page": "x"}
        storage.write_bytes(job["result"], json.dumps(result).encode())
        seen.append(sent)
        assert (sent.check() == []) is whole

    monkeypatch.setattr(jobs, "run_job", run_job)
    result = jobs.run_stage("import", Parameters(), {"root": "s3://b/root"}, output, RUN, tmp_path)
    assert (result["uri"], result["page"]) == (model, "x")
    assert seen[0].uris == {"root": "s3://b/root", "output": output}


def test_a_forged_job_is_not_adopted():
    """Labels and annotations are anybody's to set; what Kueue and schemas fill in is no difference."""
    cluster, wanted = FakeCluster(script=[{}]), GOLDEN["4x8"]
    backend = Backend(cluster, "pytorchjob")
    job = backend.create_or_adopt(wanted)
    there = cluster.there[PYTORCHJOB, job.name]
    template = there["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    template["nodeSelector"] = {"flavour": "spot"}
    assert backend.create_or_adopt(wanted).adopted
    for change in (
        {"hostPID": True},
        {"initContainers": [{"name": "x", "image": "x"}]},
        {"volumes": [*template["volumes"], {"name": "root", "hostPath": {"path": "/"}}]},
        {"containers": [{**template["containers"][0], "image": "evil"}]},
    ):
        before = {key: template.get(key) for key in change}
        template.update(change)
        with pytest.raises(DraftModelError, match=f"other settings .*Master.template.spec.{next(iter(change))}"):
            backend.create_or_adopt(wanted)
        template.update(before)
        for key in [key for key, value in before.items() if value is None]:
            del template[key]
    assert _difference(there["spec"], pytorchjob(wanted)[0]["spec"]) == ""


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """Cleans up after a run whose output is in a folder of its own."""
    cluster = FakeCluster(script=[{}])
    monkeypatch.setattr(cleanup, "connect", lambda: cluster)
    monkeypatch.setattr(cleanup, "owner_of", lambda pod: OWNER)
    monkeypatch.setattr(cleanup, "AWAY_SECONDS", 0.0)

    def run(state, message=""):
        return cleanup.clean_up(RUN, "pytorchjob", state=state, message=message, root=str(tmp_path))

    run.cluster, run.root = cluster, tmp_path
    return run


@pytest.mark.parametrize(
    ("state", "terminated", "said"),
    [
        ("COMPLETE", False, "all steps succeeded"),
        ("SUCCEEDED", False, "all steps succeeded"),
        ("FAILED", False, "a step failed: the last lines of its log say why (no GPU)"),
        ("RUNNING", False, "a step was lost: its pod was killed or evicted, or could not start (no GPU)"),
        ("", False, "a step was lost"),
        ("RUNNING", True, "the run was terminated (no GPU)"),
        ("CANCELLED", True, "the run was terminated"),
    ],
)
def test_the_end_is_told_in_words_with_the_checkpoint_to_go_on_from(clean, state, terminated, said):
    clean.cluster.workflow = ENDS[0][0] if terminated else WORKFLOW
    output = clean.root / "train/output"
    for name in ("epoch_1", "step_1694"):
        (output / name).mkdir(parents=True)
        (output / name / storage.MANIFEST).write_text("{}")
    (output / "checkpoints.json").write_text('["epoch_1", "step_1694", "half-written"]')
    Backend(clean.cluster, "pytorchjob").create_or_adopt(GOLDEN["1x1"])
    lines = clean(state, "no GPU" if "SUCC" not in said.upper() else "")
    assert lines[0].startswith(said)
    kept = state in ("RUNNING", "", "FAILED") and not terminated
    assert any("runs on" in line for line in lines) is kept
    assert bool(clean.cluster.there) is kept
    clean.cluster.there.clear()
    told = "\n".join(clean(state))
    assert "no job was left" in told
    assert (f"the newest checkpoint: {output}/step_1694" in told) is ("succeeded" not in said)
    assert ("Retry in the UI goes on from it" in told) is ("succeeded" not in said)


@pytest.mark.parametrize(("workflow", "said"), [(ENDS[0][0], "the run was terminated"), (WORKFLOW, "a step was lost")])
def test_a_run_without_jobs_is_seen_to_be_terminated_too(clean, monkeypatch, workflow, said):
    clean.cluster.workflow = workflow
    monkeypatch.setattr(cleanup, "on_cluster", lambda: True)
    told = cleanup.clean_up(RUN, "local", state="RUNNING", root=str(clean.root))
    assert told[0].startswith(said)
    assert not any("job" in line for line in told)


@pytest.mark.parametrize("error", [Unavailable("503"), Forbidden("list pytorchjobs")])
def test_an_outage_is_no_clean_cluster(clean, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(clean.cluster, "objects", refuse)
    told = "\n".join(clean("FAILED"))
    assert "whether a job is left is not known" in told
    assert "no job was left" not in told


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b"<title>log in</title>", b'{"kind": "List", "it'])
def test_what_a_gateway_answers_is_no_answer_of_kubernetes(body):
    with answering(lambda path: (200, body)) as address:
        cluster = Cluster(client.ApiClient(client.Configuration(host=address)), "team")
        for ask in (cluster.groups, lambda: cluster.has(PYTORCHJOB), lambda: cluster.may("get", "", "pods"),
                    lambda: cluster.get(PYTORCHJOB, "a"), lambda: cluster.objects(PYTORCHJOB)):  # fmt: skip
            with pytest.raises(Unavailable):
                ask()


def test_the_pods_get_the_stores_variables_clean_and_no_credential(monkeypatch):
    given = {
        "AWS_ENDPOINT_URL": "http://minio:9000\n", "AWS_REGION": "eu-1\n", "AWS_MAX_ATTEMPTS": "9", "HOME": "/",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_SECRET_ACCESS_KEY": "x",
        "HF_ENDPOINT": "https://mirror", "HF_TOKEN": "y", "HTTPS_PROXY": "",
    }  # fmt: skip
    assert context.inherited(given) == {
        "AWS_ENDPOINT_URL": "http://minio:9000", "AWS_DEFAULT_REGION": "eu-1", "AWS_MAX_ATTEMPTS": "9",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "HF_ENDPOINT": "https://mirror",
    }  # fmt: skip
    with pytest.raises(DraftModelError, match="AWS_ENDPOINT_URL: holds a name or password"):
        context.inherited({"AWS_ENDPOINT_URL": "http://me:secret@minio"})


def test_the_pods_log_in_to_tracking_server_and_hub_by_reference(monkeypatch):
    """As Kubeflow Pipelines 2.17 makes the pod of a task where its MLflow plugin logs in by a Secret."""
    env = [
        {"name": "MLFLOW_TRACKING_URI", "value": "https://mlflow"},
        {"name": "MLFLOW_TRACKING_TOKEN", "valueFrom": {"secretKeyRef": KEY}},
        {"name": "MLFLOW_TRACKING_PASSWORD", "value": "written in the open"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": HUB}},
        {"name": "OTHER", "valueFrom": {"secretKeyRef": KEY}},
    ]
    own = {"metadata": OWNER, "spec": {"containers": [{"name": "main", "image": "i", "env": env}, {"name": "wait"}]}}
    cluster = FakeCluster()
    cluster.pod = lambda name: own
    monkeypatch.setenv("KFP_POD_NAME", "own")
    made = context.complete(cluster, GOLDEN["1x1"])
    assert made.image == os.environ.get(context.IMAGE, "i")
    text = json.dumps(pytorchjob(made))
    assert json.dumps({"name": "MLFLOW_TRACKING_TOKEN", "valueFrom": {"secretKeyRef": KEY}}) in text
    assert json.dumps({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": HUB}}) in text
    assert "written in the open" not in text
    assert '"key": "accesskey", "optional": true' in text


def test_a_local_folder_is_refused_before_anything_is_created(tmp_path):
    with pytest.raises(DraftModelError, match="dataset: given '/data'"):
        context.complete(FakeCluster(), replace(GOLDEN["1x1"], uris={"dataset": "/data"}))


def test_the_result_is_what_the_record_beside_the_served_draft_says(tmp_path, monkeypatch):
    """With final_checkpoint=best the draft is that of an earlier step than the last."""

    def train(*_):
        log, validation = (
            [{"loss": [1.0]}],
            [{"step": 2, "acceptance_length": 1.5}, {"step": 4, "acceptance_length": 1.2}],
        )
        record = {"steps": 4, "draft_step": 2, "acceptance_length": 1.5, "log": log, "validation": validation}
        (tmp_path / "out/final").mkdir(parents=True)
        (tmp_path / "out/final/training.json").write_text(json.dumps(record))

    monkeypatch.setattr(jobs, "run_here", train)
    p = Parameters(training_backend="local")
    found = jobs.run(TrainConfig("m", "d", str(tmp_path / "out"), tmp_path / "work", p))
    assert (found.steps, found.loss, found.acceptance_length) == (4, 1.0, 1.5)
