"""What the policy on jobs admits, by evaluating its expressions: our own jobs, and none of the ways to root."""

from __future__ import annotations

import copy
from functools import cache

import pytest
from jobs.requests import GOLDEN

from draft_model.jobs.spec import pytorchjob, trainjob
from manifests.kustomize import needs_kubectl, one, overlay

celpy = pytest.importorskip("celpy", reason="cel-python evaluates the policy's expressions")
pytestmark = needs_kubectl
COORDINATOR = "system:serviceaccount:team:draft-model-coordinator"


@cache
def program(expression: str):
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def refusals(job: dict, user: str = COORDINATOR) -> list[str]:
    """Messages of the validations that a job fails; none where the policy does not apply."""
    documents = overlay("multi-user")
    spec = one(documents, "ValidatingAdmissionPolicy")["spec"]
    params = {**one(documents, "ConfigMap", "draft-model-job-policy")["data"], "image_prefix": "registry.example/"}
    values = {
        "object": celpy.json_to_cel(job),
        "params": celpy.json_to_cel({"data": params}),
        "request": celpy.json_to_cel({"namespace": "team", "userInfo": {"username": user}}),
        "variables": celpy.celtypes.MapType(),
    }
    if not all(program(each["expression"]).evaluate(values) for each in spec["matchConditions"]):
        return []
    for variable in spec["variables"]:
        name = celpy.celtypes.StringType(variable["name"])
        values["variables"][name] = program(variable["expression"]).evaluate(values)
    return [each["message"] for each in spec["validations"] if not program(each["expression"]).evaluate(values)]


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("render", [pytorchjob, trainjob])
def test_every_job_of_ours_is_admitted(render, case):
    if GOLDEN[case].compute.priority_class:
        (refused,) = refusals(render(GOLDEN[case])[0])
        assert refused.startswith("the priority class")
        return
    for manifest in render(GOLDEN[case]):
        assert refusals(manifest) == []


def spec_of(manifest: dict) -> dict:
    if manifest["kind"] == "TrainingRuntime":
        return manifest["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


ATTACKS = [
    {"serviceAccountName": "default"},
    {"automountServiceAccountToken": True},
    {"hostPID": True},
    {"hostNetwork": True},
    {"nodeName": "control-plane"},
    {"initContainers": [{"name": "x", "image": "x"}]},
    {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]},
    {"volumes": [{"name": "other", "secret": {"secretName": "other"}}]},
    {"securityContext": {"runAsUser": 0}},
    {"securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "Unconfined"}}},
    {"priorityClassName": "system-node-critical"},
    {"containers": {"image": "evil.example/x"}},
    {"containers": {"securityContext": {"privileged": True}}},
    {"containers": {"securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"add": ["SYS_ADMIN"]}}}},
    {"containers": {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "others", "key": "k"}}}]}},
    {"containers": {"env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "others", "key": "k"}}}]}},
    {"containers": {"envFrom": [{"secretRef": {"name": "others"}}]}},
    {"containers": {"ports": [{"containerPort": 8333, "hostPort": 8333}]}},
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
@pytest.mark.parametrize("render", [pytorchjob, trainjob])
def test_none_of_the_ways_to_root_is_admitted(render, attack):
    manifest = copy.deepcopy(render(GOLDEN["4x8"])[0])
    spec = spec_of(manifest)
    for name, value in attack.items():
        spec[name] = [{**spec["containers"][0], **value}] if name == "containers" else value
    assert refusals(manifest)
    assert refusals(manifest, user="system:serviceaccount:team:default-editor") == []


@pytest.mark.parametrize(
    "change",
    [
        {"runtimeRef": {"kind": "ClusterTrainingRuntime", "name": "torch"}},
        {"podTemplateOverrides": [{"targetJobs": [{"name": "node"}], "spec": {"serviceAccountName": "default"}}]},
        {"runtimePatches": [{}]},
        {"trainer": {"numNodes": 1, "image": "evil"}},
        {"initializer": {"model": {}}},
    ],
)
def test_a_trainjob_changes_nothing_in_its_runtime(change):
    _, job = trainjob(GOLDEN["4x8"])
    assert refusals({**job, "spec": {**job["spec"], **change}})
