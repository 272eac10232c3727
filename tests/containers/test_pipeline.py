"""The whole compiled pipeline in its images: as a user without rights, on a read-only root, through a real S3 store."""

import json
import time

import pytest
import tiny
import yaml

from containers.conftest import HARDENED
from draft_model import storage
from draft_model.jobs.context import IMAGE
from kfp_pipeline.compile import COMPILED
from kfp_pipeline.components.images import IMAGES

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def values(object_store, tmp_path):
    """All inputs are in the store."""
    root = f"s3://{object_store.bucket}/in-images"
    return tiny.write_run(tmp_path, f"{root}/inputs", num_epochs=1, storage_uri=f"{root}/run")


def compiled_for_one_machine():
    """The committed pipeline; here, where there are no jobs, each step has the image of its job's pods."""
    documents = list(yaml.safe_load_all(COMPILED.read_text(encoding="utf-8")))
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        variables = {each["name"]: each["value"] for each in executor["container"].get("env", ())}
        executor["container"]["image"] = variables.get(IMAGE, executor["container"]["image"])
    return yaml.safe_dump_all(documents)


def test_the_compiled_pipeline_runs_in_its_images(docker, object_store, values, tmp_path):
    from kfp import components, local

    root = tmp_path / "kfp"
    root.mkdir()
    root.chmod(0o777)
    environment = {**object_store.environment, "OMP_NUM_THREADS": "1"}
    runner = local.DockerRunner(network_mode="host", environment=environment, **HARDENED)
    local.init(runner=runner, pipeline_root=str(root), raise_on_error=True)
    started = time.time()
    components.load_component_from_text(compiled_for_one_machine())(**values)

    created = {"type": "container", "event": "create"}
    events = docker.events(since=int(started), until=int(time.time()) + 1, decode=True, filters=created)
    assert {event["Actor"]["Attributes"]["image"] for event in events} == set(IMAGES.values())
    final = f"{values['storage_uri']}/output_model_path/final"
    assert storage.is_whole(final, storage.read_manifest(final, stage="train"))
    evaluation = json.loads(storage.read_bytes(f"{final}/evaluation.json"))
    assert evaluation["lossless"]["identical"]
    written = [path for path in root.rglob("*") if path.is_file()]
    assert {path.stat().st_uid for path in written} == {1000}
    assert any(path.read_bytes().lstrip().startswith(b"<!") for path in written if path.name.startswith("report"))
