"""Models that MLflow itself logged, on a real tracking server with a database, imported by every form of their URI."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
import uuid
from urllib.parse import unquote

import pytest
import yaml
from answers import answering

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
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
            patch.setenv("MLFLOW_TRACKING_URI", address)
            import mlflow.transformers  # noqa: F401  # for some seconds, as the server

            wait_for(address, server, root / "log")
            yield log_models(target, f"s3://{object_store.bucket}/{uuid.uuid4().hex}", root)
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def wait_for(address, server, log):
    while server.poll() is None:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{address}/health", timeout=5).close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.2)
    raise AssertionError(log.read_text())


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
    address = os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(None)  # so that the variable counts again, as in a process that has not set it
    os.environ["MLFLOW_TRACKING_URI"] = address
    return found


@pytest.mark.parametrize(
    "form",
    ["server models:", "server runs:", "server id", "server alias", "s3 models:", "s3 runs:", "s3 id", "local", "s3"],
)
def test_a_model_that_mlflow_logged(logged, form, target, bring, monkeypatch):
    server = {}
    if form in ("server models:", "server runs:"):  # the parameter names a server, too
        server["mlflow_tracking_uri"] = os.environ["MLFLOW_TRACKING_URI"]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = bring(mlflow_model_path=logged[form], **server)
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert result.source == logged[form]


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
def test_the_layouts_of_mlflow(target, places, remote, upload, tmp_path, bring):
    root = tmp_path / "mlflow"
    for place, files in places.items():
        (root / place).mkdir(parents=True)
        for name in files:
            shutil.copyfile(target / name, root / place / name)
    (root / "MLmodel").write_text(yaml.safe_dump({"flavors": {"transformers": {"task": "text-generation"}}}))
    uri = upload(root) if remote else str(root)
    assert names(bring(mlflow_model_path=uri).uri) == set().union(*places.values())


def test_a_server_of_2_x_keeps_a_runs_model_among_its_files(model, target, bring):
    (model / "MLmodel").write_text("flavors: {transformers: {}}")
    run = "0123456789abcdef0123456789abcdef"

    def answer(path):
        if "/runs/get" in path:
            info = {"run_id": run, "run_uuid": run, "experiment_id": "0", "status": "FINISHED"}
            info |= {"lifecycle_stage": "active", "artifact_uri": f"mlflow-artifacts:/0/{run}/artifacts"}
            return 200, json.dumps({"run": {"info": info, "data": {}}}).encode()
        below = f"0/{run}/artifacts/model"
        if "/mlflow-artifacts/artifacts?" in path:
            found = model.iterdir() if unquote(path).endswith(f"path={below}") else ()
            files = [{"path": file.name, "is_dir": False, "file_size": file.stat().st_size} for file in found]
            return 200, json.dumps({"files": files}).encode()
        if f"/artifacts/{below}/" in path:
            return 200, (model / path.rpartition("/")[2]).read_bytes()
        return 404, b"<title>404</title>"

    with answering(answer, query=True) as server:
        result = bring(mlflow_model_path=f"runs:/{run}/model", mlflow_tracking_uri=server)
    assert same_weights(result.uri, target)


@pytest.mark.parametrize("scheme", ["wasbs", "abfss", "sftp", "r2", "nosuch"])
def test_a_model_in_a_store_whose_client_is_not_installed(scheme, refusal, monkeypatch):
    def answer(path):
        if "get-download-uri" in path:
            return 200, json.dumps({"artifact_uri": f"{scheme}://u:s3cret@host/m"}).encode()
        found = b'{"registered_model": {"name": "target"}}' if "/registered-models/get" in path else b""
        return 200 if found else 404, found

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # R2's client is that of S3
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with answering(answer) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("//", "//me:s3cret@"))
        (problem,) = refusal(mlflow_model_path="models:/target/3")
    assert f"it lies at {scheme}://host/m" in problem
    assert "s3cret" not in problem
