"""The states of a job, from what Kubernetes says of it and its pods, and why one failed; see docs/kubernetes.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from draft_model.jobs.spec import Manifest
from draft_model.parameters import Stage


class State(StrEnum):
    """Where a job is, with the parameter that limits it in minutes and the conditions of a job that mean it.

    A queue may move a job between QUEUED, STARTING and RUNNING in any order. States without a limit are ends. The first
    state of which a condition holds is the job's; without any, the pods decide.
    """

    limit: str
    conditions: tuple[str, ...]

    def __new__(cls, name: str, limit: str = "", *conditions: str) -> State:
        """A string that knows the rest of its line."""
        state = str.__new__(cls, name)
        state._value_, state.limit, state.conditions = name, limit, conditions
        return state

    FAILED = "FAILED", "", "Failed"
    SUCCEEDED = "SUCCEEDED", "", "Succeeded", "Complete"  # of a PyTorchJob, of a TrainJob
    QUEUED = "QUEUED", "queue_limit", "Suspended"  # not admitted, or suspended; one stay
    RESTARTING = "RESTARTING", "run_limit", "Restarting"  # operator or torchrun starts processes again
    STARTING = "STARTING", "start_limit"  # some pods do not run yet; one stay
    RUNNING = "RUNNING", "run_limit"  # all stays together
    DELETED = "DELETED"


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


def status_of(job: Manifest, pods: Sequence[Pod], nodes: int) -> Status:
    """The state that a job's conditions and pods mean."""
    status, spec = job.get("status") or {}, job["spec"]
    conditions = {c["type"]: c for c in status.get("conditions") or () if c["status"] == "True"}
    if spec.get("runPolicy", spec).get("suspend"):
        conditions.setdefault("Suspended", {"message": "suspended"})
    for state in State:
        if holding := [conditions[name] for name in state.conditions if name in conditions]:
            return Status(state, holding[0].get("message", ""), bool(status))
    running = sum(pod.started and not pod.exit_code for pod in pods)
    state = State.RUNNING if running >= nodes else State.STARTING
    return Status(state, f"{running} of {nodes} pods run", bool(status or pods))


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
    waiting = waiting or conditions.get(("PodScheduled", "False"), {})
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


_LINES = 15
_PEERS = re.compile(
    r"Watchdog caught collective operation timeout|NCCL (?:error|timeout)|DistBackendError|ncclRemoteError"
    r"|ncclSystemError|Connection (?:closed|reset) by peer|Timed out (?:waiting|after)|DistNetworkError"
    r"|RendezvousConnectionError|RendezvousTimeoutError|Broken pipe|wait timeout after"
    r"|another one is gone or does not answer",
    re.IGNORECASE,
)
_GPU_MEMORY = re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED")
_GPU_BROKEN = re.compile(
    r"uncorrectable (?:ECC|NVLink)|ECC error|GPU is lost|fallen off the bus|Driver/library version mismatch"
    r"|driver error|nvidia-container-cli: (?:initialization|detection|device|driver|mount|ldcache) error"
    r"|initialize NVML|unresolvable CDI devices|CUDA-capable device\(s\) is/are busy or unavailable"
    r"|No CUDA GPUs are available|system not yet initialized",
    re.IGNORECASE,
)
_MACHINE = re.compile(
    # taken away: by kubelet, node controller, scheduler, drain
    r"Evicted|Node(Lost|Shutdown|Unreachable)|Terminated|Shutdown|Preempting|PreemptionByScheduler|Disrupted"
    r"|DeletionByTaintManager|EvictionByEvictionAPI|DeletionByPodGC|TerminationByKubelet|ContainerStatusUnknown"
    # rejected by a kubelet, as after a restart of the node
    r"|UnexpectedAdmissionError|OutOf.+|Node(Affinity|Unschedulable|Ports)|TaintToleration|TopologyAffinityError"
    r"|InvalidNodeInfo"
)
_NEVER_STARTS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull",
                 "CreateContainerConfigError", "CreateContainerError", "RunContainerError")  # fmt: skip
_SMALLER: dict[Stage, str] = {
    "train": "lower draft_micro_batch_size, training_batch_size or max_length",
    "dataset": "lower build_dataset_num_proc",
    "evaluate": "lower evaluation_batch_sizes or evaluation_max_new_tokens",
}


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    reason: str  # one word: OOMKilled, Evicted, ImagePull, Unschedulable, Collective, UserError, ...
    retryable: bool  # the machines failed, so another attempt makes sense
    problems: list[str]  # sentences for the user


def classify(
    job: str, stage: Stage, detail: str, pods: Sequence[Pod], tails: Mapping[str, Iterable[str]]
) -> Failure:  # fmt: skip
    """Finds the cause among all that failed after it, by the job's own `detail`, its pods and their logs' last lines.

    A process that dies takes its peers with it, each with an error about its connection. The cause is the pod that
    ended first with something else to say.
    """
    failed = [pod for pod in pods if pod.exit_code or (pod.ended and pod.exit_code is None)]
    failed.sort(key=lambda pod: pod.finished or "~")
    order = {"UserError": 0, "OOMKilled": 1, "Collective": 3}
    if found := [_of_pod(pod, stage, tails.get(pod.name, ())) for pod in failed]:
        return min(found, key=lambda failure: order.get(failure.reason, 2))
    if "longer than specified deadline" in detail or "DeadlineExceeded" in detail:
        return Failure("Deadline", False, [f"{job} ran longer than start_limit + run_limit: raise run_limit"])
    return Failure("Failed", False, [f"{job} failed: {detail or 'Kubernetes does not say why'}"])


def _of_pod(pod: Pod, stage: Stage, tail: Iterable[str]) -> Failure:
    """The reasons of docs/kubernetes.md, the first that holds."""
    code, text = pod.exit_code, "\n".join([*tail, pod.message])
    last = [f"  {line}" for line in (list(tail) or pod.message.splitlines())[-_LINES:]]
    if code == 2:
        with suppress(ValueError, KeyError, TypeError):  # the process's own sentences, as jobs/torchrun.py left them
            return Failure("UserError", False, [str(problem) for problem in json.loads(pod.message)["problems"]])
    smaller = _SMALLER.get(stage, "lower what it processes at once")
    why, ended = pod.message, "" if code is None else f" with exit code {code}"
    causes: list[tuple[object, str, bool, str, list[str]]] = [
        (pod.reason == "OOMKilled", "OOMKilled", False,
         f" used more memory than its limit (OOMKilled): {smaller}, or choose a larger instance type", []),
        (_MACHINE.fullmatch(pod.reason), pod.reason, True,
         f" lost its machine ({pod.reason}): {why or 'no details'}", []),
        (_GPU_BROKEN.search(text), "GPU", True, f": a GPU or its driver failed: {why or 'see its log'}", last),
        (_GPU_MEMORY.search(text), "GPUMemory", False,
         f" has too little GPU memory: {smaller}, or choose GPUs with more", last),
        (code in (137, 143), "Killed", True, f" was killed{ended}: a preempted or overcommitted machine", []),
        (_PEERS.search(text), "Collective", True, " lost its peers or waited for them longer than dist_timeout", last),
        (True, "Error", False, f" failed{ended}; its last lines:", last),
    ]  # fmt: skip
    return next(Failure(name, again, [pod.name + said, *more]) for holds, name, again, said, more in causes if holds)


def never_starts(pods: Sequence[Pod]) -> Failure | None:
    """What keeps a container from starting and will not go away by waiting."""
    for pod in pods:
        if pod.waiting.partition(":")[0] in _NEVER_STARTS:
            reason, advice = "Container", "see its events"
            if "Image" in pod.waiting:
                reason, advice = "ImagePull", "check the image's name, and that the cluster may pull it"
            broken = bool(_GPU_BROKEN.search(pod.waiting))
            return Failure(reason, broken, [f"{pod.name} does not start: {pod.waiting}: {advice}"])
    return None
