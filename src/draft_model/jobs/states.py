"""The states of a job, from what Kubernetes says of it and its pods; docs/kubernetes.md draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from draft_model.jobs.request import JobRequest, Manifest
from draft_model.parameters import Parameters


class State(StrEnum):
    """Where a job is; a queue may move it between the first three in any order."""

    QUEUED = "QUEUED"  # not admitted, or suspended
    STARTING = "STARTING"  # some pods do not run yet
    RUNNING = "RUNNING"
    RESTARTING = "RESTARTING"  # operator or torchrun starts processes again
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    DELETED = "DELETED"


LIMITS = {
    State.QUEUED: "queue_limit",  # one stay
    State.STARTING: "start_limit",  # one stay
    State.RUNNING: "run_limit",  # all stays together
    State.RESTARTING: "run_limit",
}
"""The parameter that limits each state, in minutes; states without one are ends."""

_CONDITIONS = {
    "Failed": State.FAILED,
    "Succeeded": State.SUCCEEDED,  # PyTorchJob
    "Complete": State.SUCCEEDED,  # TrainJob
    "Suspended": State.QUEUED,
    "Restarting": State.RESTARTING,
}
"""What a condition that holds means; the first of them decides. Without any, the pods do."""


@dataclass(frozen=True)
class Status:
    """A job's state, and a few words for the log: which pods run, why it failed."""

    state: State
    detail: str = ""
    touched: bool = True  # whether an operator has written a status at all


@dataclass(frozen=True)
class Pod:
    """One node of a job."""

    name: str
    node: int  # its rank among the nodes
    uid: str = ""
    started: bool = False  # its container has started, so that it has a log
    ended: bool = False
    finished: str = ""  # when the container ended, as Kubernetes writes times
    exit_code: int | None = None
    reason: str = ""  # why it ended or was taken away: OOMKilled, Evicted, ...
    message: str = ""  # what the container left for its end, or what Kubernetes says
    waiting: str = ""  # why the container does not start: ImagePullBackOff, Unschedulable, ...


def status_of(job: Manifest, pods: Sequence[Pod], request: JobRequest) -> Status:
    """The state that a job's conditions and pods mean."""
    status, spec = job.get("status") or {}, job["spec"]
    conditions = {c["type"]: c for c in status.get("conditions") or () if c["status"] == "True"}
    if spec.get("runPolicy", spec).get("suspend"):
        conditions.setdefault("Suspended", {"message": "suspended"})
    for name, state in _CONDITIONS.items():
        if name in conditions:
            return Status(state, conditions[name].get("message", ""), bool(status))
    running = sum(pod.started and not pod.exit_code for pod in pods)
    state = State.RUNNING if running >= request.spec.nodes else State.STARTING
    return Status(state, f"{running} of {request.spec.nodes} pods run", bool(status or pods))


def pod_of(pod: Manifest, node: int) -> Pod:
    """What a pod's object says of its one container."""
    status = pod.get("status", {})
    conditions = {(c["type"], c["status"]): c for c in status.get("conditions") or ()}
    container: Manifest = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state", {})
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    # The word of the kubelet or of a controller on the whole pod: Evicted, NodeLost, ...
    reason = status.get("reason") or ended.get("reason", "")
    if disrupted := conditions.get(("DisruptionTarget", "True")):
        reason = disrupted.get("reason", "Disrupted")
    if not waiting:
        waiting = conditions.get(("PodScheduled", "False"), {})
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
        waiting=": ".join(filter(None, (waiting.get("reason", ""), waiting.get("message", "")))),
    )


class Clock:
    """How long a job has been in each phase, compared with the limits; times in seconds of any origin."""

    def __init__(self, parameters: Parameters, now: float) -> None:
        self._limits = {name: 60.0 * getattr(parameters, name) for name in LIMITS.values()}
        self._state, self._entered, self._last, self._running = State.STARTING, now, now, 0.0

    def enter(self, state: State, now: float) -> str:
        """Notes the state at a moment; gives the parameter whose limit is exceeded, or nothing."""
        if LIMITS.get(self._state) == "run_limit":
            self._running += now - self._last
        self._last = now
        if state is not self._state:
            self._state, self._entered = state, now
        limit = LIMITS.get(state, "")
        spent = self._running if limit == "run_limit" else now - self._entered
        return limit if limit and spent > self._limits[limit] else ""
