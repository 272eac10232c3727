"""Before anything heavy starts, inputs that are not there are told together with parameters that are wrong."""

import gzip
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest
import tiny
from answers import answering
from model_import.hub_server import Hub

from draft_model import preflight, storage, workers
from draft_model.dataset import files
from draft_model.errors import DraftModelError
from draft_model.jobs.cluster import Cluster
from draft_model.kubeflow import HEALTH
from draft_model.model_import import hub as hub_client
from draft_model.preflight import check, inspect_run


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


def put(root, *names, content=b"{}"):
    for name in names:
        storage.write_bytes(storage.join(root, name), content)


def test_inputs_that_are_there_are_accepted(root):
    put(root, "train.jsonl", "validation.jsonl", "draft.json", "checkpoint/config.json", "mlflow/model/config.json")
    put(root, "mlflow/MLmodel", content=b"flavors: {transformers: {}}")
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
        "dataset_train_split": f"{root}/train.jsonl",
        "dataset_validation_split": f"{root}/validation.jsonl",
        "draft_model_config": f"{root}/draft.json",
        "resume_from_checkpoint": f"{root}/checkpoint",
        "mlflow_model_path": f"{root}/mlflow",
        "evaluation_prompts": f"{root}/prompts.jsonl",
    }
    found = problems({**missing, "num_epochs": 0, "huggingface_id": "a/b"})
    named = {problem.partition(":")[0]: problem for problem in found}
    assert named.keys() == {*missing, "num_epochs", "huggingface_id, pytorch_model_path, mlflow_model_path"}
    assert len(found) == len(named)
    assert "; give a file of JSON lines" in named["evaluation_prompts"]
    assert named["evaluation_prompts"].endswith(", or name benchmarks: mt-bench, gsm8k, humaneval, alpaca, cnn-dm")
    assert named["mlflow_model_path"].startswith(f"mlflow_model_path: {missing.pop('mlflow_model_path')}")
    assert all(f"given {uri!r}, but there is no {uri}" in named[name] for name, uri in missing.items())


@pytest.mark.parametrize("name", ["draft_model_config", "resume_from_checkpoint"])
@pytest.mark.parametrize(("content", "told"), [(b"{", "is not JSON"), (b"[]", "holds no JSON object")])
def test_a_configuration_that_is_none_is_told(root, name, content, told):
    put(root, "train.jsonl")
    put(root, "mine/config.json", content=content)
    uri = f"{root}/mine" if name == "resume_from_checkpoint" else f"{root}/mine/config.json"
    (found,) = problems({"huggingface_id": "a/b", "dataset_train_split": f"{root}/train.jsonl", name: uri})
    assert found.startswith(f"{name}: {root}/mine/config.json {told}")


def test_files_that_are_listed_and_cannot_be_read_are_told(request):
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    request.addfinalizer(lambda: shutil.rmtree(folder))
    folder.chmod(0o755)
    put(str(folder), "train/a.jsonl", "train/b.jsonl", "config.json")
    given = {"huggingface_id": "a/b", "dataset_train_split": f"{folder}/train"}
    given |= {"draft_model_config": f"{folder}/config.json"}
    check(given)
    for name in ("train/b.jsonl", "config.json"):
        (folder / name).chmod(0)
    if os.geteuid() == 0:  # who may read everything
        os.seteuid(65534)
        request.addfinalizer(lambda: os.seteuid(0))
    found = problems(given)
    assert [problem.partition(":")[0] for problem in found] == ["dataset_train_split", "draft_model_config"]
    assert all("permission denied" in problem.lower() for problem in found)


def test_a_local_model_folder_must_be_there(tmp_path, monkeypatch):
    train = tmp_path / "train.jsonl"
    train.touch()
    put(str(tmp_path), "home dir/model/config.json")
    monkeypatch.setenv("HOME", str(tmp_path / "home dir"))
    model = tmp_path / "home dir/model"
    for uri in (str(model), "~/model", model.as_uri()):
        check({"pytorch_model_path": uri, "dataset_train_split": str(train)})
    for uri in (str(tmp_path / "none"), "~/none", str(train), "/" + "x" * 5000):
        (found,) = problems({"pytorch_model_path": uri, "dataset_train_split": str(train)})
        assert found.startswith(f"pytorch_model_path: {uri}")


@pytest.mark.parametrize("uri", ["ftp://host/train.jsonl", "s3://", "s3://bucket/a/../b", "a\0b", "/" + "x" * 5000])
def test_what_is_no_usable_uri_is_told_by_parameter(uri, monkeypatch):
    monkeypatch.setattr(files, "_PAUSE", 0.0)  # an operating system's errors are tried again
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
    check({"evaluation_prompts": "/none"}, ["train"])
    for given in ("/none", 5):
        (found,) = problems({"evaluation_prompts": given}, ["evaluate"])
        assert found.startswith(f"evaluation_prompts: given {given!r}")


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


PROMPT = b'{"prompt": "alpha"}\n'


def with_prompts(root, given, **more):
    put(root, "train.jsonl")
    return {"huggingface_id": "a/b", "dataset_train_split": f"{root}/train.jsonl", "evaluation_prompts": given, **more}


def test_prompts_that_are_there_are_accepted(root):
    put(root, "prompts/a.jsonl", content=PROMPT)
    put(root, "prompts/b.jsonl.gz", content=gzip.compress(PROMPT * 2))
    for given in (f"{root}/prompts", f"{root}/prompts/*.gz", f"{root}/prompts/a.jsonl", "mt-bench, GSM8K", ""):
        assert check(with_prompts(root, given)).evaluation_prompts == given


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("prompts.jsonl", PROMPT + b'{"prompts": "beta"}\n', "line 2 of {uri} is not a conversation: "),
        ("prompts.jsonl", b"\n", "there is no line in"),
        ("prompts.jsonl.gz", gzip.compress(PROMPT, mtime=0)[:-4], "{uri}: is damaged gzip data"),
    ],
)
def test_prompts_that_the_evaluation_could_not_decode_are_told(root, name, content, told):
    put(root, name, content=content)
    (found,) = problems(with_prompts(root, f"{root}/{name}"))
    assert found.startswith(f"evaluation_prompts: {told.format(uri=f'{root}/{name}'.removeprefix('file://'))}")


def test_lines_that_the_evaluation_does_not_decode_are_not_looked_at(root):
    put(root, "prompts.jsonl", content=PROMPT + b"{")
    check(with_prompts(root, f"{root}/prompts.jsonl", evaluation_conversations="1"))
    for limit in (0, 2):
        (found,) = problems(with_prompts(root, f"{root}/prompts.jsonl", evaluation_conversations=limit))
        assert found.startswith("evaluation_prompts: line 2 ")
    found = problems(with_prompts(root, f"{root}/none", evaluation_conversations=-1))
    assert [problem.partition(":")[0] for problem in found] == ["evaluation_conversations", "evaluation_prompts"]


def test_an_address_of_prompts_that_cannot_be_reached_is_told_without_its_signature(monkeypatch):
    monkeypatch.setattr(files, "_PAUSE", 0)
    (found,) = problems({"evaluation_prompts": "https://127.0.0.1:9/prompts.jsonl?signed=never-shown"}, ["evaluate"])
    assert found.startswith("evaluation_prompts: https://127.0.0.1:9/prompts.jsonl: cannot be reached")
    assert "never-shown" not in found


@pytest.fixture
def run(tmp_path):
    """A run's first step: what it finds, its artifacts being in a folder of this machine."""
    put(str(tmp_path), "train.jsonl")

    def run(root=None, **values):
        given = {"huggingface_id": "org/name", "dataset_train_split": str(tmp_path / "train.jsonl")}
        given |= {"compute_model_import": "cpu-pool", **values}
        return inspect_run(given, root or str(tmp_path), tmp_path / "work")

    return run


@pytest.fixture
def run_model(run, tmp_path, monkeypatch):
    """The same with a folder as the model, by the text or the fields of its config.json."""
    monkeypatch.setattr(preflight, "check_cluster", lambda *_: ([], []))

    def run_model(config=None, **values):
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            put(str(tmp_path), "model/config.json", content=text.encode())
        return run(**{"huggingface_id": "", "pytorch_model_path": str(tmp_path / "model"), **values})

    return run_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    put(str(tmp_path / "repository"), "config.json", content=b'{"max_position_embeddings": 1024}')
    with Hub(tmp_path / "repository") as server:
        server.connect(monkeypatch)
        yield server


def test_the_hub_is_asked_whether_it_has_the_model(hub, run):
    found = run(max_length=1024)
    assert (found.problems, found.notes) == ([], [])
    (found,) = run(huggingface_id="org/name@nowhere").problems
    assert found.startswith("huggingface_id: org/name@nowhere cannot be downloaded: it has no such revision")
    files = {path.rpartition("/")[2] for method, path, *_ in hub.requests if method == "GET" and "/api/" not in path}
    assert files == {"config.json"}


def test_conversations_longer_than_the_target_knows_positions_are_a_note(hub, run, run_model):
    (note,) = run().notes
    assert note.startswith("max_length: given 2048, but the target's max_position_embeddings is 1024")
    (note,) = run_model({"text_config": {"max_position_embeddings": 512}}, max_length=513).notes
    assert note.endswith("use at most 512")


def test_a_draft_that_does_not_fit_its_target_stops_the_run(run_model, tmp_path):
    config = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 8}
    config["vocab_size"] = 128
    put(str(tmp_path), "draft.json", content=b'{"block_size": 7}')
    given = {"draft_architecture": "dspark", "draft_model_config": str(tmp_path / "draft.json")}
    found = run_model(config, **given)
    assert found.problems == []
    assert "num_speculative_tokens: given 3, but the draft is trained for blocks of 7" in found.notes[0]
    (problem,) = run_model(**given, num_speculative_tokens=8).problems
    assert problem.startswith("num_speculative_tokens: given 8, but a block of this draft has 7 proposals")
    put(str(tmp_path), "draft.json", content=b'{"markov_rank": 0}')
    (problem,) = run_model(**given).problems
    assert problem.startswith("draft_model_config: `markov_rank` is 0")


def test_a_default_instance_type_binds_no_pod_where_nothing_says_that_the_cluster_has_it(hub, run, monkeypatch):
    monkeypatch.setattr(preflight, "check_cluster", lambda *_: ([], []))
    jobs = {"training_backend": "pytorchjob", "compute_draft_model_training": "cpu-pool", "max_length": 1024}
    found = run(**jobs, compute_model_import="serverless")
    assert found.nodes["import"].node_selector == {}
    (note,) = found.notes
    assert note.startswith("instance_type_model_import: the default ")
    named = run(**jobs, compute_model_import="serverless", instance_type_model_import="Standard_D8s_v5")
    assert named.nodes["import"].node_selector == {"node.kubernetes.io/instance-type": "Standard_D8s_v5"}
    assert named.notes == []


def test_a_target_that_the_evaluations_gpus_cannot_hold_stops_the_run_before_its_training(run_model):
    config = (Path(__file__).parents[1] / "docs/targets/llama-3.3-70b.json").read_text(encoding="utf-8")
    given = {"training_backend": "pytorchjob", "instance_type_draft_model_training": "p5.48xlarge"}
    (told,) = run_model(config, **given).problems
    assert told.startswith("number_of_gpu_to_use_evaluation: the evaluation needs 141.8 GB")
    assert run_model(**given, number_of_gpu_to_use_evaluation=4).problems == []


@pytest.mark.parametrize(
    "content", ['{"a":' * 5000, '{"text_config": -1}', '{"hidden_size": "x", "num_hidden_layers": "y"}']
)
def test_an_odd_configuration_is_left_to_the_import(run_model, content):
    assert run_model(content, training_backend="pytorchjob").problems == []


@pytest.mark.parametrize("status", [0, 429, 503])
def test_a_hub_that_is_busy_or_cannot_be_reached_from_here_is_left_to_the_import(hub, run, status, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(hub_client, "WAIT", 0.0)
    hub.refuses = status
    if not status:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = run()
    assert found.problems == []
    (note,) = found.notes
    assert note.startswith("huggingface_id: not checked from here")
    assert (f"answers with status {status}" if status else "http://127.0.0.1:9 cannot be reached") in note


def test_a_tokenizer_that_takes_all_memory_does_so_in_a_limited_process(run_model, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "LIMITS", workers.Limits(memory=2 << 30))
    model = tiny.write_target(tmp_path / "model")
    put(str(tmp_path), "prompts.jsonl", content=PROMPT)
    given = {"evaluation_prompts": str(tmp_path / "prompts.jsonl"), "chat_template": "qwen"}
    assert run_model(**given).problems == []
    content = json.loads((model / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 150}
    content["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 4}
    content["added_tokens"][0] |= {"content": "a", "normalized": True}  # normalised when it is loaded
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert run_model(**given).problems == []  # the import tells


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """A Hub that has one benchmark and no model, and an empty cache; the model is a folder."""
    put(str(tmp_path), "model/config.json")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with Hub({}, dataset="openai/gsm8k") as server:
        server.connect(monkeypatch)
        yield server


@pytest.fixture
def run_on(run_model):
    """The same with prompts."""
    return lambda given: run_model(training_backend="local", evaluation_prompts=given)


def test_the_hub_is_asked_whether_it_has_the_benchmarks(benchmarks, run_on):
    assert (run_on("gsm8k").problems, run_on("gsm8k").notes) == ([], [])
    found = run_on("gsm8k,mt-bench,alpaca")
    assert found.notes == []
    assert [problem.partition(" (")[0] for problem in found.problems] == [
        f"evaluation_prompts: given the benchmark {name}, which {benchmarks.endpoint} does not give"
        for name in ("HuggingFaceH4/mt_bench_prompts", "tatsu-lab/alpaca")
    ]
    assert all("give a file of prompts" in problem for problem in found.problems)
    assert not any("resolve" in path for _, path, *_ in benchmarks.requests)  # no file


def test_benchmarks_that_are_cached_are_not_asked_for(benchmarks, run_on, tmp_path):
    (tmp_path / "cache/tatsu-lab___alpaca").mkdir(parents=True)
    found = run_on("alpaca")
    assert (found.problems, found.notes, benchmarks.requests) == ([], [], [])


def test_a_hub_that_does_not_answer_is_a_note_for_benchmarks(benchmarks, run_on, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://user:never-shown@127.0.0.1:9")
    found = run_on("gsm8k,alpaca")
    assert found.problems == []
    (note,) = found.notes
    assert note.startswith(
        "evaluation_prompts: not looked at from here; the evaluation fetches openai/gsm8k, tatsu-lab/alp"
    )
    assert "http://127.0.0.1:9 cannot be reached" in note
    assert "never-shown" not in note


def test_in_a_pod_a_note_says_what_the_evaluations_pod_must_reach(benchmarks, run_on, monkeypatch, tmp_path):
    def notes(prompts):
        return [note for note in run_on(prompts).notes if note.startswith("evaluation_prompts: ")]

    put(str(tmp_path), "prompts.jsonl", content=PROMPT)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    (note,) = notes("gsm8k")
    assert note.startswith("evaluation_prompts: found from here")
    assert "network policies must let it out" in note
    assert notes(str(tmp_path / "prompts.jsonl")) == notes("") == []


def test_the_object_store_is_written_to_with_the_later_steps_keys(hub, run, object_store):
    place = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
    put(place, "there.json")
    shared = {"max_length": 1024, "checkpoint_path": f"{place}/shared"}
    for found in (run(place, **shared), run(storage_uri=place, **shared), run(place.replace("s3", "minio"), **shared)):
        assert (found.problems, found.notes) == ([], [])
    assert list(storage.list_files(place)) == ["there.json"]  # nothing is left


def test_a_prefix_that_a_namespace_may_not_write_is_explained(hub, run, object_store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    place = f"minio://{object_store.bucket}/private-artifacts/team/v2/artifacts"
    (found,) = run(place, storage_uri=f"minio://{object_store.bucket}/mine").problems
    assert found.startswith("storage_uri: ")
    assert found.endswith("private-artifacts/<namespace>/, private/<namespace>/, artifacts/ and shared/")


def test_a_store_that_refuses_is_told_with_the_secret_that_is_not_there(hub, run, object_store, monkeypatch):
    place = f"s3://{object_store.bucket}/pipeline"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (found,) = run(place).problems
    assert found.startswith(f"the pipeline root: {place} cannot be written, read and cleared: ")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    found, secret = run(storage_uri=place, object_store_secret="ours").problems
    assert found.startswith(f"storage_uri: {place} cannot be written")
    assert secret.startswith("object_store_secret: given 'ours'; this pod has no keys: there is no Secret ours, or ")


@pytest.mark.parametrize("root", ["gs://bucket/pipeline", "s3://bucket/pipeline?region=us-east-1"])
def test_a_pipeline_root_that_no_step_can_use_is_told(hub, run, root):
    (found,) = run(root).problems
    assert found.startswith(f"the pipeline root: given {root}; steps and training pods read and write s3:// and minio")


@pytest.fixture
def pod(tmp_path, monkeypatch):
    """A pod of KFP 2.16.0: HTTP answers by path, of KFP's server and of Kubernetes."""
    answers = {HEALTH: (200, {"tag_name": "2.16.0"})}

    def answer(path):
        status, content = answers[path]
        return status, json.dumps(content).encode()

    with answering(answer) as address:
        config = {"current-context": "c", "clusters": [{"name": "c", "cluster": {"server": address}}]}
        context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team"}}
        config |= {"contexts": [context], "users": [{"name": "u", "user": {}}]}
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        for name in ("KUBERNETES_SERVICE_HOST", "ML_PIPELINE_SERVICE_HOST"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setenv("ML_PIPELINE_SERVICE_PORT", address.rpartition(":")[2])
        yield answers


def test_in_a_pod_a_server_that_is_too_old_is_told(hub, run, pod):
    given = {"max_length": 1024, "training_backend": "local"}
    found = run(**given)
    assert any("'local'" in note and "must have the trainer's image" in note for note in found.notes)
    (told,) = found.problems
    assert told.startswith("Kubeflow Pipelines: http://127.0.0.1:")
    assert told.endswith(" is KFP 2.16.0; the pipeline needs 2.16.1 or newer")
    for answer in ((200, {"tag_name": "2.17.0"}), (200, {"multi_user": True}), (403, "RBAC: access denied")):
        pod[HEALTH] = answer
        assert run(**given).problems == []


@pytest.mark.parametrize(
    ("answer", "told"),
    [((200, {"kind": "NodeList", "items": [{}]}), ""),
     ((200, {"kind": "NodeList", "items": []}), "no node of this cluster has the labels {} now; unless an"),
     ((403, {"message": "no"}), "whether a node has the labels {} cannot be seen with this service account's rights")],
)  # fmt: skip
def test_labels_that_no_node_may_have_are_a_note(hub, run, pod, monkeypatch, answer, told):
    pod["/api/v1/nodes"] = answer
    labels = "node.kubernetes.io/instance-type=Standard_D8s_v5"
    given = {"compute_model_import": "serverless", "instance_type_model_import": "Standard_D8s_v5"}
    for right in ("has", "may"):
        monkeypatch.setattr(Cluster, right, lambda *_: True)
    given |= {"compute_draft_model_training": "cpu-pool", "max_length": 1024}
    notes = run(**given).notes
    assert ["start_limit: " + told.format(labels) in note for note in notes] == ([True] if told else [])
    assert all("the import job's pods cannot start, and the run ends after start_limit" in note for note in notes)


def test_everything_is_told_at_once_and_shown(hub, run, tmp_path):
    found = run(
        huggingface_id="org/name@nowhere", num_epochs=0, compute_model_import="nowhere",
        dataset_validation_split=str(tmp_path / "none.jsonl"),
    )  # fmt: skip
    named = {problem.partition(":")[0] for problem in found.problems}
    assert named == {"huggingface_id", "num_epochs", "compute_model_import", "dataset_validation_split"}
    shown = found.markdown()
    assert shown.startswith("# This run cannot start: 4 problems\n")
    assert all(f"\n- {name.replace('_', chr(92) + '_')}: " in shown for name in named)
