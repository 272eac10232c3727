"""What the pipeline's steps do beside calling their stage; tests/kfp_pipeline/test_launcher.py runs them whole."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny

from draft_model import steps, storage
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


@pytest.mark.parametrize(
    ("given", "selector"),
    [
        ({"instance_type_model_import": "standard_D8S_v5"}, {"node.kubernetes.io/instance-type": "Standard_D8s_v5"}),
        ({"instance_type_model_import": "Standard_D8s_v5", "compute_model_import": "cpu-pool"}, None),
    ],
)
def test_the_pods_of_import_and_data_set_get_the_nodes_of_the_compute(summary, tmp_path, given, selector):
    data = str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.conversations(2)))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    values = {**DEFAULTS, "pytorch_model_path": str(model), "dataset_train_split": data, "training_backend": "local"}
    *stages, cpu, memory, found, tolerations = steps.preflight({**values, **given, "other": 1}, "RUN", summary)
    assert (cpu[-1], memory[-2:], type(tolerations)) == ("m", "Mi", list)
    assert found == selector or (selector is None and "node.kubernetes.io/instance-type" not in found)
    assert [stage["storage_uri"] for stage in stages] == [""] * 4
    assert f"| import, dataset | {cpu} | {memory} |" in read(summary)


def clean(summary, status, **changes):
    shared = {"training_backend": "local", "storage_uri": "", "checkpoint_path": "", **changes}
    steps.clean_up("RUN", **shared, status=status, summary=summary)
    return read(summary).splitlines()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("COMPLETE", "- all steps succeeded"),
        ("SUCCEEDED", "- all steps succeeded"),
        ("FAILED", "- a step failed: the last lines of its log say why"),
        ("CANCELED", "- the run was terminated"),
        ("RUNNING", "- a step was lost: its pod was killed or evicted, or could not start"),
        ("", "- a step was lost: its pod was killed or evicted, or could not start"),
        (None, "- a step was lost: its pod was killed or evicted, or could not start"),
    ],
)
def test_the_clean_up_says_how_the_run_ended(summary, state, said):
    lines = clean(summary, Status(state))
    rest = [] if "succeeded" in said else ["- there is no whole checkpoint; Retry in the UI starts the step that"]
    assert lines[0] == said
    assert [line[: len(start)] for line, start in zip(lines[1:], rest, strict=True)] == rest


@pytest.mark.parametrize("where", ["storage_uri", "checkpoint_path"])  # the run's root: test_launcher.py
def test_the_clean_up_names_the_newest_whole_checkpoint(summary, tmp_path, where):
    folder, given = {
        "storage_uri": (tmp_path / "mine/output_model_path", {"storage_uri": f"{tmp_path}/mine"}),
        "checkpoint_path": (tmp_path / "shared", {"checkpoint_path": f"{tmp_path}/shared"}),
    }[where]
    for name in ("epoch_1", "step_9"):
        storage.write_bytes(f"{folder}/{name}/{storage.MANIFEST}", b"{}")
    storage.write_bytes(f"{folder}/checkpoints.json", json.dumps(["epoch_1", "step_9"]).encode())
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
