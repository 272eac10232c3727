"""What the pipeline's steps do beside calling their stage; tests/kfp_pipeline/test_launcher.py runs them whole."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny

from draft_model import jobs, regenerate, steps, storage
from draft_model.entrypoint import ERROR_FILE
from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS

DEFAULTS = {parameter.name: parameter.default for parameter in PARAMETERS}


@dataclass
class Artifact:
    uri: str
    path: str
    metadata: dict = field(default_factory=dict)


@dataclass
class Status:
    state: str | None
    error_message: str = ""


@pytest.fixture
def summary(tmp_path, monkeypatch):
    """An artifact whose URI is below a run's root; the process handles signals as before."""
    monkeypatch.setattr(steps.step.__wrapped__.__globals__["signal"], "signal", lambda *_: None)
    (tmp_path / "root/RUN").mkdir(parents=True)
    return Artifact(f"{tmp_path}/root/RUN/step/summary", str(tmp_path / "summary"))


def read(artifact):
    return Path(artifact.path).read_text(encoding="utf-8").replace("\\", "")


def test_what_passes_between_steps_is_what_was_given_and_what_jobs_need(summary, tmp_path):
    data = str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.conversations(2)))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    given = {"pytorch_model_path": str(model), "dataset_train_split": data, "training_backend": "local"}
    given |= {"start_limit": 5, "num_epochs": 3, "evaluation_conversations": 9, "regenerate_limit": 4}
    imported, built, trained, evaluated = steps.preflight({**DEFAULTS, **given, "other": 1}, "RUN", summary)
    every = {"training_backend": "local", "start_limit": 5}
    assert imported == {**every, "pytorch_model_path": str(model)}
    assert built == {**every, "dataset_train_split": data, "regenerate_limit": 4}
    assert trained == {**every, "num_epochs": 3}
    assert evaluated == {**every, "evaluation_conversations": 9}


def stage(monkeypatch, **parameters):
    """What the import runs as: the name of the function that was called."""
    called = []
    monkeypatch.setattr(jobs, "run_stage", lambda *given: called.append("job") or {})
    monkeypatch.setitem(steps.RUNS, "import", lambda *_, **__: called.append("here") or {})
    steps._perform("import", steps.Parameters(**parameters), {"root": "s3://b/root"}, "RUN", Path())
    return called


def test_a_stage_is_a_job_where_there_is_a_cluster_and_pods_see_its_inputs(monkeypatch):
    assert stage(monkeypatch, training_backend="pytorchjob", huggingface_id="a/b") == ["job"]
    assert stage(monkeypatch, training_backend="pytorchjob", pytorch_model_path="s3://b/m") == ["job"]
    assert stage(monkeypatch, training_backend="pytorchjob", pytorch_model_path="/data/m") == ["here"]
    assert stage(monkeypatch, training_backend="local", huggingface_id="a/b") == ["here"]
    assert stage(monkeypatch, huggingface_id="a/b") == ["here"]
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert stage(monkeypatch, huggingface_id="a/b") == ["job"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"training_backend": "local", "huggingface_id": "a/b"}, "training_backend: given 'local', but the image"),
        ({"training_backend": "pytorchjob", "pytorch_model_path": "/data/m"},
         "pytorch_model_path: given '/data/m', which no job's pod sees, but the image of this step only coordinates"),
    ],
)  # fmt: skip
def test_what_the_coordinators_image_cannot_run_is_told_with_the_way_out(monkeypatch, given, told):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DraftModelError, match=f"{re.escape(told)}.*trainer's image for all steps"):
        steps._perform("import", steps.Parameters(**given), {}, "RUN", Path())


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        ({"PET_NODE_RANK": "2", "PET_NNODES": "3"}, (2, 3)),  # a TrainJob's pod
        ({"PET_NODE_RANK": "1", "PET_NNODES": "2", "RANK": "1", "WORLD_SIZE": "8"}, (1, 2)),  # a PyTorchJob's
        ({"PET_NODE_RANK": "0", "PET_NNODES": "2", "RANK": "0", "WORLD_SIZE": "8"}, (0, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_a_jobs_pods_share_a_regeneration_and_the_first_one_writes_its_result(
    tmp_path, monkeypatch, environment, place
):
    for name in ("PET_NODE_RANK", "PET_NNODES", "RANK", "WORLD_SIZE", ERROR_FILE):
        monkeypatch.delenv(name, raising=False)
    result = tmp_path / "result.json"
    job = {"stage": "regenerate", "run_id": "RUN", "parameters": {}, "result": str(result), "work": str(tmp_path)}
    job["uris"] = {"model": "/model", "output": "/answers"}
    for name, value in {**environment, "DRAFT_MODEL_JOB": json.dumps(job)}.items():
        monkeypatch.setenv(name, value)
    given = []
    answers = regenerate.RegenerateResult("/answers", False, {})
    monkeypatch.setattr(regenerate, "run", lambda config: given.append((config.pod, config.pods)) or answers)
    monkeypatch.setattr(steps, "raise_on_sigterm", lambda: None)
    assert steps.main() == 0
    assert given == [place]
    assert result.exists() == (place[0] == 0)


def test_a_target_that_does_not_fit_ends_the_evaluation_before_it_starts(tmp_path, monkeypatch):
    """By the weights that were imported, and the compute map."""
    weights = {"model": {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}, "draft": {}}
    for name, config in weights.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    uris = {name: f"{tmp_path}/at/{name}" for name in weights}
    storage.publish(tmp_path / "model", uris["model"], stage="import", properties={"parameter_count": 12 * 10**9})
    storage.publish(tmp_path / "draft", uris["draft"], stage="train", properties={})
    p = {"training_backend": "pytorchjob", "instance_type_evaluation": "g6.xlarge"}
    assert "the evaluation needs 24.0 GB" in steps._misfit(steps.Parameters(**p), uris["model"], uris["draft"])
    assert steps._misfit(steps.Parameters(training_backend="local"), uris["model"], uris["draft"]) == ""


def clean(summary, status, **changes):
    shared = {"training_backend": "local", "storage_uri": "", "checkpoint_path": "", **changes}
    steps.clean_up("RUN", **shared, status=status, summary=summary)
    return read(summary).splitlines()


@pytest.mark.parametrize("where", ["storage_uri", "checkpoint_path"])  # the run's root: test_launcher.py
@pytest.mark.parametrize("index", ['["epoch_1", "step_9"]', '["epoch_1", "st', None])
def test_the_clean_up_names_the_newest_whole_checkpoint(summary, tmp_path, where, index):
    folder, given = {
        "storage_uri": (tmp_path / "mine/output_model_path", {"storage_uri": f"{tmp_path}/mine"}),
        "checkpoint_path": (tmp_path / "shared", {"checkpoint_path": f"{tmp_path}/shared"}),
    }[where]
    for step, name in ((5, "epoch_1"), (9, "step_9")):
        storage.write_manifest(f"{folder}/{name}", "checkpoint", [], {"step": step})
    if index:
        storage.write_bytes(f"{folder}/checkpoints.json", index.encode())
    _, newest, how = clean(summary, Status("RUNNING"), **given)
    assert newest == f"- the newest checkpoint: {folder}/step_9"
    assert how.endswith(f"resume_from_checkpoint={folder}/step_9 and resume=true")


def test_what_kfp_cannot_store_is_left_out_of_metadata_and_metrics():
    artifact = Artifact("", "")
    steps._record(
        artifact, loss=float("nan"), peak=float("inf"), revision=None, steps=3, shares=[0.5, float("nan")],
        nested={"a": None}, lengths=[1, 2], name="x", best=True,
    )  # fmt: skip
    assert artifact.metadata == {"steps": 3, "lengths": [1, 2], "name": "x", "best": True}


def test_results_are_found_again_below_the_root_of_all_runs():
    parameters = steps.Parameters()

    uri = "minio://bucket/x/pipeline-draft-model/RUN/import-model/1/model"
    assert steps._output(parameters, "model", uri, "RUN") == {
        "output": uri, "root": "minio://bucket/x/pipeline-draft-model",
    }  # fmt: skip
    mine = parameters.model_copy(update={"storage_uri": "s3://b/mine"})
    assert steps._output(mine, "model", uri, "RUN") == {"output": "s3://b/mine/model", "root": "s3://b/mine"}
    assert steps._output(parameters, "model", "/tmp/model", "RUN")["root"] == ""


@pytest.mark.parametrize("elsewhere", [True, False])
def test_an_artifact_keeps_its_uri_and_leads_to_the_files(tmp_path, elsewhere):
    artifact = Artifact("minio://b/run/model", str(tmp_path / "model"))
    uri = "s3://b/models/1" if elsewhere else artifact.uri
    steps._describe(artifact, uri, source="a/b")
    assert (artifact.uri, artifact.metadata) == ("minio://b/run/model", {"uri": uri, "source": "a/b"})
    readme = tmp_path / "model/README.md"
    assert readme.read_text() == f"The files are in {uri}\n" if elsewhere else not readme.exists()
