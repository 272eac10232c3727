"""Before anything heavy starts, inputs that are not there are told together with parameters that are wrong."""

import json
import uuid

import pytest

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.preflight import check


@pytest.fixture(params=["local", "file", "s3"])
def root(request, tmp_path):
    """A folder's URI, of each kind."""
    if request.param == "s3":
        store = request.getfixturevalue("object_store")
        return f"s3://{store.bucket}/{uuid.uuid4().hex}"
    return str(tmp_path) if request.param == "local" else tmp_path.as_uri()


def problems(values, *stages):
    with pytest.raises(DraftModelError) as caught:
        check(values, *stages)
    return caught.value.problems


def test_inputs_that_are_there_are_accepted(root):
    for name in ("train.jsonl", "validation.jsonl", "draft.json", "mlflow/MLmodel", "checkpoint/config.json"):
        storage.write_bytes(storage.join(root, name), b"{}")
    values = {
        "mlflow_model_path": f"{root}/mlflow",
        "dataset_train_split": f"{root}/train.jsonl",
        "dataset_validation_split": f"{root}/validation.jsonl",
        "draft_model_config": f"{root}/draft.json",
        "resume_from_checkpoint": f"{root}/checkpoint",
        "num_epochs": "3",
    }
    parameters = check(values)
    assert parameters.num_epochs == 3
    assert {name: getattr(parameters, name) for name in values} == {**values, "num_epochs": 3}


def test_all_that_is_missing_is_told_with_all_that_is_wrong(root):
    missing = {
        "mlflow_model_path": f"{root}/mlflow",
        "dataset_train_split": f"{root}/train.jsonl",
        "dataset_validation_split": f"{root}/validation.jsonl",
        "draft_model_config": f"{root}/draft.json",
        "resume_from_checkpoint": f"{root}/checkpoint",
    }
    found = problems({**missing, "num_epochs": 0, "huggingface_id": "a/b"})
    named = {problem.partition(":")[0]: problem for problem in found}
    assert named.keys() == {*missing, "num_epochs", "huggingface_id, pytorch_model_path, mlflow_model_path"}
    assert len(found) == len(named)
    assert all(f"given {uri!r}, but there is no {uri}" in named[name] for name, uri in missing.items())


def test_a_local_model_folder_must_be_there(tmp_path, monkeypatch):
    train = tmp_path / "train.jsonl"
    train.touch()
    (tmp_path / "home dir" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home dir"))
    model = tmp_path / "home dir/model"
    for uri in (str(model), "~/model", model.as_uri()):
        check({"pytorch_model_path": uri, "dataset_train_split": str(train)})
    for uri in (str(tmp_path / "none"), "~/none", str(train), "/" + "x" * 5000):
        (found,) = problems({"pytorch_model_path": uri, "dataset_train_split": str(train)})
        assert found.startswith(f"pytorch_model_path: {uri}")


@pytest.mark.parametrize("uri", ["ftp://host/train.jsonl", "s3://", "s3://bucket/a/../b", "a\0b", "/" + "x" * 5000])
def test_what_is_no_usable_uri_is_told_by_parameter(uri):
    (found,) = problems({"huggingface_id": "a/b", "dataset_train_split": uri})
    assert found.startswith("dataset_train_split: ")


def test_a_parameter_that_is_wrong_already_is_told_once():
    (found,) = problems({"pytorch_model_path": "it's\\here", "dataset_train_split": __file__})
    assert found.startswith("pytorch_model_path: given ")
    (found,) = problems({"huggingface_id": "a/b", "dataset_train_split": 5})
    assert found.startswith("dataset_train_split: given 5")


@pytest.mark.parametrize("uri", ["models:/target/3", "runs:/0123/model"])
def test_what_only_mlflow_can_find_is_left_to_the_import(uri):
    assert check({"mlflow_model_path": uri, "dataset_train_split": __file__}).mlflow_model_path == uri


def test_stages_that_do_not_run_need_no_inputs():
    assert check({"num_epochs": 5}, ["train"]).num_epochs == 5
    (found,) = problems({"resume_from_checkpoint": "/none"}, ["train"])
    assert found.startswith("resume_from_checkpoint: ")


def test_a_store_that_does_not_answer_is_told_for_each_input(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-shown")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    splits = {name: f"s3://bucket/{name}" for name in ("dataset_train_split", "dataset_validation_split")}
    found = problems({"huggingface_id": "a/b", **splits})
    assert [problem.partition(":")[0] for problem in found] == list(splits)
    assert "never-shown" not in json.dumps(found)


def test_resume_that_is_bound_to_find_nothing_in_a_shared_folder_is_told(root):
    storage.write_bytes(f"{root}/train.jsonl", b"{}")
    place = f"{root}/shared"
    values = {"huggingface_id": "a/b", "dataset_train_split": f"{root}/train.jsonl", "checkpoint_path": place}
    check(values)  # the first run of those that share it
    (found,) = problems({**values, "resume": "true"})
    assert found.startswith(f"checkpoint_path: given '{place}' with resume='true', but there is no checkpoint there")
    storage.write_bytes(f"{place}/checkpoints.json", b'["epoch_1"]')
    check({**values, "resume": "true"})
    (found,) = problems({**values, "checkpoint_path": "ftp://host/shared"})
    assert found.startswith("checkpoint_path: ")
