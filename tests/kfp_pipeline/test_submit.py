"""Submitting to a KFP API server: one version for one content, runs as asked, and refusals that can be acted on."""

import json
from datetime import timedelta

import pytest
import yaml
from answers import certified
from kfp_api import COOKIE, PAGE, KfpApi

from draft_model.errors import DraftModelError
from draft_model.kubeflow import own_server_too_old
from kfp_pipeline.client import NotLetIn, ServerAway, connect
from kfp_pipeline.compile import compile_documents, compile_manifests
from kfp_pipeline.submit import check, submit
from kfp_pipeline.watch import watch

pytestmark = pytest.mark.usefixtures("nothing_of_this_machine")
VALUES = {"huggingface_id": "org/name@v1", "dataset_train_split": "s3://bucket/train.jsonl"}


@pytest.fixture
def shared():
    """A server of several users."""
    with KfpApi(namespaces=["team-a"]) as api:
        yield api


def only(records):
    (record,) = records.values()
    return record


def test_the_same_pipeline_is_uploaded_once_by_the_names_that_gitops_gives_it(api):
    first, second = (submit(connect(api.host), VALUES) for _ in range(2))
    assert list(api.runs) == [first.run_id, second.run_id]
    version, pipeline, _ = only(api.versions), only(api.pipelines), only(api.experiments)
    documents = yaml.safe_load_all(compile_manifests())
    names = {document["kind"]: document["metadata"]["name"] for document in documents}
    assert {version["name"], version["display_name"]} == {names["PipelineVersion"]}
    assert pipeline["name"] == pipeline["display_name"] == names["Pipeline"] == "pipeline-draft-model"
    spec, platform = compile_documents()
    assert version["pipeline_spec"] == {"pipeline_spec": spec, "platform_spec": platform}
    assert api.runs[first.run_id]["display_name"].startswith("name@v1 20")
    assert api.runs[first.run_id]["service_account"] == "draft-model-steps"


def test_a_run_is_as_asked(api):
    values = VALUES | {"num_epochs": "3", "learning_rate": "1e-3", "resume": "true"}
    done = submit(connect(api.host), values, experiment="nightly", run_name="the third", service_account="somebody")
    run = only(api.runs)
    assert run["runtime_config"]["parameters"] == VALUES | {"num_epochs": 3, "learning_rate": 0.001, "resume": "true"}
    assert (run["display_name"], run["service_account"]) == ("the third", "somebody")
    assert run["experiment_id"] == only(api.experiments)["experiment_id"]
    assert only(api.experiments)["display_name"] == "nightly"
    assert run["pipeline_version_reference"]["pipeline_version_id"] == only(api.versions)["pipeline_version_id"]
    assert done.link == f"{api.host}/#/runs/details/{run['run_id']}"


def test_two_that_submit_at_the_same_time_make_one_version_and_the_other_may_start_again(api, monkeypatch):
    submit(connect(api.host), VALUES)
    monkeypatch.setattr("kfp_pipeline.submit.find_version", lambda *_: (only(api.pipelines)["pipeline_id"], ""))
    with pytest.raises(DraftModelError, match=r"409: .*already exists; somebody else .* start again"):
        submit(connect(api.host), VALUES)
    assert len(api.versions) == len(api.runs) == 1


def test_what_the_server_refuses_is_told_in_its_words(api):
    submit(connect(api.host), VALUES)
    del only(api.versions)["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]["seed"]
    with pytest.raises(DraftModelError) as caught:
        submit(connect(api.host), VALUES | {"seed": 1})
    assert str(caught.value) == f"{api.host} answers 400: parameter seed is not an input of the pipeline"


@pytest.mark.parametrize("by", ["option", "settings"])
def test_several_users(shared, tmp_path, by):
    if by == "settings":  # KFP's own
        (tmp_path / "context.json").write_text(json.dumps({"namespace": "team-a"}))
    submit(connect(shared.host, "team-a" if by == "option" else ""), VALUES)
    for records in (shared.pipelines, shared.experiments, shared.runs):
        assert only(records)["namespace"] == "team-a"


def test_a_namespace_that_is_missing_unknown_or_too_much(api, shared):
    with pytest.raises(DraftModelError, match=r"--namespace: not given, but .* several users"):
        connect(shared.host)
    with pytest.raises(DraftModelError, match=r"answers 403: User 'me' is not .*Namespace:team-b.*--namespace"):
        submit(connect(shared.host, "team-b"), VALUES)
    with pytest.raises(DraftModelError, match=r"--namespace: given 'team-a', but .* single user"):
        connect(api.host, "team-a")
    assert not shared.runs


def test_who_is_not_known_is_told_how_to_be(api, tmp_path):
    api.token = "the-right-one"
    (tmp_path / "token").write_text("the-wrong-one")
    for options in ({}, {"token_file": tmp_path / "token"}):
        with pytest.raises(NotLetIn, match=r"401: Request header error.*--token-file") as caught:
            connect(api.host, **options)
        assert "the-wrong-one" not in str(caught.value)


def test_a_server_that_is_not_there_or_fails(api):
    api.failing = 503
    with pytest.raises(ServerAway, match=r"answers 503: upstream connect error"):
        connect(api.host)
    api.stop()
    with pytest.raises(ServerAway, match=r"does not answer: .*Connection refused; .*kubectl -n kubeflow port-forward"):
        connect(api.host)
    api.start()


@pytest.fixture
def at_once(monkeypatch):
    """A watch that does not pause, and asks at once what a run waits for."""
    monkeypatch.setattr("kfp_pipeline.watch.STALL", -1.0)
    monkeypatch.setattr("kfp_pipeline.watch.PAUSES", (0.01, 0.01))


def test_what_a_run_waits_for_is_told_once(api, at_once, caplog):
    server = connect(api.host)
    pending = ("RUNNING", {"preflight": "SUCCEEDED", "train": ("PENDING", "ImagePullBackOff: no such image", "")})
    api.story = [pending, pending, pending, ("SUCCEEDED", {})]
    with caplog.at_level("INFO"):
        assert watch(server, submit(server, VALUES).run_id).state == "SUCCEEDED"
    assert caplog.text.count("train waits: ImagePullBackOff: no such image") == 1


def test_a_packed_status_is_told_and_read(api, at_once, caplog):
    api.packed, server = True, connect(api.host)
    running = ("RUNNING", {"preflight": "RUNNING"})
    api.story = [running, running, ("FAILED", {"train": ("FAILED", "Error (exit code 2)", "error: seed: too large")})]
    with caplog.at_level("INFO"):
        ended = watch(server, submit(server, VALUES).run_id)
    assert caplog.text.count("shows no further progress") == 1
    assert ended.failures == {"train": ["Error (exit code 2)", "error: seed: too large"]}


@pytest.mark.parametrize(
    ("history", "outcome"),
    [("RUNNING CANCELING FAILED", "terminated"), ("RUNNING CANCELING FAILED RUNNING FAILED", "failed")],
    ids=["terminated", "retried since"],
)
def test_a_terminated_run_is_told_from_a_failed_one(api, history, outcome):
    server = connect(api.host)
    run_id = submit(server, VALUES).run_id
    api.story = [("FAILED", {})]
    api.runs[run_id]["state_history"] = [{"state": state} for state in history.split()]
    assert watch(server, run_id).outcome == outcome


@pytest.mark.parametrize(
    ("page", "told"),
    [(PAGE, "web page: it may ask for a login"), ("{}", "without the run"), ("", "''.* not JSON"),
     ('{"run_id": "r", "st', "not JSON")],
    ids=["login", "empty object", "empty", "cut"],
)  # fmt: skip
def test_a_watch_ends_where_a_gateway_answers_for_the_server(api, at_once, monkeypatch, page, told):
    monkeypatch.setattr("kfp_pipeline.watch.PATIENCE", timedelta(0))
    server = connect(api.host)
    run_id = submit(server, VALUES).run_id
    api.pages = {"/runs/": page}
    with pytest.raises((ServerAway, NotLetIn), match=told):
        watch(server, run_id)


@pytest.mark.parametrize(
    ("path", "page", "told"),
    [("/runs$", "{}", "named none"), ("/runs$", PAGE, "ask for a login"), ("/healthz$", PAGE, "ask for a login"),
     ("/experiments$", "", "not JSON"), ("/upload_version$", '{"pipe', "not JSON")],
)  # fmt: skip
def test_a_gateways_answer_is_no_run(api, path, page, told):
    api.pages = {path: page}
    with pytest.raises(DraftModelError, match=told):
        submit(connect(api.host), VALUES)
    assert not api.runs


@pytest.mark.parametrize(("tag", "old"), [("2.16.0", True), ("2.16.1", False), ("2.17.0", False), ("master", False)])
@pytest.mark.parametrize("ui", [False, True])
def test_a_server_that_is_too_old_is_named(api, caplog, monkeypatch, tag, old, ui):
    api.tag, api.ui = tag, ui
    connect(api.host)
    told = f"{api.host} is KFP {tag}; the pipeline needs 2.16.1 or newer"
    assert (told in caplog.text) == old
    for name, value in zip(("HOST", "PORT"), api.host.removeprefix("http://").split(":"), strict=True):
        monkeypatch.setenv(f"ML_PIPELINE_SERVICE_{name}", value)
    assert own_server_too_old() == (told if old else "")  # what the preflight asks in a pod
    api.pages = {"/healthz$": PAGE}  # a server that does not tell its version, and none
    assert own_server_too_old() == ""
    monkeypatch.setenv("ML_PIPELINE_SERVICE_PORT", "9")
    assert own_server_too_old() == ""


def test_a_cookie_of_kfps_own_settings_gets_past_a_login_page(api, tmp_path):
    api.pages = {"": PAGE}
    (tmp_path / "context.json").write_text(json.dumps({"namespace": "", "client_authentication_cookie": COOKIE}))
    submit(connect(api.host), VALUES)
    assert len(api.runs) == 1


def test_tls(tmp_path):
    with KfpApi(tls=certified(tmp_path)) as api:
        with pytest.raises(ServerAway, match=r"is not trusted: .*certificate.*--ca-file"):
            connect(api.host)
        submit(connect(api.host, ca_file=tmp_path / "cert.pem"), VALUES)
        assert len(api.runs) == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dataset_train_split": "data/train.jsonl"}, "pods see no folder of this machine"),
        ({"dataset_train_split": __file__}, "which is on this machine; pods do not see it"),
        ({"storage_uri": "/mnt/drafts"}, "the steps are pods that share no folder"),
        ({"checkpoint_path": "drafts"}, "the steps are pods that share no folder"),
        ({"instance_type_draft_model_training": "Standard_nc24rs"}, "it has Standard_NC24rs_v3"),
        ({"compute_model_import": "gpu-pol"}, "which the compute map does not have"),
        ({"compute_evaluation": "gpu-pol"}, "which the compute map does not have"),
        ({"number_of_gpu_to_use_draft_model_training": 64, "draft_global_batch_size": 64}, "per node: use at most 4"),
        ({"tp_size": 3}, "tp_size: given 3; it must divide"),
        ({"evaluation_prompts": "mtbench"}, "or name benchmarks: mt-bench, gsm8k"),
        ({"object_store_secret": ""}, "name one that does not exist, such as `none`"),
        ({"draft_model_config": "ftp://host/draft.json"}, "allowed: a local path, file:///path, s3://bucket/key"),
    ],
)
def test_what_no_cluster_could_run(given, told):
    with pytest.raises(DraftModelError) as caught:
        check(VALUES | given)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{next(iter(given))}: ")
    assert told in problem


def test_what_only_the_cluster_can_know_is_left_to_it():
    for given in (
        {"dataset_train_split": "/in/the/image/train.jsonl"},
        {"storage_uri": "/mnt/drafts", "training_backend": "local"},
        {"compute_map": "ours", "compute_model_import": "ours-alone"},
        {"huggingface_id": "", "mlflow_model_path": "models:/target/3"},
        {"dataset_train_split": "gs://bucket/*.jsonl"},
        {"evaluation_prompts": "mt-bench,gsm8k"},
        {"evaluation_prompts": "https://host/prompts.jsonl"},
    ):
        check(VALUES | given)
