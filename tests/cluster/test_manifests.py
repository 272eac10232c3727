"""The overlays of manifests/ applied to a real API server, and what each account may do there afterwards."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from manifests.kustomize import KUBECTL, MANIFESTS, OVERLAYS, build, needs_kubectl, write

from cluster.apiserver import CRDS, holds
from cluster.conftest import eventually

pytestmark = needs_kubectl
RIGHTS = Path(__file__).parents[1] / "manifests" / "rights"
UNKNOWN = {"LocalQueue", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
"""Kinds that an API server of 1.20 with the CRDs of DRAFT_MODEL_CRDS does not have."""
OF_EVERYBODY = ("selfsubject", "[/", "[]")
"""Lines of rights that Kubernetes gives to all."""


@pytest.fixture(scope="module")
def kubectl(server):
    """Runs kubectl as an administrator and gives its output."""
    config = server.kubeconfig_of_admin()

    def run(*arguments: str, documents: list[dict] | None = None) -> str:
        done = subprocess.run(
            [KUBECTL, "--kubeconfig", config, *arguments], capture_output=True, text=True,
            input=None if documents is None else yaml.safe_dump_all(documents),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def pipelines(server, kubectl):
    """KFP's kinds."""
    for kind in ("pipelines", "pipelineversions"):
        file = Path(os.environ[CRDS]) / f"pipelines.kubeflow.org_{kind}.yaml"
        server.define(yaml.load(file.read_text(), yaml.CSafeLoader))
    eventually(lambda: "pipelineversions" in kubectl("api-resources", "--api-group=pipelines.kubeflow.org", "-o=name"))


@pytest.fixture(scope="module", params=OVERLAYS)
def applied(request, pipelines, kubectl, tmp_path_factory):
    """An overlay, applied as Argo CD does it, in a namespace of its own; its name and what was applied."""
    namespace = f"of-{request.param}"
    folder = write(tmp_path_factory.mktemp(namespace), namespace, [MANIFESTS / "overlays" / request.param])
    documents = [d for d in build(folder) if d["kind"] not in UNKNOWN]
    kubectl("create", "namespace", namespace)
    kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", documents=documents)
    kubectl("apply", "--server-side", "-f", "-", documents=documents)
    return request.param, namespace, documents


def test_the_server_keeps_all_that_an_overlay_says(applied, kubectl):
    _, namespace, documents = applied
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        found = json.loads(kubectl("get", kind, name, "-n", namespace, "-o=json"))
        for part in document.keys() - {"apiVersion", "metadata"}:
            assert holds(found[part], document[part]), f"{kind} {name}: the schema pruned or changed {part}"


def test_a_second_apply_changes_nothing(applied, kubectl):
    """But the Job after a sync, which Argo CD makes anew each time."""
    _, namespace, documents = applied
    documents = [document for document in documents if document["kind"] != "Job"]

    def versions() -> dict[str, str]:
        return {
            f"{d['kind']} {d['metadata']['name']}": kubectl(
                "get", d["kind"], d["metadata"]["name"], "-n", namespace, "-o=jsonpath={.metadata.resourceVersion}"
            )
            for d in documents
        }

    before = versions()
    kubectl("apply", "--server-side", "-f", "-", documents=documents)
    assert versions() == before


def rights(kubectl, namespace: str, account: str) -> str:
    """What an account may do in the namespace, a line for each thing, without what everybody may."""
    told = kubectl("auth", "can-i", "--list", f"--as=system:serviceaccount:{namespace}:{account}", "-n", namespace)
    lines = [" ".join(line.split()) for line in told.splitlines()[1:]]
    return "\n".join(sorted(line for line in lines if not line.startswith(OF_EVERYBODY)))


def test_each_account_may_do_what_the_table_says_and_no_more(applied, kubectl):
    name, namespace, documents = applied
    accounts = sorted(d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount")
    table = "\n\n".join(f"{account}\n{rights(kubectl, namespace, account)}".strip() for account in accounts) + "\n"
    assert table == (RIGHTS / f"{name}.txt").read_text()


def test_the_base_alone_serves_a_namespace_that_the_command_names(kubectl):
    kubectl("create", "namespace", "by-hand")
    kubectl("apply", "--server-side", "-n", "by-hand", "-k", str(MANIFESTS / "base"))
    assert "pytorchjobs.kubeflow.org [] [] [create" in rights(kubectl, "by-hand", "draft-model-coordinator")
    assert rights(kubectl, "by-hand", "draft-model-worker") == ""
    assert "pytorchjobs" not in rights(kubectl, "by-hand", "draft-model-steps")
