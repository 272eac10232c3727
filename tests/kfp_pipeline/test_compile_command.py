"""`draft-model compile` with the images of a cluster, for people who upload and for GitOps."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from kfp_pipeline.compile import version_name

PROGRAM = Path(sysconfig.get_path("scripts")) / "draft-model"
DIGEST = "registry.example/trainer@sha256:" + "0" * 64


def compiled(*options):
    done = subprocess.run([PROGRAM, "compile", *map(str, options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    output, manifest = folder / "pipeline.yaml", folder / "resources" / "pipeline.yaml"
    images = ["--image", "registry.example/{kind}:1", "--image", f"trainer={DIGEST}"]
    assert compiled("--output", output, "--manifest", manifest, *images) == [str(output), str(manifest)]
    return output, manifest


def test_both_files_hold_the_same_pipeline_with_the_named_images(files):
    documents, resources = (list(yaml.safe_load_all(file.read_text())) for file in files)
    version = next(resource for resource in resources if resource["kind"] == "PipelineVersion")
    assert [version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]] == documents
    executors = documents[0]["deploymentSpec"]["executors"].values()
    given = {each["value"] for executor in executors for each in executor["container"].get("env", ())}
    assert DIGEST in given  # of the jobs' pods
    assert not [executor for executor in executors if executor["container"]["image"].startswith("localhost/")]


def test_the_versions_name_is_the_hash_of_what_it_holds(files):
    documents, resources = (list(yaml.safe_load_all(file.read_text())) for file in files)
    version = next(resource for resource in resources if resource["kind"] == "PipelineVersion")
    assert version["metadata"]["name"] == version["spec"]["displayName"] == version_name(documents)
    documents[0]["deploymentSpec"]["executors"]["exec-preflight"]["container"]["image"] += "0"
    assert version_name(documents) != version["metadata"]["name"]


def test_one_file_alone_can_be_written(tmp_path):
    assert compiled("--manifest", tmp_path / "a.yaml") == [str(tmp_path / "a.yaml")]
    assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"]
