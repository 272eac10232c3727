"""Each component as KFP's launcher runs it, one after another on a tiny target, with a root in a real S3 store."""

import json
import re
import uuid
from pathlib import Path

import pytest
import tiny
from launcher import Launcher

from draft_model import storage
from draft_model.parameters import PARAMETERS

RUN = "0f8c1d1e-6a5b-4c7d-9e3f-2b4a6c8d0e1f"
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    given = tiny.write_run(tmp_path_factory.mktemp("data"), num_epochs=1, training_backend="local")
    return {parameter.name: parameter.default for parameter in PARAMETERS} | given


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, object_store):
    root = f"minio://{object_store.bucket}/{uuid.uuid4().hex}/pipeline-draft-model/{RUN}"
    return Launcher(tmp_path_factory.mktemp("pods"), root, {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def planned(launcher, inputs):
    return launcher.run("preflight", run_id=RUN, **inputs)


@pytest.fixture(scope="module")
def imported(launcher, planned):
    return launcher.run("import-model", run_id=RUN, parameters=planned.accepted()["model_import"])


@pytest.fixture(scope="module")
def built(launcher, planned, imported):
    uris = {"model_uri": imported.accepted()["Output"]}
    return launcher.run("build-dataset", run_id=RUN, parameters=planned.accepted()["dataset"], **uris)


@pytest.fixture(scope="module")
def uris(imported, built):
    return {"model_uri": imported.accepted()["Output"], "dataset_uri": built.accepted()["Output"]}


@pytest.fixture(scope="module")
def trained(launcher, planned, uris):
    return launcher.run("train-draft-model", run_id=RUN, parameters=planned.accepted()["train"], **uris)


@pytest.fixture(scope="module")
def evaluated(launcher, planned, uris, trained):
    draft = trained.accepted()["Output"]
    return launcher.run(
        "evaluate-draft-model", run_id=RUN, parameters=planned.accepted()["evaluate"], draft_uri=draft, **uris
    )


def test_the_preflight_gives_each_stage_those_of_its_parameters_that_were_given(planned):
    plan = planned.accepted()
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan["train"]["num_epochs"] == 1
    assert "num_epochs" not in plan["dataset"]
    assert plan["model_import"].keys() == {"pytorch_model_path", "max_length", "training_backend"}
    page = planned.uploaded("summary")
    assert page.startswith("# This run can start\n")
    assert "| num\\_epochs | 1 | 2 |\n" in page


def test_the_imported_folder_is_named_in_metadata_and_output(imported):
    uri = imported.accepted()["Output"]
    assert storage.read_manifest(uri, stage="import").files
    assert imported.metadata("model")["uri"] == uri
    assert imported.metadata("metrics")["parameters"] > 0
    assert "LlamaForCausalLM" in imported.uploaded("summary")
    own = f"{imported.root}/import-model/"
    assert uri.startswith(own) or imported.uploaded("model") == {"README.md": f"The files are in {uri}\n"}


def test_the_data_set_has_its_report_and_counts(built):
    uri = built.accepted()["Output"]
    assert storage.read_manifest(uri, stage="dataset").files
    assert built.metadata("dataset")["uri"] == uri
    assert built.metadata("metrics")["train_rows_kept"] == 24
    assert "<html" in built.uploaded("report").lower()


def test_the_draft_is_at_the_artifacts_uri(trained):
    final = trained.accepted()["Output"]
    assert storage.read_manifest(final, stage="train").files
    artifact = trained.metadata("output_model_path")
    assert artifact["final"] == final == f"{artifact['uri']}/final"
    assert trained.metadata("metrics")["steps"] == 3


def test_the_evaluation_ends_its_log_with_its_result(evaluated):
    evaluated.accepted()
    last = evaluated.process.stderr.splitlines()[-1]
    assert f"acceptance length {evaluated.metadata('metrics')['acceptance_length']:.2f} " in last
    assert "<html" in evaluated.uploaded("report").lower()
    assert evaluated.uploaded("card").startswith("---\n")


def test_the_clean_up_of_a_run_whose_training_was_killed_names_the_newest_checkpoint(launcher, trained):
    final = trained.accepted()["Output"]
    status = {"state": "RUNNING", "pipelineJobResourceName": "runs/x", "pipelineTaskName": "train-a-draft-model"}
    shared = {"training_backend": "local", "storage_uri": "", "checkpoint_path": ""}
    ended = launcher.run("clean-up", run_id=RUN, status=status, **shared)
    ended.accepted()
    page = ended.uploaded("summary")
    assert page.startswith("- a step was lost: its pod was killed or evicted")
    newest = final.replace("/final", "/epoch_1").replace("_", "\\_")
    assert f"the newest checkpoint: {newest}" in page


def test_a_mistake_ends_a_step_with_its_sentences_last(launcher, inputs, tmp_path):
    wrong = {"num_epochs": 0, "dataset_validation_split": "/none.jsonl", "compute_model_import": "nowhere"}
    ended = Launcher(tmp_path, launcher.root).run("preflight", run_id=RUN, **{**inputs, **wrong})
    assert ended.process.returncode == 2
    assert "Traceback" not in ended.process.stderr
    _, said = re.split(r"^error: ", ended.process.stderr, flags=re.MULTILINE)
    assert all(line.startswith("  - ") for line in said.splitlines()[1:])
    assert all(f"{name}: given " in said for name in wrong)
    # Nothing that the launcher would take for a result, and no scratch folder.
    left = {path.name for path in (tmp_path / "preflight").iterdir()}
    assert left <= {"ephemeral_component.py", "__pycache__", "log", "minio"}
    (page,) = (path for path in ended.mount.rglob("*") if path.is_file())
    assert page.read_text().startswith("# This run cannot start: 3 problems\n")


def test_the_clean_up_of_a_run_that_could_not_start_says_so_whatever_was_wrong(launcher, tmp_path):
    wrong = {"training_backend": "nonsense", "storage_uri": "ftp://host/drafts", "checkpoint_path": ""}
    ended = Launcher(tmp_path, launcher.root).run("clean-up", run_id=RUN, status={"state": "FAILED"}, **wrong)
    ended.accepted()
    assert ended.uploaded("summary").startswith("- a step failed: the last lines of its log say why\n")
    assert "Traceback" not in ended.process.stderr


def test_inputs_that_lost_a_file_end_the_training_before_a_job_starts(launcher, planned, uris, tmp_path):
    copy = storage.fetch(uris["dataset_uri"], tmp_path / "copy")
    next(path for path in sorted(Path(copy).rglob("*.parquet"))).unlink()
    given = {"parameters": planned.accepted()["train"], "model_uri": uris["model_uri"], "dataset_uri": str(copy)}
    ended = Launcher(tmp_path / "pods", launcher.root).run("train-draft-model", run_id=RUN, **given)
    assert ended.process.returncode == 2
    (problem,) = [line for line in ended.process.stderr.splitlines() if line.startswith("error: ")]
    assert str(copy) in problem
    assert problem.endswith("the dataset step makes it again in a new run")
