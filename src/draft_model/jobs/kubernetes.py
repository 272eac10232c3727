"""What the Kubernetes back ends do alike: create or adopt, look, follow logs, delete."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Forbidden, Job, Pod
from draft_model.jobs.request import RUN_ID, SPEC_HASH, JobRequest, Kind, Manifest
from draft_model.jobs.states import State, Status

if TYPE_CHECKING:
    from draft_model.jobs.cluster import Cluster
    from draft_model.jobs.watch import Changes

logger = logging.getLogger(__name__)

_KUEUE = "kueue.x-k8s.io"
_GOING_SECONDS = 180  # an object under deletion is gone by then, its pods' grace period included


class KubernetesBackend(ABC):
    """A back end whose jobs are custom objects.

    Args:
        cluster: where they are.
    """

    name: str
    kind: Kind
    kinds: tuple[Kind, ...]
    container: str

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @staticmethod
    @abstractmethod
    def render(request: JobRequest) -> list[Manifest]:
        """The objects, in the order in which they are created; the job is the last."""

    @staticmethod
    @abstractmethod
    def status_of(job: Manifest, pods: list[Manifest]) -> Status:
        """The state that a job's object and its pods mean."""

    @staticmethod
    @abstractmethod
    def selector(name: str) -> str:
        """Label selector of a job's pods."""

    @staticmethod
    @abstractmethod
    def node_rank(pod: Manifest, request: JobRequest) -> int:
        """Which node of the job a pod is."""

    def create_or_adopt(self, request: JobRequest) -> Job:
        """Creates the job's objects, or takes over those of the same run and specification."""
        job = Job(request, "")
        for kind, manifest in zip(self.kinds, self.render(request), strict=True):
            found, adopted = self._create_or_adopt(kind, manifest)
            job = Job(request, found["metadata"]["uid"], adopted)
        return job

    def _create_or_adopt(self, kind: Kind, manifest: Manifest) -> tuple[Manifest, bool]:
        name = manifest["metadata"]["name"]
        deadline = time.monotonic() + _GOING_SECONDS
        while True:
            if created := self.cluster.create(kind, manifest):
                return created, False
            there = self.cluster.get(kind, name)
            if there is None:
                continue
            _refuse_foreign(kind, there, manifest)
            if "deletionTimestamp" not in there["metadata"]:
                return there, True
            if time.monotonic() > deadline:
                raise DraftModelError(f"{kind.kind} {name} is being deleted and does not go: see its finalizers")
            time.sleep(1)

    def state(self, job: Job) -> Status:
        """Where the job is now."""
        found = self.cluster.get(self.kind, job.name)
        if found is None or found["metadata"]["uid"] != job.uid or "deletionTimestamp" in found["metadata"]:
            return Status(State.DELETED, "somebody deleted it")
        return self.status_of(found, self._pods(job))

    def pods(self, job: Job) -> list[Pod]:
        """The job's pods, by node."""
        found = (_pod(pod, self.node_rank(pod, job.request)) for pod in self._pods(job))
        return sorted(found, key=lambda pod: pod.node)

    def _pods(self, job: Job) -> list[Manifest]:
        return self.cluster.pods(f"{self.selector(job.name)},{RUN_ID}={job.request.run_id}")

    def logs(self, job: Job, pod: Pod, since: str) -> Iterator[tuple[str, str]]:
        """Time and text of each line that a pod writes."""
        for line in self.cluster.log(pod.name, self.container, since):
            moment, _, text = line.partition(" ")
            if moment > since:  # the API server counts in seconds, and gives the last one's lines again
                yield moment, text

    def delete(self, request: JobRequest) -> None:
        """Deletes the attempt's objects, where they are this run's."""
        for kind in reversed(self.kinds):
            for found in self.cluster.objects(kind, f"{RUN_ID}={request.run_id}"):
                if found["metadata"]["name"] == request.name:
                    self.cluster.delete(kind, request.name)

    def changes(self, job: Job) -> Changes:
        """Wakes whoever waits for the job to change."""
        from draft_model.jobs.watch import Changes

        return Changes(lambda version: self.cluster.watch(self.kind, job.name, version))

    def warnings(self, job: Job) -> list[str]:
        """The warning events of the job and of its pods, a line each."""
        lines = []
        for event in self.cluster.warnings():
            about = event.get("involvedObject", {}).get("name", "")
            if about == job.name or about.startswith(f"{job.name}-"):
                lines.append(f"{about}: {event.get('reason', '')}: {event.get('message', '')}")
        return lines

    def workload(self, job: Job) -> str | None:
        """What Kueue says of the job's place in its queue; None where Kueue does not know the job."""
        version = self.cluster.groups().get(_KUEUE)
        if version is None:
            return None
        try:
            workloads = self.cluster.objects(Kind(_KUEUE, version, "workloads", "Workload"))
        except DraftModelError as error:
            logger.info("what Kueue says cannot be seen: %s", error)
            return ""
        for workload in workloads:
            if any(owner["uid"] == job.uid for owner in workload["metadata"].get("ownerReferences", ())):
                said = [c.get("message", "") for c in workload.get("status", {}).get("conditions", ())]
                return said[-1] if said else ""
        return None


def _refuse_foreign(kind: Kind, there: Manifest, manifest: Manifest) -> None:
    metadata, wanted = there["metadata"], manifest["metadata"]
    name, owner = wanted["name"], metadata.get("labels", {}).get(RUN_ID)
    if owner != wanted["labels"][RUN_ID]:
        whose = f"belongs to the run {owner}" if owner else "was not made by this pipeline"
        raise DraftModelError(
            f"{kind.kind} {name} exists and {whose}, not to the run {wanted['labels'][RUN_ID]}: it is left alone; "
            "delete it, or start the run again, which gives it another id"
        )
    if metadata.get("annotations", {}).get(SPEC_HASH) != wanted["annotations"][SPEC_HASH]:
        raise DraftModelError(
            f"{kind.kind} {name} exists, of this run but with other settings (annotation {SPEC_HASH}): delete it, "
            "and run this step again"
        )


def _pod(pod: Manifest, node: int) -> Pod:
    status = pod.get("status", {})
    container: Manifest = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state", {})
    ended: Manifest = state.get("terminated") or {}
    reason = ended.get("reason", "")
    if status.get("reason"):  # Evicted, NodeLost, ...: the kubelet's or the controller's word on the whole pod
        reason = status["reason"]
    if disrupted := _condition(pod, "DisruptionTarget", "True"):
        reason = disrupted.get("reason", "Disrupted")
    waiting: Manifest = state.get("waiting") or {}
    why = ": ".join(filter(None, (waiting.get("reason", ""), waiting.get("message", ""))))
    if not why and (unscheduled := _condition(pod, "PodScheduled", "False")):
        why = ": ".join(filter(None, (unscheduled.get("reason", ""), unscheduled.get("message", ""))))
    return Pod(
        name=pod["metadata"]["name"],
        node=node,
        uid=pod["metadata"]["uid"],
        started=bool(ended) or "running" in state,
        ended=bool(ended) or status.get("phase") in ("Succeeded", "Failed"),
        finished=ended.get("finishedAt") or "",
        exit_code=ended.get("exitCode"),
        reason=reason,
        message=ended.get("message") or status.get("message", ""),
        waiting=why,
    )


def _condition(pod: Manifest, kind: str, value: str) -> Manifest | None:
    conditions = pod.get("status", {}).get("conditions") or ()
    return next((c for c in conditions if c["type"] == kind and c["status"] == value), None)


def delete_run(cluster: Cluster, kinds: list[Kind], run_id: str) -> list[str]:
    """Deletes all jobs of a run, whatever their attempt and whoever made them.

    Args:
        cluster: where they are.
        kinds: of which objects to look for.
        run_id: of the run.

    Returns:
        What was deleted, as `kind/name`.

    Raises:
        Forbidden: where this account may look for none of the kinds. One that it may not list, it has not made either.
    """
    deleted, looked, refused = [], False, None
    for kind in filter(cluster.has, kinds):
        try:
            there = cluster.objects(kind, f"{RUN_ID}={run_id}")
        except Forbidden as error:
            refused = error
            continue
        looked = True
        for found in there:
            cluster.delete(kind, found["metadata"]["name"])
            deleted.append(f"{kind.plural}/{found['metadata']['name']}")
    if refused and not looked:
        raise refused
    return deleted
