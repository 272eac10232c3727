"""The run that this process belongs to: its cluster, pod and Workflow, and what its jobs' pods inherit from them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from draft_model import storage
from draft_model.errors import DraftModelError, Problem, Problems
from draft_model.jobs import compute
from draft_model.jobs.compute import Compute
from draft_model.jobs.spec import WORKFLOW, Job, Manifest
from draft_model.parameters import Parameters, Stage
from draft_model.tracking import LOGIN, forwarded

if TYPE_CHECKING:
    from draft_model.jobs.cluster import Cluster

logger = logging.getLogger(__name__)

IMAGE, ENGINE_IMAGE = "DRAFT_MODEL_IMAGE", "DRAFT_MODEL_ENGINE_IMAGE"
"""Environment variables: image of the pods of a step's job, where it is not this pod's own; of a regeneration's."""
STORE_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS", "AWS_REQUEST_CHECKSUM_CALCULATION",
                   "AWS_RESPONSE_CHECKSUM_VALIDATION", "AWS_CA_BUNDLE")  # fmt: skip
"""What the ConfigMap of the object store may set; the jobs' pods get the same as the step."""
_NETWORK = ("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")


def on_cluster() -> bool:
    """Whether this process is in a pod."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def wants_cluster(parameters: Parameters) -> bool:
    """Whether the stages are to run as jobs of a cluster."""
    wanted = parameters.training_backend
    return on_cluster() if wanted == "auto" else wanted != "local"


def connect() -> Cluster:
    """The cluster that this process is in, or that KUBECONFIG names."""
    from draft_model.jobs.cluster import Cluster  # the client takes a second to import

    return Cluster.connect()


def nodes_of(p: Parameters, *, jobs: bool) -> dict[Stage, Compute]:
    """What the pods of the jobs ask for, by stage, where there are jobs; raises DraftModelError with all problems.

    The data set has the import's nodes, and a regeneration the training's.
    """
    compute_map = compute.load_map(p.compute_map, lambda name: connect().config_map(name))
    found, problems = dict[Stage, Compute](), Problems()
    stages: tuple[Stage, ...] = ("import", "train", "evaluate") if jobs else ("import",)
    for stage in stages:
        with problems.collect():
            found[stage] = compute.resolve(compute_map, stage, p)
    problems.raise_all()
    return found if jobs else {}


def check_cluster(parameters: Parameters, nodes: Mapping[Stage, Compute]) -> tuple[list[str], list[str]]:
    """What keeps a run's jobs from running on the cluster, and what is worth knowing; creates nothing."""
    from draft_model.jobs.backends import check
    from draft_model.jobs.cluster import Unavailable

    try:
        return check(connect(), parameters.training_backend, nodes)
    except Unavailable as error:
        return [f"training_backend: {error}: start the run again later"], []
    except DraftModelError as error:
        return [Problem.of("training_backend", problem) for problem in error.problems], []


def complete(cluster: Cluster, job: Job) -> Job:
    """The job with what its pods get on the cluster: nodes, image, owner, variables and references to Secrets."""
    for name, uri in job.uris.items():
        if not storage.is_remote(uri):
            raise DraftModelError(
                f"{name}: given {uri!r}; the pods of a job see no folder of this machine: use an s3:// URI, or "
                "training_backend=local"
            )
    pod, secret = own_pod(cluster), job.parameters.object_store_secret
    containers = pod["spec"]["containers"] if pod else []
    # The pods log in to tracking server and Hub as this one: by reference to Secrets, and no value itself.
    references = {entry["name"]: entry.get("valueFrom", {}).get("secretKeyRef")
                  for container in containers for entry in container.get("env", ())}  # fmt: skip
    login = {name: references[name] for name in (*LOGIN, "HF_TOKEN") if references.get(name)}
    for name, key in (("AWS_ACCESS_KEY_ID", "accesskey"), ("AWS_SECRET_ACCESS_KEY", "secretkey")):
        login[name] = {"name": secret, "key": key, "optional": True}
    image = (os.environ.get(ENGINE_IMAGE) if job.stage == "regenerate" else "") or os.environ.get(IMAGE)
    own = sorted(containers, key=lambda container: container["name"] != "main")
    if not (image := image or (own[0]["image"] if own else "")):
        raise DraftModelError(f"the image of the job's pods is not known here: name it in {IMAGE}")
    compute_map = compute.load_map(job.parameters.compute_map, cluster.config_map)
    return replace(
        job,
        compute=compute.resolve(compute_map, job.stage, job.parameters),
        image=image,
        namespace=cluster.namespace,
        owner=owner_of(pod),
        variables={**forwarded(os.environ), **inherited(os.environ)},
        login=login,
    )


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of object store, Hub and network for a pod, without the newline that `echo | base64` leaves."""
    found = {
        name: environment.get(name, "").strip()
        for name in (*STORE_VARIABLES, *_NETWORK, "AWS_ENDPOINT_URL_S3", "AWS_REGION")
    }
    endpoint, region = found.pop("AWS_ENDPOINT_URL_S3"), found.pop("AWS_REGION")
    found["AWS_ENDPOINT_URL"] = endpoint or found["AWS_ENDPOINT_URL"]
    found["AWS_DEFAULT_REGION"] = found["AWS_DEFAULT_REGION"] or region
    if secret := [name for name, value in found.items() if "@" in urlsplit(value).netloc]:
        raise DraftModelError(
            f"{', '.join(secret)}: holds a name or password, which a job's manifest would show: put keys of the object "
            "store into the Secret that object_store_secret names, and leave others out of the URL"
        )
    return {name: value for name, value in found.items() if value}


def own_pod(cluster: Cluster) -> Manifest | None:
    """The pod of this process; None where it is in none, or may not see it."""
    from draft_model.jobs.cluster import Forbidden

    name = os.environ.get("KFP_POD_NAME") or (os.environ.get("HOSTNAME") if on_cluster() else None)
    try:
        return cluster.pod(name) if name else None
    except Forbidden as error:
        logger.warning("%s", error)
        return None


def owner_of(pod: Manifest | None) -> Manifest | None:
    """An owner reference to the pod's Workflow, so that the job goes when the run is deleted; else to the pod.

    The pod's own owner reference has the Workflow's uid, which is not the run's id.
    """
    if pod is not None:
        owners = pod["metadata"].get("ownerReferences", ())
        workflow = next((owner for owner in owners if owner["kind"] == WORKFLOW.kind), None)
        reference = workflow or {"apiVersion": "v1", "kind": "Pod", **pod["metadata"]}
    elif uid := os.environ.get("KFP_POD_UID"):
        reference = {"apiVersion": "v1", "kind": "Pod", "name": os.environ["KFP_POD_NAME"], "uid": uid}
    else:
        return None
    kept = {name: reference[name] for name in ("apiVersion", "kind", "name", "uid")}
    return {**kept, "controller": False, "blockOwnerDeletion": False}


def run_ended(cluster: Cluster, owner: Manifest | None) -> bool | None:
    """Whether a person ended the run: terminated it (KFP sets the Workflow's deadline to 0) or deleted it.

    Returns:
        None where that cannot be seen. A process that no Workflow owns was started, and is ended, by a person.
    """
    if owner is None:
        return True
    if owner["kind"] != WORKFLOW.kind:
        return None
    try:
        workflow = cluster.get(WORKFLOW, owner["name"])
    except DraftModelError:
        return None
    if workflow is None or "deletionTimestamp" in workflow["metadata"]:
        return True
    spec = workflow.get("spec", {})
    return spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))
