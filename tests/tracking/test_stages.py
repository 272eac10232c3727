"""The four stages in one local store: a parent, a child per stage, and curves over the steps."""

import json
from pathlib import Path

import pytest
import tiny

from draft_model import dataset, evaluation, model_import, training
from draft_model.parameters import Parameters
from draft_model.tracking import RUN, forwarded
from draft_model.training.job import run as train


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Runs of all stages by name, and where their results are."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("tracked")
    uri = f"sqlite:///{root}/mlflow.db"
    split = {name: str(tiny.write_jsonl(root / f"{name}.jsonl", tiny.conversations(12))) for name in "tv"}
    parameters = Parameters(
        pytorch_model_path=str(tiny.write_target(root / "target")), chat_template="qwen", max_length=64,
        dataset_train_split=split["t"], dataset_validation_split=split["v"], compute_dtype="float32", ttt_length=2,
        num_epochs=1, log_steps=1, draft_global_batch_size=4, evaluation_conversations=2, evaluation_max_new_tokens=6,
        register_model_name="tiny-eagle3", build_dataset_num_proc=1, mlflow_tracking_uri=uri,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # The parameter wins, and ids of another server mean nothing on this.
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_RUN_ID", "of another server")
        patch.setenv("MLFLOW_EXPERIMENT_ID", "of another server")
        patch.setenv(RUN, "a run")
        model = model_import.run(model_import.ImportConfig(str(root / "model"), root / "w1", parameters)).uri
        data = dataset.run(dataset.DatasetConfig(model, str(root / "data"), parameters, root / "w2")).uri
        final = train(training.TrainConfig(model, data, str(root / "output"), root / "w3", parameters)).final
        evaluation.run(evaluation.EvaluateConfig(model, data, final, root / "w4", parameters))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("draft-model").experiment_id
    return client, {run.info.run_name: run for run in client.search_runs([experiment])}, final


def test_every_stage_is_a_child_of_one_run(stages):
    _, runs, _ = stages
    assert runs.keys() == {"draft-model", "import", "dataset", "train", "evaluate"}
    parent = runs.pop("draft-model")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
    assert runs["train"].data.params["num_epochs"] == "1"
    assert runs["dataset"].data.params["max_length"] == "64"


def test_the_curves_are_those_of_the_training(stages):
    client, runs, final = stages
    record = json.loads(Path(final, "training.json").read_text(encoding="utf-8"))
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
    client, runs, final = stages
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
