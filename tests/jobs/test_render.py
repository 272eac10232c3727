"""What is rendered: golden files, the operators' own model classes, pod security, and secrets by reference only."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from draft_model.jobs.compute import Compute
from draft_model.jobs.spec import SPEC_HASH, pytorchjob, trainjob
from jobs.requests import GOLDEN, other_settings, request

FOLDER = Path(__file__).parent / "golden"
BACKENDS = {"pytorchjob": pytorchjob, "trainjob": trainjob}
EVERY = [(backend, case) for backend in BACKENDS for case in GOLDEN]


def text(manifests):
    """As YAML; without what every new parameter changes, which other tests look at: the configuration and the hash."""
    whole = json.dumps(manifests)
    whole = re.sub(
        r'(?<={"name": "DRAFT_MODEL_JOB", "value": )"(?:[^"\\]|\\.)*"', '"the configuration, as JSON"', whole
    )
    whole = re.sub(f'(?<="{SPEC_HASH}": )"[0-9a-f]{{64}}"', '"the hash of the specification"', whole)
    return "---\n".join(yaml.safe_dump(manifest, sort_keys=True, width=110) for manifest in json.loads(whole))


FILES = [("pytorchjob", "4x8"), ("pytorchjob", "elastic"), ("pytorchjob", "queue"), ("trainjob", "4x8")]


@pytest.mark.parametrize(("backend", "case"), FILES)
def test_the_golden_files(backend, case):
    """After a wanted change: `python tests/jobs/test_render.py` writes them anew, and git shows what changed."""
    expected = (FOLDER / f"{backend}-{case}.yaml").read_text(encoding="utf-8")
    assert text(BACKENDS[backend](GOLDEN[case])) == expected


@pytest.fixture(scope="module")
def parsed():
    """Turns JSON into the operator's own classes, which refuse what is missing."""
    from kubeflow.training import ApiClient

    client = ApiClient()

    def parsed(manifest, name):
        return client.deserialize(SimpleNamespace(data=json.dumps(manifest)), name)

    parsed.back = client.sanitize_for_serialization
    return parsed


@pytest.mark.parametrize("case", GOLDEN)
def test_training_operators_model_classes_take_every_field(parsed, case):
    (manifest,) = pytorchjob(GOLDEN[case])
    job = parsed(manifest, "KubeflowOrgV1PyTorchJob")
    assert parsed.back(job) == manifest  # nothing was dropped as unknown
    master, nodes = job.spec.pytorch_replica_specs.get("Master"), GOLDEN[case].nodes
    assert sum(spec.replicas for spec in job.spec.pytorch_replica_specs.values()) == nodes
    assert (master is None) == (job.spec.elastic_policy is not None) == (case == "elastic")


@pytest.mark.parametrize("case", GOLDEN)
def test_trainers_model_classes_take_every_field(case):
    from kubeflow_trainer_api import models

    runtime, job = trainjob(GOLDEN[case])
    classes = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}
    for manifest in (runtime, job):
        assert classes[manifest["kind"]].from_dict(manifest).to_dict() == manifest
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


def template_of(backend, case):
    job = BACKENDS[backend](GOLDEN[case])[0]
    if backend == "trainjob":
        return job["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    return next(iter(job["spec"]["pytorchReplicaSpecs"].values()))["template"]


@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_pods_pass_the_restricted_level_and_hold_no_credential(backend, case):
    template = template_of(backend, case)
    spec, (container,) = template["spec"], template["spec"]["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert not spec["automountServiceAccountToken"]
    assert {volume.keys() - {"name"} == {"emptyDir"} for volume in spec["volumes"]} == {True}
    variables = {variable["name"]: variable for variable in container["env"]}
    for name, key in (("AWS_ACCESS_KEY_ID", "accesskey"), ("AWS_SECRET_ACCESS_KEY", "secretkey")):
        assert "value" not in variables[name]
        assert variables[name]["valueFrom"]["secretKeyRef"]["key"] == key


def test_what_the_golden_files_do_not_show():
    wanted = replace(GOLDEN["1x1"], attempt=2, owner=None)
    (job,) = pytorchjob(wanted)
    assert job["metadata"]["name"] == "draft-3f2c9a10-a2"
    assert len(job["metadata"]["name"] + "-worker-9999") <= 63
    assert "ownerReferences" not in job["metadata"]
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert {"name": "DRAFT_MODEL_JOB", "value": wanted.config} in container["env"]
    cpu = template_of("pytorchjob", "cpu-pool")["spec"]["containers"][0]["resources"]
    assert not any("gpu" in name for part in cpu.values() for name in part)


def test_each_stage_has_names_and_a_command_of_its_own():
    wanted = GOLDEN["1x1"]
    (job,) = pytorchjob(replace(wanted, stage="evaluate"))
    assert job["metadata"]["name"] == "draft-3f2c9a10-evaluate-a0"
    assert job["metadata"]["labels"]["app.kubernetes.io/component"] == "evaluate"
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "draft_model.steps"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hash_covers_what_is_asked_for_and_not_the_owner(backend):
    def digest(wanted):
        return BACKENDS[backend](wanted)[-1]["metadata"]["annotations"][SPEC_HASH]

    wanted = GOLDEN["1x1"]
    assert re.fullmatch("[0-9a-f]{64}", digest(wanted))
    assert digest(replace(wanted, owner=None)) == digest(wanted)
    for other in (other_settings(wanted), replace(wanted, image="other"), request(Compute("1000m", "1Gi"))):
        assert digest(other) != digest(wanted)


if __name__ == "__main__":
    for backend, case in FILES:
        (FOLDER / f"{backend}-{case}.yaml").write_text(text(BACKENDS[backend](GOLDEN[case])), encoding="utf-8")
