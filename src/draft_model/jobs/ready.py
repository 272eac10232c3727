"""Whether a cluster can take a run's training job: asked before the run starts, and nothing is created for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Unavailable
from draft_model.jobs.compute import Compute
from draft_model.jobs.place import choose, connect
from draft_model.jobs.request import Kind
from draft_model.parameters import Parameters

if TYPE_CHECKING:
    from draft_model.jobs.cluster import Cluster

_JOB_VERBS = ("create", "get", "list", "watch", "delete")
_POD_RIGHTS = (("get", "pods"), ("list", "pods"), ("get", "pods/log"))
_KUEUE = "kueue.x-k8s.io"


def look(parameters: Parameters, compute: Compute | None) -> tuple[list[str], list[str]]:
    """Looks for the training job's kind, the rights to run one, and the queue that it waits in.

    Args:
        parameters: of the run, whose training is to run on the cluster.
        compute: what the job's pods ask for; None where that is not known.

    Returns:
        What keeps the job from running, and what could not be seen with this service account's rights.
    """
    problems: list[str] = []
    notes: list[str] = []
    try:
        cluster = connect()
        kinds = choose(cluster, parameters.training_backend).kinds
        if missing := _rights_missing(cluster, kinds):
            problems.append(
                f"training_backend: this run's service account may not {', '.join(missing)} in namespace "
                f"{cluster.namespace}: start runs as draft-model-coordinator, whose Role is in manifests/"
            )
        if compute is not None and compute.queue:
            _look_for_queue(cluster, compute.queue, parameters.compute_draft_model_training, problems, notes)
    except DraftModelError as error:
        problems += error.problems
    except Unavailable as error:
        problems.append(f"training_backend: the API server does not answer ({error}): start the run again later")
    return problems, notes


def _rights_missing(cluster: Cluster, kinds: tuple[Kind, ...]) -> list[str]:
    wanted = [(verb, kind.group, kind.plural) for kind in kinds for verb in _JOB_VERBS]
    wanted += [(verb, "", resource) for verb, resource in _POD_RIGHTS]
    return [f"{verb} {resource}" for verb, group, resource in wanted if not cluster.may(verb, group, resource)]


def _look_for_queue(cluster: Cluster, queue: str, compute: str, problems: list[str], notes: list[str]) -> None:
    start = f"compute_draft_model_training: {compute} waits in the queue {queue}"
    if (version := cluster.groups().get(_KUEUE)) is None:
        problems.append(f"{start}, but this cluster has no Kueue: install it, or choose a compute without a queue")
    elif not cluster.may("get", _KUEUE, "localqueues"):
        notes.append(f"{start}; whether it is there cannot be seen with this service account's rights")
    elif cluster.get(Kind(_KUEUE, version, "localqueues", "LocalQueue"), queue) is None:
        problems.append(f"{start}, but namespace {cluster.namespace} has no LocalQueue of that name: create it")
