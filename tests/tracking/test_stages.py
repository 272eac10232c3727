"""The four stages in a row by the command line, tracked in one store: a parent, a child per stage, curves."""

import json
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

from draft_model import storage
from draft_model.cli import cli
from draft_model.parameters import parameters_of
from draft_model.tracking import RUN, forwarded


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def stages(root, store):
    """A client of the store, runs of all stages by name, and the last line that each command printed."""
    from mlflow import MlflowClient

    uri = store(root / "mlflow.db")
    given = tiny.write_run(
        root, num_epochs=1, log_steps=1, register_model_name="tiny-eagle3", build_dataset_num_proc=1,
        mlflow_tracking_uri=uri, checkpoint_path=f"{root}/checkpoints",
    )  # fmt: skip
    said = {}

    def run(stage, **uris):
        own = {p.name: given[p.name] for p in parameters_of(stage) if p.name in given}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in {**uris, **own}.items()]
        done = CliRunner().invoke(cli, [stage, *options], catch_exceptions=False)
        assert done.exit_code == 0
        said[stage] = done.stdout.splitlines()[-1]
        return said[stage]

    with pytest.MonkeyPatch.context() as patch:
        # The parameter wins, and ids of another server mean nothing on this.
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_RUN_ID", "of another server")
        patch.setenv("MLFLOW_EXPERIMENT_ID", "of another server")
        patch.setenv(RUN, "a run")
        model = run("import", output=root / "model")
        data = run("dataset", model=model, output=root / "dataset")
        draft = run("train", model=model, dataset=data, output=root / "output", work=root / "work")
        run("evaluate", model=model, dataset=data, draft=draft)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("draft-model").experiment_id
    return client, {run.info.run_name: run for run in client.search_runs([experiment])}, said


def test_each_command_prints_where_its_output_is_and_the_last_one_the_result(stages, root):
    _, _, said = stages
    uris = [said[stage] for stage in ("import", "dataset", "train")]
    assert uris == [str(root / name) for name in ("model", "dataset", "output/final")]
    manifests = [storage.read_manifest(uri) for uri in (*uris, f"{root}/checkpoints/epoch_1")]
    assert [manifest.stage for manifest in manifests] == ["import", "dataset", "train", "checkpoint"]
    assert manifests[-1].properties["run_id"]
    assert not (root / "checkpoints/lease.json").exists()  # given back
    evaluation = json.loads((root / "output/final/evaluation.json").read_text())
    assert evaluation["lossless"]["identical"]
    assert evaluation["prompts"] == 2
    assert said["evaluate"].startswith(f"acceptance length {evaluation['trained']['acceptance_length']:.2f} ")
    assert json.loads((root / "output/final/training.json").read_text())["steps"] == 3
    storage.fetch(said["train"], root)  # every file is as the manifest says


def test_every_stage_is_a_child_of_one_run(stages):
    _, runs, _ = stages
    assert runs.keys() == {"draft-model", "import", "dataset", "train", "evaluate"}
    parent = runs.pop("draft-model")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
    assert runs["train"].data.params["num_epochs"] == "1"
    assert runs["dataset"].data.params["max_length"] == "64"


def test_the_curves_are_those_of_the_training(stages):
    client, runs, said = stages
    record = json.loads(Path(said["train"], "training.json").read_text(encoding="utf-8"))
    run = runs["train"].info.run_id

    def curve(name):
        return [(point.step, point.value) for point in client.get_metric_history(run, name)]

    assert curve("loss_2") == [(entry["step"], entry["loss"][1]) for entry in record["log"]]
    for name in ("learning_rate", "grad_norm", "tokens_per_second", "acceptance_length"):
        assert curve(name) == [(entry["step"], entry[name]) for entry in record["log"]]
    assert curve("validation_conditional_acceptance_1") == [
        (entry["step"], entry["conditional_acceptance"][0]) for entry in record["validation"]
    ]
    assert all(value > 0 for _, value in curve("memory_gigabytes"))


def test_lineage_and_the_registered_model(stages):
    client, runs, said = stages
    final = said["train"]
    assert {i.dataset.name for i in runs["train"].inputs.dataset_inputs} == {"target", "dataset"}
    assert runs["train"].data.tags["artifact.final"] == final
    inputs = {i.dataset.name: json.loads(i.dataset.source)["uri"] for i in runs["evaluate"].inputs.dataset_inputs}
    assert inputs.keys() == {"target", "dataset", "draft"}
    assert inputs["draft"] == final
    assert runs["evaluate"].data.tags["artifact.report.html"] == f"{final}/report.html"
    assert runs["evaluate"].data.metrics["lossless"] == 1.0
    (version,) = client.search_model_versions("name = 'tiny-eagle3'")
    assert (version.source, version.run_id) == (final, runs["evaluate"].info.run_id)


def test_pods_are_told_where_to_track_but_no_password():
    here = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_RUN_ID": "1", "MLFLOW_TRACKING_TOKEN": "secret"}
    assert forwarded(here) == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_RUN_ID": "1"}
    # What KFP sets where its MLflow takes the pods' own accounts: a way to log in, not a secret.
    assert forwarded({"MLFLOW_TRACKING_AUTH": "kubernetes"}) == {"MLFLOW_TRACKING_AUTH": "kubernetes"}
    assert forwarded(here | {"MLFLOW_TRACKING_URI": "http://me:secret@mlflow:5000"}) == {}
