"""The whole compiled pipeline: each stage a PyTorchJob, its training one of two nodes with two processes each.

One of the four processes is killed on the way, as a machine that goes would do: the second attempt goes on from the
newest checkpoint, and the weights are those that the local back end trains undisturbed.
"""

from __future__ import annotations

import json
import threading

import numpy as np
import psutil
import pytest
import tiny
from safetensors.torch import load

from cluster.apiserver import NAMESPACE
from cluster.conftest import eventually
from draft_model import jobs, storage
from draft_model.jobs.cluster import Cluster
from draft_model.jobs.spec import PYTORCHJOB
from draft_model.parameters import Parameters
from draft_model.training import TrainConfig
from kfp_pipeline.local import run_local

WORLD = {"num_nodes_draft_model_training": 2, "number_of_gpu_to_use_draft_model_training": 2}


@pytest.fixture(scope="module")
def values(tmp_path_factory, object_store):
    """Inputs are in the store: pods see no folder of this machine."""
    more = {"num_epochs": 30, "save_interval": 2, "eval_interval": 30, "evaluation_max_new_tokens": 4, **WORLD}
    return tiny.write_run(tmp_path_factory.mktemp("data"), f"s3://{object_store.bucket}/inputs", **more)


def kill_a_process_after(checkpoint, operator):
    """Kills one of the four training processes when the checkpoint is whole."""
    eventually(lambda: storage.exists(checkpoint), 600)
    (container,) = [c for pod, c in operator.containers.items() if pod.endswith("-worker-0")]
    psutil.Process(container.process.pid).children()[0].kill()


def whole_folder(parent):
    """URI of the only folder below one whose names are of content."""
    (manifest,) = (name for name in storage.list_files(parent) if name.endswith(f"/{storage.MANIFEST}"))
    return f"{parent}/{manifest.partition('/')[0]}"


def test_every_stage_is_a_job_of_the_cluster_and_the_training_survives_a_machine(
    server, operator, as_coordinator, store_secret, object_store, values, tmp_path
):
    root = f"s3://{object_store.bucket}/whole-pipeline"
    output = f"{root}/output_model_path"
    killer = threading.Thread(target=kill_a_process_after, args=(f"{output}/epoch_2", operator), daemon=True)
    killer.start()
    cluster = {"training_backend": "pytorchjob", "compute_draft_model_training": "cpu-pool", "storage_uri": root}
    cluster["compute_model_import"] = "cpu-pool"
    final = run_local({**values, **cluster}, tmp_path / "run")
    killer.join()

    record = json.loads(storage.read_bytes(f"{output}/train_job.json"))
    assert [attempt["reason"] for attempt in record["attempts"]] == ["Killed", ""]
    assert record["state"] == "SUCCEEDED"
    training = json.loads((final / "training.json").read_text())
    assert training["world_size"] == 4
    assert training["steps"] == 90
    assert json.loads((final / "evaluation.json").read_text())["lossless"]["identical"]
    assert Cluster(server.api, NAMESPACE).objects(PYTORCHJOB) == []
    beside = {name.rpartition("/")[2]: storage.join(root, name) for name in storage.list_files(root)}
    for stage in ("import", "dataset", "evaluate"):
        assert json.loads(storage.read_bytes(beside[f"{stage}_job.json"]))["state"] == "SUCCEEDED"
        (pod,) = (name for name in operator.started if f"-{stage}-a0-" in name)
        assert f"{pod}.log" in beside

    first, second = (attempt["name"] for attempt in record["attempts"])
    log = storage.read_bytes(f"{output}/logs/{second}/{second}-master-0.log").decode()
    assert "resumed from" in log
    assert "[0] " in log
    shown = (tmp_path / "run/run.log").read_text()
    assert f"{first} failed (Killed): attempt 2 of 3 follows" in shown

    alone = Parameters(**{name: value for name, value in values.items() if name in TRAINED})
    model, dataset = (whole_folder(f"{root}/{kind}") for kind in ("models", "datasets"))
    config = TrainConfig(model, dataset, str(tmp_path / "alone"), tmp_path / "work", alone)
    jobs.run(config)
    expected = load(storage.read_bytes(f"{config.output}/final/model.safetensors"))
    weights = load((final / "model.safetensors").read_bytes())
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name].float(), tensor.float(), rtol=0, atol=1e-5, err_msg=name)


TRAINED = {
    "draft_model_config", "ttt_length", "compute_dtype", "num_epochs", "save_interval", "eval_interval", *WORLD,
}  # fmt: skip
