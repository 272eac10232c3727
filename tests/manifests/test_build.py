"""The tree under manifests/: it builds, is what Kubernetes takes, holds no secret, and its parts fit one another."""

from __future__ import annotations

import json
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from draft_model.jobs import compute
from draft_model.parameters import Parameters
from kfp_pipeline.compile import COMPILED, MANIFEST
from kfp_pipeline.pipeline import HUB
from kfp_pipeline.recurring import read
from manifests.kustomize import (
    COMPONENTS,
    MANIFESTS,
    OVERLAYS,
    ROOT,
    build,
    needs_kubectl,
    one,
    overlay,
    pods_of,
    write,
)

pytestmark = needs_kubectl
FOLDERS = [MANIFESTS / name for name in ("base", "pipelines", "argocd", "examples")] + [
    MANIFESTS / "overlays" / name for name in OVERLAYS
]
VERSIONS = ("1.28", kubernetes_validate.latest_version())
LIKE = {"draft-model-recurring-runs": "preflight"}
"""Steps with the images of our own pods."""
CUSTOM = {"argoproj.io", "kueue.x-k8s.io", "pipelines.kubeflow.org", "serving.kserve.io"}


@pytest.fixture(scope="module", params=COMPONENTS)
def with_component(request, tmp_path_factory):
    """The base with one component, in a namespace of somebody's own."""
    folder, components = tmp_path_factory.mktemp(request.param), tuple(dict.fromkeys((request.param, "images")))
    return build(write(folder, "mine", [MANIFESTS / "base", MANIFESTS / "pipelines"], components))


def of_kubernetes(document: dict) -> bool:
    group = document["apiVersion"].rpartition("/")[0]
    return group not in CUSTOM


def validate(documents: list[dict], version: str) -> None:
    for document in filter(of_kubernetes, documents):
        if document["apiVersion"].startswith("admissionregistration") and version == "1.28":
            continue  # in beta then; the component needs 1.30
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(MANIFESTS)))
def test_each_folder_builds_to_what_kubernetes_takes(folder, version):
    documents = build(folder)
    assert documents
    validate(documents, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_component_fits_on_the_base(with_component, version):
    validate(with_component, version)
    accounts = {d["metadata"]["name"] for d in with_component if d["kind"] == "ServiceAccount"}
    for document in with_component:
        name = document["metadata"]["name"]
        assert document["metadata"].get("namespace", name) == "mine", f"{document['kind']} {name}"
        for subject in document.get("subjects", ()):
            assert subject["namespace"] == "mine"
            assert subject["name"] in accounts
    for template in pods_of(with_component).values():
        assert template["spec"]["serviceAccountName"] in accounts


def test_strict_means_strict():
    broken = json.loads(json.dumps(one(overlay("prod"), "Job")))
    broken["spec"]["template"]["spec"]["serviceAcountName"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="serviceAcountName"):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_passes_the_restricted_level(name):
    for template in pods_of(overlay(name)).values():
        assert_restricted(template["spec"])


def assert_restricted(spec: dict) -> None:
    """Pod security's `restricted` level, and a root file system that nobody writes to."""
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "downwardAPI", "emptyDir", "projected"}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_every_step_says_which_it_is_and_runs_as_nobody():
    version = one(build(MANIFESTS / "pipelines"), "PipelineVersion")
    steps = version["spec"]["pipelineSpec"]["deploymentSpec"]["executors"]
    platform = version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform.keys() == steps.keys()
    for name, settings in platform.items():
        assert settings["podMetadata"]["labels"]["draft-model/step"] == name.removeprefix("exec-")
        assert settings["securityContext"]["runAsNonRoot"] is True


def images_in(document) -> list[str]:
    """All that is called `image`, at any depth."""
    if isinstance(document, list):
        return [image for part in document for image in images_in(part)]
    if not isinstance(document, dict):
        return []
    own = [document["image"]] if isinstance(document.get("image"), str) else []
    return own + images_in(list(document.values()))


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_are_named_once_and_never_latest(name):
    documents = overlay(name)
    images = set(images_in(documents))
    assert all(re.search(r"(:(?!latest)[\w.-]+|@sha256:[0-9a-f]{64})$", image) for image in images), images
    # components/images and the compiled pipeline agree: each of our own pods has the image of a step.
    version = one(build(MANIFESTS / "pipelines"), "PipelineVersion")
    steps = version["spec"]["pipelineSpec"]["deploymentSpec"]["executors"]
    for pod, template in pods_of(documents).items():
        (container,) = template["spec"]["containers"]
        assert container["image"] == steps[f"exec-{LIKE[pod]}"]["container"]["image"]


def test_the_compute_map_is_the_librarys_own():
    data = one(build(MANIFESTS / "base"), "ConfigMap", "draft-model-compute-map")["data"]
    ours = (ROOT / "src/draft_model/jobs/compute_map.json").read_text()
    assert data == {compute.KEY: ours}, "make compile copies it"


def test_the_queues_of_the_compute_map_are_there_and_cover_what_jobs_ask_for():
    documents = overlay("prod")
    name = "draft-model-compute-map"
    found = compute.load_map(name, {name: one(documents, "ConfigMap", name)["data"]}.get)
    queue, shared = one(documents, "LocalQueue"), one(build(MANIFESTS / "examples"), "ClusterQueue")
    assert queue["spec"]["clusterQueue"] == shared["metadata"]["name"]
    covered = {name for group in shared["spec"]["resourceGroups"] for name in group["coveredResources"]}
    for asked in found.computes:
        wanted = compute.resolve(found, "train", Parameters(compute_draft_model_training=asked))
        if asked.endswith("-queue"):
            assert wanted.queue == queue["metadata"]["name"]
            assert {"cpu", "memory", *([wanted.gpu_resource] if wanted.gpus else [])} <= covered


def test_the_policy_on_jobs_admits_the_image_and_the_secrets_of_the_pipeline():
    version = one(build(MANIFESTS / "pipelines"), "PipelineVersion")
    steps = version["spec"]["pipelineSpec"]["deploymentSpec"]["executors"]
    images = [v["value"] for step in steps.values() for v in step["container"].get("env", ()) if "IMAGE" in v["name"]]
    for name in ("prod", "multi-user"):
        policy = one(overlay(name), "ConfigMap", "draft-model-job-policy")["data"]
        assert images
        assert all(image.startswith(policy["image_prefix"]) for image in images)
        (secret,) = one(overlay(name), "Role", "draft-model-steps")["rules"][0]["resourceNames"]
        assert f",{secret}," in policy["secrets"]
        assert f",{HUB}," in policy["secrets"]
        assert not any("ValidatingAdmission" in d["kind"] for d in overlay("dev"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_value_is_anywhere(name):
    documents = overlay(name)
    for secret in (d for d in documents if d["kind"] == "Secret"):
        assert secret["type"] == "kubernetes.io/service-account-token"  # which Kubernetes fills in
        assert not {"data", "stringData"} & secret.keys()
    for document in documents:
        if document["kind"] in ("Role", "ClusterRole"):
            for rule in document["rules"]:
                assert "pods/exec" not in rule["resources"]
                assert "*" not in (*rule["resources"], *rule["verbs"], *rule["apiGroups"])
                if "secrets" in rule["resources"]:
                    assert rule["verbs"] == ["get"]
                    assert len(rule["resourceNames"]) == 1
        assert document["kind"] not in ("ClusterRole", "ClusterRoleBinding")


def test_what_is_committed_looks_like_no_credential():
    key = r"(?i)A[KS]IA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{16}"
    by_hand = re.compile(rf"{key}|(password|secretkey|token): *[\"']?\w{{8}}")
    written = re.compile(rf"{key}|(password|api_?key|access_?key)\w*\s*[:=]\s*\S|{ROOT}|/tmp/|{Path.home()}/")
    for file in (*MANIFESTS.rglob("*.yaml"), COMPILED):
        assert not (written if file in (MANIFEST, COMPILED) else by_hand).search(file.read_text()), file


def test_the_version_comes_through_unchanged():
    """Its name is the hash of its content, which kustomize must not touch, and the schedules run this very version."""
    compiled = {d["kind"]: d for d in yaml.load_all(MANIFEST.read_text(), yaml.CSafeLoader)}
    for name in ("prod", "multi-user"):
        version = one(overlay(name), "PipelineVersion")
        assert version["spec"] == compiled["PipelineVersion"]["spec"]
        assert version["metadata"]["name"] == compiled["PipelineVersion"]["metadata"]["name"]
    (container,) = pods_of(overlay("prod"))["draft-model-recurring-runs"]["spec"]["containers"]
    assert {"name": "PIPELINE_VERSION", "value": version["metadata"]["name"]} in container["env"]


def annotation(document: dict, name: str) -> str:
    return document["metadata"].get("annotations", {}).get(f"argocd.argoproj.io/{name}", "")


def test_a_sync_goes_pipeline_version_schedules_and_keeps_old_versions():
    documents = overlay("prod")
    pipeline, version, job = one(documents, "Pipeline"), one(documents, "PipelineVersion"), one(documents, "Job")
    assert [annotation(d, "sync-wave") for d in (pipeline, version, job)] == ["0", "1", "2"]
    assert annotation(job, "hook") == "PostSync"
    assert annotation(job, "hook-delete-policy") == "BeforeHookCreation"
    assert annotation(version, "sync-options") == "Prune=false"
    namespace = one(overlay("multi-user"), "Namespace")
    assert annotation(namespace, "sync-options") == "Prune=false,Delete=false"


def test_argo_cd_may_apply_what_the_overlays_have_and_nothing_else():
    documents = build(MANIFESTS / "argocd")
    project, application = one(documents, "AppProject")["spec"], one(documents, "Application")["spec"]
    cluster = {(kind["group"], kind["kind"]) for kind in project["clusterResourceWhitelist"]}
    namespaced = {(kind["group"], kind["kind"]) for kind in project["namespaceResourceWhitelist"]}
    used = {(d["apiVersion"].rpartition("/")[0], d["kind"]) for name in OVERLAYS for d in overlay(name)}
    policy = "admissionregistration.k8s.io"
    assert cluster == {
        ("", "Namespace"), (policy, "ValidatingAdmissionPolicy"), (policy, "ValidatingAdmissionPolicyBinding")
    }  # fmt: skip
    assert namespaced | cluster == used
    namespaces = {d["metadata"].get("namespace") for name in OVERLAYS for d in overlay(name)} - {None}
    assert {place["namespace"] for place in project["destinations"]} == namespaces
    assert application["project"] == "draft-model"
    assert application["source"]["repoURL"] in project["sourceRepos"]
    assert (ROOT / application["source"]["path"] / "kustomization.yaml").exists()
    assert application["destination"] in project["destinations"]
    assert "ServerSideApply=true" in application["syncPolicy"]["syncOptions"]


def test_the_recurring_runs_of_the_example_are_valid():
    wanted = read(MANIFESTS / "components/recurring-runs/recurring_runs.yaml")
    assert wanted.service_account in {d["metadata"]["name"] for d in build(MANIFESTS / "base")}
    assert not any(schedule.enabled for schedule in wanted.runs.values())  # an example starts nothing


def test_another_store_is_no_key_to_another_role(tmp_path):
    """external-s3 refuses a Role that it does not know, instead of opening another Secret."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "kustomization.yaml").write_text("resources: [role.yaml]\n")
    role = one(build(MANIFESTS / "base"), "Role", "draft-model-steps")
    (base / "role.yaml").write_text(yaml.safe_dump({**role, "rules": role["rules"][::-1]}))
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(AssertionError, match="test"):
        build(write(folder, "mine", [base], ("external-s3",)))
