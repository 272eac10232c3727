"""Where a run is: on a cluster and in which pod of it, or on this machine; and so which back end trains."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.jobs import compute
from draft_model.jobs.compute import Compute
from draft_model.jobs.kubernetes import KubernetesBackend
from draft_model.jobs.pods import WORK
from draft_model.jobs.pytorchjob import PYTORCHJOB, PyTorchJobs
from draft_model.jobs.request import JobRequest, Kind, Manifest, ObjectStore
from draft_model.jobs.trainjob import RUNTIME, TRAINJOB, TrainJobs
from draft_model.parameters import Parameters
from draft_model.tracking import LOGIN, forwarded
from draft_model.training.config import TrainConfig

if TYPE_CHECKING:
    from draft_model.jobs.cluster import Cluster

logger = logging.getLogger(__name__)

IMAGE = "DRAFT_MODEL_IMAGE"
"""Environment variable: image of the job's pods, where it is not this pod's own."""

ALL_KINDS = [PYTORCHJOB, TRAINJOB, RUNTIME]
_BACKENDS: dict[str, tuple[Kind, type[KubernetesBackend]]] = {
    "pytorchjob": (PYTORCHJOB, PyTorchJobs),
    "trainjob": (TRAINJOB, TrainJobs),
}


def on_cluster() -> bool:
    """Whether this process is in a pod."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def wants_cluster(parameters: Parameters) -> bool:
    """Whether the training is to run as pods of a cluster."""
    return parameters.training_backend not in ("auto", "local") or (
        parameters.training_backend == "auto" and on_cluster()
    )


def connect() -> Cluster:
    """The cluster that this process is in, or that KUBECONFIG names."""
    from draft_model.jobs.cluster import Cluster  # the client takes a second to import

    return Cluster.connect()


def choose(cluster: Cluster, wanted: str) -> KubernetesBackend:
    """The back end that the parameter training_backend means on a cluster.

    Args:
        cluster: that the job will run on.
        wanted: `pytorchjob`, `trainjob`, or `auto` for the first of them that the cluster has.

    Raises:
        DraftModelError: where the cluster does not have it.
    """
    names = list(_BACKENDS) if wanted == "auto" else [wanted]
    for name in names:
        kind, backend = _BACKENDS[name]
        if cluster.has(kind):
            logger.info("training_backend: %s", name)
            return backend(cluster)
    kinds = " or ".join(_BACKENDS[name][0].kind for name in names)
    raise DraftModelError(
        f"training_backend: given {wanted!r}, but this cluster has no {kinds}: install Kubeflow's training operator, "
        "or use training_backend=local, which trains in this step's own pod"
    )


def nodes_of(values: Mapping[str, Any]) -> dict[str, Compute]:
    """What the pods of the import and of the training ask for, by stage.

    Args:
        values: parameters by name; bad ones are somebody else's to tell.

    Raises:
        DraftModelError: with all that the compute map does not have.
    """
    try:
        parameters = Parameters.model_validate(dict(values))
    except ValidationError:
        return {}
    found = compute.load_map(parameters.compute_map, lambda name: connect().config_map(name))
    nodes, problems = {}, []
    for stage in ("import", "train") if wants_cluster(parameters) else ("import",):
        try:
            nodes[stage] = compute.resolve(found, stage, parameters)
        except DraftModelError as error:
            problems += error.problems
    if problems:
        raise DraftModelError(problems)
    return nodes


def request_for(cluster: Cluster, config: TrainConfig, run_id: str) -> JobRequest:
    """What the first attempt of a run's training job asks for.

    Args:
        cluster: that it will run on.
        config: of the training.
        run_id: of the pipeline's run; empty for one that depends on the output only.

    Raises:
        DraftModelError: where something is missing that pods need.
    """
    places = {"model": config.model, "dataset": config.dataset, "output": config.output}
    for name, uri in {**places, "checkpoint_path": config.checkpoints}.items():
        if not storage.is_remote(uri):
            raise DraftModelError(
                f"{name}: given {uri!r}; the pods of a training job see no folder of this machine: use an s3:// URI, "
                "or training_backend=local"
            )
    parameters = config.parameters
    found = compute.load_map(parameters.compute_map, cluster.config_map)
    pod = _own_pod(cluster)
    environment = os.environ
    run_id = run_id or f"cli-{hashlib.sha256(config.output.encode()).hexdigest()[:16]}"
    return JobRequest(
        run_id=run_id,
        attempt=0,
        # Whatever a queue or an operator starts again goes on from this run's own checkpoints.
        config=replace(config, work=Path(WORK), run_id=run_id, again=True),
        compute=compute.resolve(found, "train", parameters),
        image=environment.get(IMAGE) or _image(pod),
        store=ObjectStore(
            endpoint=environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL", ""),
            region=environment.get("AWS_DEFAULT_REGION") or environment.get("AWS_REGION", ""),
            secret=parameters.object_store_secret,
        ),
        namespace=cluster.namespace,
        owner=_owner(pod),
        tracking=forwarded(environment),
        login=login_of(pod),
    )


def _own_pod(cluster: Cluster) -> Manifest | None:
    name = os.environ.get("KFP_POD_NAME") or (os.environ.get("HOSTNAME") if on_cluster() else None)
    if not name:
        return None
    try:
        return cluster.pod(name)
    except DraftModelError as error:
        logger.warning("%s", error)
        return None


def _image(pod: Manifest | None) -> str:
    containers = pod["spec"]["containers"] if pod else []
    image = next((c["image"] for c in containers if c["name"] == "main"), containers[0]["image"] if containers else "")
    if not image:
        raise DraftModelError(f"the image of the training job's pods is not known here: name it in {IMAGE}")
    return str(image)


def login_of(pod: Manifest | None) -> dict[str, Manifest]:
    """How a pod logs in to the tracking server: its references to Secrets, by variable. A value itself stays behind."""
    entries = [entry for container in pod["spec"]["containers"] for entry in container.get("env", ())] if pod else []
    references = {entry["name"]: entry.get("valueFrom", {}).get("secretKeyRef") for entry in entries}
    return {name: references[name] for name in LOGIN if references.get(name)}


def _owner(pod: Manifest | None) -> Manifest | None:
    """The Workflow that this pod belongs to, so that the job goes when the run is deleted; else the pod.

    The pod's own owner reference has the Workflow's uid, which is not the run's id.
    """
    reference = None
    if pod is not None:
        owners = pod["metadata"].get("ownerReferences", ())
        workflow = next((owner for owner in owners if owner["kind"] == "Workflow"), None)
        reference = workflow or {"apiVersion": "v1", "kind": "Pod", **pod["metadata"]}
    elif uid := os.environ.get("KFP_POD_UID"):
        reference = {"apiVersion": "v1", "kind": "Pod", "name": os.environ["KFP_POD_NAME"], "uid": uid}
    if reference is None:
        return None
    kept = {name: reference[name] for name in ("apiVersion", "kind", "name", "uid")}
    return {**kept, "controller": False, "blockOwnerDeletion": False}
