"""PyTorchJobs and TrainJobs alike: created or adopted, read and deleted; and which of them a cluster has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from draft_model.errors import DraftModelError
from draft_model.jobs import spec
from draft_model.jobs.cluster import Cluster, Forbidden, Unavailable
from draft_model.jobs.compute import Compute
from draft_model.jobs.spec import PYTORCHJOB, RUN_ID, RUNTIME, SPEC_HASH, TRAINJOB, Job, Kind, Manifest
from draft_model.jobs.states import Pod, State, Status, pod_of, status_of
from draft_model.parameters import Stage

logger = logging.getLogger(__name__)

_KUEUE = "kueue.x-k8s.io"
_BY_KUEUE = ("suspend", "nodeSelector", "tolerations", "labels", "annotations")
"""Fields that Kueue changes when it admits a job."""
_DEFAULTS = (*_BY_KUEUE, "managedBy", "ports", "dnsPolicy", "schedulerName", "apiGroup", "successPolicy", "network",
             "restartStrategy", "groupName", "replicas")  # fmt: skip
"""Fields that schemas and operators may fill in besides what was asked for."""


class _Type(NamedTuple):
    kinds: tuple[Kind, ...]  # in the order of creation; the job is the last
    render: Callable[[Job], list[Manifest]]
    container: str
    name_label: str  # of a pod: the job that it belongs to
    rank_label: str  # label or annotation of a pod: its index in its job or replica type


_TYPES = {
    "pytorchjob": _Type(
        (PYTORCHJOB,), spec.pytorchjob, "pytorch", "training.kubeflow.org/job-name",
        "training.kubeflow.org/replica-index",
    ),
    "trainjob": _Type(
        (RUNTIME, TRAINJOB), spec.trainjob, "node", "jobset.sigs.k8s.io/jobset-name",
        "batch.kubernetes.io/job-completion-index",
    ),
}  # fmt: skip
ALL_KINDS = [kind for kinds, *_ in _TYPES.values() for kind in reversed(kinds)]


class Backend:
    """Runs jobs as objects of one type: `pytorchjob` or `trainjob`."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.kinds, self.render, self.container, self._name_label, self._rank_label = _TYPES[name]
        self.kind, self._version = self.kinds[-1], ""

    def create_or_adopt(self, job: Job) -> Job:
        """Creates the job's objects, or adopts those of the same run and specification.

        Raises:
            Unavailable: while an object of the name is being deleted.
        """
        for kind, manifest in zip(self.kinds, self.render(job), strict=True):
            made = self.cluster.create(kind, manifest)
            there = made or self.cluster.get(kind, job.name)
            if there is None or "deletionTimestamp" in there["metadata"]:
                raise Unavailable(f"{kind.kind} {job.name} is being deleted; if it does not go, see its finalizers")
            if not made:
                _refuse_other(kind, there, manifest)
            job = replace(job, uid=there["metadata"]["uid"], adopted=not made)
        return job

    def read(self, job: Job) -> tuple[Status, list[Pod], list[str]]:
        """The job's status, its pods by node, and the names of pods that earlier jobs of its run still have."""
        found = self.cluster.get(self.kind, job.name)
        if found is None or found["metadata"]["uid"] != job.uid or "deletionTimestamp" in found["metadata"]:
            return Status(State.DELETED, "somebody deleted it"), [], []
        self._version = found["metadata"].get("resourceVersion", "")
        pods, earlier = [], []
        for pod in self.pods_of_run(job):
            labels, owners = pod["metadata"]["labels"], pod["metadata"].get("ownerReferences", ())
            others = any(owner["kind"] == self.kind.kind and owner["uid"] != job.uid for owner in owners)
            if labels.get(self._name_label) == job.name and not others:
                index = {**pod["metadata"].get("annotations", {}), **labels}.get(self._rank_label, "0")
                worker = labels.get("training.kubeflow.org/replica-type") == "worker"
                pods.append(pod_of(pod, int(index) + (worker and "Master" in job.replicas)))
            elif pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
                earlier.append(pod["metadata"]["name"])
        pods.sort(key=lambda pod: pod.node)
        return status_of(found, pods, job.nodes), pods, earlier

    def wait(self, job: Job, seconds: int) -> None:
        """Returns when the job has changed since it was read, or after some seconds."""
        self.cluster.wait(self.kind, job.name, self._version, seconds)

    def pods_of_run(self, job: Job) -> list[Manifest]:
        """Pods of all attempts of the run's job."""
        return self.cluster.pods(f"{RUN_ID}={job.run_id},app.kubernetes.io/component={job.stage}")

    def delete(self, job: Job) -> None:
        """Deletes the attempt's objects, where they are this run's."""
        for kind in reversed(self.kinds):
            found = self.cluster.get(kind, job.name)
            if found and found["metadata"].get("labels", {}).get(RUN_ID) == job.run_id:
                self.cluster.delete(kind, job.name)

    def workload(self, job: Job) -> str | None:
        """What Kueue says of the job in its queue; None where Kueue does not know the job."""
        version = self.cluster.groups().get(_KUEUE)
        try:
            workloads = self.cluster.objects(Kind(_KUEUE, version, "workloads", "Workload")) if version else []
        except Forbidden as error:
            logger.info("Kueue's workloads cannot be read: %s", error)
            return ""
        for workload in workloads:
            if any(owner["uid"] == job.uid for owner in workload["metadata"].get("ownerReferences", ())):
                said = [c.get("message", "") for c in workload.get("status", {}).get("conditions", ())]
                return said[-1] if said else ""
        return None


def _refuse_other(kind: Kind, existing: Manifest, wanted: Manifest) -> None:
    """Adopts nothing but the very job that was asked for: labels and annotations can be forged."""
    name, run_id = wanted["metadata"]["name"], wanted["metadata"]["labels"][RUN_ID]
    if (owner := existing["metadata"].get("labels", {}).get(RUN_ID)) != run_id:
        whose = f"belongs to the run {owner}" if owner else "was not made by this pipeline"
        raise DraftModelError(
            f"{kind.kind} {name} exists and {whose}, not to the run {run_id}: it is left alone; delete it, or start "
            "the run again, which gives it another id"
        )
    digests = [each["metadata"].get("annotations", {}).get(SPEC_HASH) for each in (existing, wanted)]
    if (field := _difference(existing["spec"], wanted["spec"])) or digests[0] != digests[1]:
        raise DraftModelError(
            f"{kind.kind} {name} exists, of this run but with other settings ({field or SPEC_HASH}): delete it, and "
            "run this step again"
        )


def _difference(existing: Any, wanted: Any, path: str = "spec") -> str:
    """Path of the first field that differs; empty where both ask for the same."""
    if isinstance(existing, dict) and isinstance(wanted, dict):
        for name in sorted(existing.keys() | wanted.keys()):
            if name in _BY_KUEUE or (name in _DEFAULTS and name not in wanted):
                continue
            if found := _difference(existing.get(name), wanted.get(name), f"{path}.{name}"):
                return found
        return ""
    if isinstance(existing, list) and isinstance(wanted, list) and len(existing) == len(wanted):
        each = (_difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(existing, wanted, strict=True)))
        return next(filter(None, each), "")
    return "" if existing == wanted else path


def choose(cluster: Cluster, wanted: str, run_id: str = "", without: str = "") -> Backend:
    """The back end that the parameter training_backend means on a cluster.

    `auto` is the one that has a job of the run, else the first that the cluster has, `without` one that does not work.
    """
    names = [name for name in _TYPES if wanted in ("auto", name) and name != without]
    found = [Backend(cluster, name) for name in names if cluster.has(_TYPES[name].kinds[-1])]
    if not found:
        kinds = " or ".join(_TYPES[name].kinds[-1].kind for name in names)
        raise DraftModelError(
            f"training_backend: given {wanted!r}, but this cluster has no {kinds}: install Kubeflow's training "
            "operator, or use training_backend=local, which runs each stage in its step's own pod, with the trainer's "
            "image for all steps"
        )
    if len(found) > 1 and run_id:
        with suppress(Forbidden):  # without the right to list TrainJobs there are none of this run
            found.sort(key=lambda backend: not cluster.objects(backend.kind, f"{RUN_ID}={run_id}"))
    logger.info("training_backend: %s", found[0].name)
    return found[0]


def jobs_of_run(cluster: Cluster, run_id: str) -> list[tuple[Kind, Manifest]]:
    """All objects of a run's jobs; of the kinds that this account may list, since it has made no others."""
    found, refused, kinds = [], [], [kind for kind in ALL_KINDS if cluster.has(kind)]
    for kind in kinds:
        try:
            found += [(kind, each) for each in cluster.objects(kind, f"{RUN_ID}={run_id}")]
        except Forbidden as error:
            refused.append(error)
    if refused and len(refused) == len(kinds):
        raise refused[0]
    return found


def check(cluster: Cluster, wanted: str, nodes: Mapping[Stage, Compute]) -> tuple[list[str], list[str]]:
    """What keeps a cluster from running the jobs; and what this account's rights do not show, or a cluster may add."""
    problems, notes = [], dict[str, None]()
    verbs = ("create", "get", "list", "watch", "delete")
    rights = [(verb, kind.group, kind.plural) for kind in choose(cluster, wanted).kinds for verb in verbs]
    rights += [("get", "", "pods"), ("list", "", "pods"), ("get", "", "pods/log")]
    if missing := [f"{verb} {resource}" for verb, group, resource in rights if not cluster.may(verb, group, resource)]:
        problems.append(
            f"training_backend: this run's service account may not {', '.join(missing)} in namespace "
            f"{cluster.namespace}: apply manifests/base there, whose account draft-model-coordinator may, and whose "
            "Secret of that name gives the step its token"
        )
    for queue in sorted({node.queue for node in nodes.values() if node.queue}):
        stages = ", ".join(stage for stage, node in nodes.items() if node.queue == queue)
        start = f"compute_map: the jobs of {stages} wait in the queue {queue}"
        if (version := cluster.groups().get(_KUEUE)) is None:
            problems.append(f"{start}, but this cluster has no Kueue: install it, or choose a compute without a queue")
        elif not cluster.may("get", _KUEUE, "localqueues"):
            notes[f"{start}; whether it exists cannot be seen with this service account's rights"] = None
        elif cluster.get(Kind(_KUEUE, version, "localqueues", "LocalQueue"), queue) is None:
            problems.append(f"{start}, but namespace {cluster.namespace} has no LocalQueue of that name: create it")
    for stage, node in nodes.items():
        labels = ",".join(f"{key}={value}" for key, value in node.node_selector.items())
        end = f"the {stage} job's pods cannot start, and the run ends after start_limit"
        try:
            if labels and not cluster.has_node(labels):
                notes[f"start_limit: no node of this cluster has the labels {labels} now; unless an autoscaler adds "
                      f"one, {end}"] = None  # fmt: skip
        except (Forbidden, Unavailable):
            notes[f"start_limit: whether a node has the labels {labels} cannot be seen with this service account's "
                  f"rights; where none has, {end}"] = None  # fmt: skip
    return problems, [*notes]
