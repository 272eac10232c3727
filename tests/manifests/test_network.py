"""Who may talk to whom, worked out from the policies and from the labels that our pods really have."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import pytest
from jobs.requests import GOLDEN

from draft_model.jobs.spec import pytorchjob, trainjob
from manifests.kustomize import MANIFESTS, build, needs_kubectl, one, overlay, pods_of

pytestmark = needs_kubectl


@dataclass(frozen=True)
class Place:
    """A pod, or an address outside."""

    port: int
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""
    protocol: str = "TCP"


def selects(selector: dict, labels: dict) -> bool:
    """Kubernetes' label selector."""
    for expression in selector.get("matchExpressions", ()):
        value, known = labels.get(expression["key"]), expression.get("values", ())
        fits = {
            "Exists": value is not None,
            "DoesNotExist": value is None,
            "In": value in known,
            "NotIn": value not in known,
        }[expression["operator"]]
        if not fits:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def is_peer(peer: dict, own: str, place: Place) -> bool:
    if block := peer.get("ipBlock"):
        if not place.address:
            return False
        address = ip_address(place.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(e) for e in block.get("except", ())
        )
    if place.address:
        return False
    namespace = {"kubernetes.io/metadata.name": place.namespace}
    there = selects(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else place.namespace == own
    return there and selects(peer.get("podSelector", {}), place.labels)


def lets(policies: list[dict], direction: str, own: str, labels: dict, other: Place, port: Place) -> bool:
    """Whether the policies of a pod let it talk in a direction; without any, everything goes."""
    applying = [
        p["spec"]
        for p in policies
        if direction in p["spec"]["policyTypes"] and selects(p["spec"]["podSelector"], labels)
    ]
    rules = [rule for spec in applying for rule in spec.get(direction.lower(), ())]
    side = "to" if direction == "Egress" else "from"
    return not applying or any(
        any(is_peer(peer, own, other) for peer in rule[side])
        and any(p["protocol"] == port.protocol and p.get("port", port.port) == port.port for p in rule["ports"])
        for rule in rules
    )


def steps() -> dict[str, dict]:
    """Labels of the steps' pods in the compiled pipeline."""
    version = one(build(MANIFESTS / "pipelines"), "PipelineVersion")
    found = version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): settings["podMetadata"]["labels"] for name, settings in found.items()}


def training() -> dict[str, dict]:
    """Labels of the training jobs' pods as each back end renders them."""
    job, runtime = pytorchjob(GOLDEN["1x1"])[0], trainjob(GOLDEN["1x1"])[0]
    replicated = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    return {
        "PyTorchJob": job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]["labels"],
        "TrainJob": replicated["metadata"]["labels"],
    }


PEER = training()["PyTorchJob"]
ALLOWS = "draft-model/allows"
INSIDE = {
    "names": Place(53, "kube-system", {"k8s-app": "kube-dns"}, protocol="UDP"),
    "API server": Place(6443, address="10.96.0.1"),
    "KFP": Place(8888, "kubeflow", {"app": "ml-pipeline"}),
    "KFP's store": Place(8333, "kubeflow", {"app": "seaweedfs"}),
    "KFP's database": Place(3306, "kubeflow", {"app": "mysql"}),
    "MLflow": Place(5000, "mlflow", {"app": "mlflow"}),
    "the internet": Place(443, address="203.0.113.7"),
    "the machine's metadata": Place(80, address="169.254.169.254"),
    "a notebook": Place(8888, "team-a", {"app": "notebook"}),
    "training": Place(29500, "team-a", PEER),
    "training elsewhere": Place(29500, "team-b", PEER),
}
STEP = {"names", "API server", "KFP", "KFP's store", "MLflow"}
LOOKS_OUTSIDE = {"preflight", "import-model"}


def reached(policies: list[dict], namespace: str, labels: dict) -> set[str]:
    """What a pod gets an answer from."""
    me = Place(0, namespace, labels)
    return {
        name
        for name, place in INSIDE.items()
        if lets(policies, "Egress", namespace, labels, place, place)
        and (place.namespace != namespace or lets(policies, "Ingress", namespace, place.labels, me, place))
    }


def policies_of(name: str) -> list[dict]:
    return [d for d in overlay(name) if d["kind"] == "NetworkPolicy"]


def test_each_step_reaches_what_it_needs_and_no_more():
    for name, labels in steps().items():
        more = {"the internet"} if name in LOOKS_OUTSIDE else set()
        assert reached(policies_of("multi-user"), "team-a", labels) == STEP | more, name


@pytest.mark.parametrize("backend", training())
def test_training_reaches_its_peers_names_the_store_and_the_tracking(backend):
    labels = training()[backend]
    assert reached(policies_of("multi-user"), "team-a", labels) == {"names", "KFP's store", "MLflow", "training"}


def test_a_patch_of_the_label_changes_every_way_to_mlflow():
    policies = [p for p in policies_of("multi-user") if p["metadata"].get("labels", {}).get(ALLOWS) == "mlflow"]
    pods = [*steps().values(), *training().values()]
    assert all(any(selects(p["spec"]["podSelector"], labels) for p in policies) for labels in pods)
    without = [p for p in policies_of("multi-user") if p not in policies]
    assert not any("MLflow" in reached(without, "team-a", labels) for labels in pods)


def test_the_schedules_reach_kfp_alone():
    labels = {name: template["metadata"]["labels"] for name, template in pods_of(overlay("multi-user")).items()}
    assert reached(policies_of("multi-user"), "team-a", labels["draft-model-recurring-runs"]) == {"names", "KFP"}


def test_nobody_else_reaches_our_pods_and_others_are_left_alone():
    policies, notebook = policies_of("multi-user"), INSIDE["a notebook"]
    for labels in (*steps().values(), *training().values()):
        assert not lets(policies, "Ingress", "team-a", labels, notebook, Place(8080))
    assert reached(policies, "team-a", notebook.labels) == INSIDE.keys() - {"training"}


def test_with_a_store_outside_steps_still_reach_kfps_where_their_logs_go():
    """A step that cannot archive its log ends in Error after it has succeeded."""
    policies = policies_of("prod")
    found = reached(policies, "kubeflow", training()["PyTorchJob"])
    assert found >= {"names", "the internet", "MLflow"}
    assert "KFP's store" not in found
    for labels in steps().values():
        found = reached(policies, "kubeflow", labels)
        assert found >= {"the internet", "KFP's store"}
        assert "the machine's metadata" not in found
