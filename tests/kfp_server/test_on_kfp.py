"""The compiled pipeline on a real KFP (`make test-kfp`); docs/testing.md says what it needs.

Steps are not named: whatever the compiled pipeline has must be shown as ended. Runs are local unless KFP_PARAMETERS
says otherwise, so all steps have the trainer's image, whose steps can coordinate jobs, too. Jobs get a compute map of
their own, so that they fit on any node, and their waiting ends before the test does.
"""

import json
import logging
import os
import time
import uuid
from contextlib import suppress

import pytest
import tiny

from draft_model import storage
from draft_model.errors import DraftModelError
from kfp_pipeline.client import connect
from kfp_pipeline.submit import submit
from kfp_pipeline.watch import ENDS, STEPS, SUCCEEDED, explain, own_lines, pods, read_log, states, watch, workflow

logger = logging.getLogger(__name__)
ENDPOINT, STORE = os.environ.get("KFP_ENDPOINT", ""), os.environ.get("KFP_STORE", "")
MISSING = [name for name in ("KFP_ENDPOINT", "KFP_STORE", "DRAFT_MODEL_IMAGES") if not os.environ.get(name)]
LIMIT = 1800
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not set: {', '.join(MISSING)} (docs/testing.md)"),
    pytest.mark.timeout(LIMIT),
]


@pytest.fixture(scope="module")
def server():
    return connect(ENDPOINT)


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    """Starts runs of a tiny target, with inputs and outputs in one folder of the store; cleans up at the end."""
    root, data = storage.join(STORE, f"test-{uuid.uuid4().hex[:8]}"), tmp_path_factory.mktemp("data")
    (data / "nodes.json").write_text(json.dumps({"computes": {"any": {"cpus": 0.5, "memory_gib": 3}}}))
    values = tiny.write_run(data, storage.join(root, "inputs")) | {
        "object_store_secret": os.environ.get("KFP_STORE_SECRET", "mlpipeline-minio-artifact"),
        "number_of_gpu_to_use_draft_model_training": 1, "compute_map": storage.join(root, "inputs/nodes.json"),
        "compute_model_import": "any", "compute_draft_model_training": "any", "training_backend": "local",
        "build_dataset_num_proc": 2, "start_limit": 10, "run_limit": 20,
    }  # fmt: skip
    values |= dict(setting.split("=", 1) for setting in os.environ.get("KFP_PARAMETERS", "").split())
    account, started = os.environ.get("KFP_SERVICE_ACCOUNT", "draft-model-steps"), []

    def begin(name, **more):
        given = values | {"storage_uri": storage.join(root, name), **more}
        run = submit(server, given, experiment=f"draft-model-{root[-8:]}", run_name=name, service_account=account)
        started.append(run.run_id)
        return run.run_id, given["storage_uri"]

    yield begin
    try:
        for run_id in started:
            if server.client.get_run(run_id).state not in ENDS:
                server.client.terminate_run(run_id)
                watch(server, run_id)
            server.client.delete_run(run_id)
        if started:
            server.client.delete_experiment(
                server.client.get_experiment(experiment_name=f"draft-model-{root[-8:]}").experiment_id
            )
    finally:
        storage.remove(root)


def workflow_of(server, run_id):
    found = workflow(server, run_id)
    assert found, f"{server.host} gives no Workflow: GET /apis/v1beta1/runs/{run_id}"
    return found


def succeeds(server, run_id):
    """Watches a run to its success; every step of the pipeline is shown as ended."""
    ended = watch(server, run_id)
    assert ended.state == SUCCEEDED, (ended.failures, ended.notes)
    run = server.client.get_run(run_id)
    logger.info("%s: %s from its creation to its end", run.display_name, run.finished_at - run.created_at)
    assert {name: state for name, state, _ in states(run)} == dict.fromkeys(STEPS, SUCCEEDED)
    found = workflow_of(server, run_id)
    assert "compressedNodes" not in found["status"]
    assert {pod.phase for pod in pods(found).values()} == {"Succeeded"}
    return pods(found)


def drafts(uri):
    """The files of the drafts that lie below a URI."""
    return [name for name in storage.list_files(uri) if name.endswith("final/model.safetensors")]


@pytest.fixture(scope="module")
def finished(server, start):
    run_id, uri = start("first")
    return run_id, uri, succeeds(server, run_id)


def test_a_whole_run(server, finished):
    run_id, uri, pods = finished
    assert drafts(uri)
    for pod in pods.values():  # from the pod, or from the archive
        assert pod.driver or own_lines(read_log(server, run_id, pod)) != []


def test_a_second_run_reuses_model_and_dataset(server, start, finished):
    _, uri, _ = finished

    def reusable():
        return {
            name: stamp for name, stamp in storage.list_files(uri).items() if name.startswith(("models/", "datasets/"))
        }

    before = reusable()
    run_id, _ = start("second", storage_uri=uri)
    succeeds(server, run_id)
    assert before
    assert reusable() == before


def test_pytorchjob(server, start):
    kubernetes = pytest.importorskip("kubernetes")
    try:
        kubernetes.config.load_config()
        jobs = kubernetes.client.CustomObjectsApi()
        jobs.list_namespaced_custom_object(
            "kubeflow.org", "v1", os.environ.get("KFP_NAMESPACE", "kubeflow"), "pytorchjobs"
        )
    except Exception as error:
        pytest.skip(f"no PyTorchJob operator answers: {str(error).splitlines()[0]}")
    run_id, uri = start("job", training_backend="pytorchjob")
    succeeds(server, run_id)
    assert drafts(uri)


def test_a_mistake_is_told_with_its_sentence(server, start):
    run_id, _ = start("mistake", pytorch_model_path=storage.join(STORE, "no-such-folder"))
    ended = watch(server, run_id)
    assert ended.outcome == "failed"
    assert "pytorch_model_path" in str(ended.failures)


def wait_for(server, run_id, words):
    """Waits until a running step has logged the words; just after a Retry, KFP may still show the end before it."""
    deadline, ended = time.monotonic() + LIMIT / 3, 0
    while time.monotonic() < deadline and ended < 12:
        for pod in pods(workflow_of(server, run_id)).values():
            if pod.phase == "Running" and not pod.driver:
                with suppress(DraftModelError):  # the container may not have started yet
                    if any(words in line for line in read_log(server, run_id, pod)):
                        return
        ended = ended + 1 if server.client.get_run(run_id).state in ENDS else 0
        time.sleep(5)
    run = server.client.get_run(run_id)
    why = explain(server, run).failures if run.state in ENDS else pods(workflow_of(server, run_id))
    pytest.fail(f"no step says {words!r}; the run is {run.state}: {why}")


def test_terminate_and_retry_go_on_from_the_checkpoint(server, start):
    run_id, _ = start("terminated", num_epochs=100_000, keep_checkpoints=2)
    wait_for(server, run_id, "checkpoint epoch_1")
    server.client.terminate_run(run_id)
    ended = watch(server, run_id)
    assert ended.outcome == "terminated"
    assert "the run was terminated" in str(ended.notes)
    assert "newest checkpoint" in str(ended.notes)
    server.client.runs.run_service_retry_run(run_id)
    wait_for(server, run_id, "resumed from")
