"""Models that MLflow itself logged, on a real tracking server with a database, imported by every form of their URI."""

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid

import pytest
import yaml

from draft_model import storage

from .case import CANONICAL, TOKENIZER, names, same_weights


@pytest.fixture(scope="module")
def logged(target, object_store, tmp_path_factory):
    """The tiny target, logged by a client: through the server's own artifact store, and into an object store."""
    root = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (root / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{root}/tracking.db",
             "--artifacts-destination", str(root / "artifacts"), "--port", str(port), "--workers", "1"],
            env=environment, stdout=log, stderr=log, start_new_session=True, cwd=root,
        )  # fmt: skip
    try:
        wait_for(address, server, root / "log")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
            patch.setenv("MLFLOW_TRACKING_URI", address)
            yield log_models(target, f"s3://{object_store.bucket}/{uuid.uuid4().hex}", root)
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def wait_for(address, server, log):
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            server_waits(server)
    raise AssertionError(log.read_text())


def server_waits(server):
    try:
        server.wait(0.2)
    except subprocess.TimeoutExpired:
        return


def log_models(target, s3, root):
    import mlflow
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts = {"model": AutoModelForCausalLM.from_pretrained(target), "tokenizer": AutoTokenizer.from_pretrained(target)}
    found = {}
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    for place in ("server", "s3"):
        experiment = mlflow.create_experiment(place, artifact_location=s3 if place == "s3" else None)
        with mlflow.start_run(experiment_id=experiment) as run:
            info = mlflow.transformers.log_model(
                parts, name="model", task="text-generation", pip_requirements=[], registered_model_name=place
            )
        found[f"{place} models:"] = f"models:/{place}/1"
        found[f"{place} runs:"] = f"runs:/{run.info.run_id}/model"
        found[f"{place} id"] = info.model_uri
    mlflow.MlflowClient().set_registered_model_alias("server", "best", 1)
    found["server alias"] = "models:/server@best"
    found["local"] = mlflow.artifacts.download_artifacts("models:/server/1", dst_path=str(root / "local"))
    found["s3"] = mlflow.MlflowClient().get_logged_model(info.model_id).artifact_location
    return found


@pytest.mark.parametrize(
    "form",
    ["server models:", "server runs:", "server id", "server alias", "s3 models:", "s3 runs:", "s3 id", "local", "s3"],
)
def test_a_model_that_mlflow_logged(logged, form, target, bring):
    result = bring(mlflow_model_path=logged[form])
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert result.source == logged[form]


@pytest.mark.parametrize("form", ["server models:", "server runs:"])
def test_a_server_that_the_parameter_names(logged, form, target, bring, monkeypatch):
    address = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = bring(mlflow_model_path=logged[form], mlflow_tracking_uri=address)
    assert same_weights(result.uri, target)


def test_a_model_in_an_object_store_is_read_from_there(logged, tmp_path, bring):
    bring(mlflow_model_path=logged["s3 models:"])
    assert not (tmp_path / "work/mlflow").exists()


@pytest.mark.parametrize("uri", ["models:/nothing/1", "runs:/0123456789abcdef0123456789abcdef/model"])
def test_a_model_that_mlflow_cannot_find(logged, uri, refusal):
    (problem,) = refusal(mlflow_model_path=uri)
    assert problem.startswith(f"mlflow_model_path: {uri} cannot be downloaded: ")
    assert "MLFLOW_TRACKING_URI" in problem


@pytest.mark.parametrize(
    "places",
    [
        {"model": CANONICAL - TOKENIZER, "components/tokenizer": TOKENIZER},
        {"data/model": CANONICAL - TOKENIZER, "data/tokenizer": TOKENIZER},
        {"data/model": {"model.safetensors"}, "data/config": {"config.json"}, "data/tokenizer": TOKENIZER},
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_the_layouts_of_mlflow(target, places, remote, object_store, tmp_path, bring):
    root = tmp_path / "mlflow"
    for place, files in places.items():
        (root / place).mkdir(parents=True)
        for name in files:
            shutil.copyfile(target / name, root / place / name)
    (root / "MLmodel").write_text(yaml.safe_dump({"flavors": {"transformers": {"task": "text-generation"}}}))
    uri = str(root)
    if remote:
        uri = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
        for path in root.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"{uri}/{path.relative_to(root).as_posix()}", path.read_bytes())
    assert names(bring(mlflow_model_path=uri).uri) == set().union(*places.values())
