"""Why a job failed, whether another attempt makes sense, and what a person should do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from draft_model.jobs.request import JobSpec
from draft_model.jobs.states import Pod

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
    r"uncorrectable ECC|ECC error|GPU is lost|fallen off the bus|Driver/library version mismatch|driver error"
    r"|nvidia-container-cli: initialization error|CUDA-capable device\(s\) is/are busy or unavailable"
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
_SMALLER = {"training": "lower draft_micro_batch_size, training_batch_size or max_length"}


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    reason: str  # one word: OOMKilled, Evicted, ImagePull, Unschedulable, Collective, UserError, ...
    retryable: bool  # the machines failed, so another attempt makes sense
    problems: list[str]  # sentences for the user


def classify(job: str, spec: JobSpec, detail: str, pods: Sequence[Pod], tails: Mapping[str, Iterable[str]]) -> Failure:
    """Finds the cause among all that failed after it.

    A process that dies takes its peers with it, each with an error about its connection. The cause is the pod that
    ended first with something else to say.

    Args:
        job: its name.
        spec: of the job.
        detail: what the job's own status says.
        pods: all its pods.
        tails: the last lines of each pod's log, by pod name.
    """
    failed = [pod for pod in pods if pod.exit_code or (pod.ended and pod.exit_code is None)]
    failed.sort(key=lambda pod: pod.finished or "~")
    found = [_of_pod(pod, spec, tails.get(pod.name, ())) for pod in failed]
    order = {"UserError": 0, "OOMKilled": 1, "Collective": 3}
    if found:
        return min(found, key=lambda failure: order.get(failure.reason, 2))
    if "longer than specified deadline" in detail or "DeadlineExceeded" in detail:
        return Failure("Deadline", False, [f"{job} ran longer than start_limit + run_limit: raise run_limit"])
    return Failure("Failed", False, [f"{job} failed: {detail or 'Kubernetes does not say why'}"])


def _of_pod(pod: Pod, spec: JobSpec, tail: Iterable[str]) -> Failure:
    text, last = "\n".join([*tail, pod.message]), [f"  {line}" for line in list(tail)[-_LINES:]]
    if pod.exit_code == 2 and (problems := _problems(pod.message)):
        return Failure("UserError", False, problems)
    smaller = _SMALLER.get(spec.stage, "lower what it processes at once")
    if pod.reason == "OOMKilled":
        problem = f"{pod.name} used more memory than its limit (OOMKilled): {smaller}, or choose a larger instance type"
        return Failure("OOMKilled", False, [problem])
    if _MACHINE.fullmatch(pod.reason):
        return Failure(pod.reason, True, [f"{pod.name} lost its machine ({pod.reason}): {pod.message or 'no details'}"])
    if _GPU_BROKEN.search(text):
        return Failure("GPU", True, [f"{pod.name}: a GPU or its driver failed: {pod.message or 'see its log'}", *last])
    if _GPU_MEMORY.search(text):
        problem = f"{pod.name} has too little GPU memory: {smaller}, or choose GPUs with more"
        return Failure("GPUMemory", False, [problem, *last])
    if pod.exit_code in (137, 143):
        problem = f"{pod.name} was killed (exit code {pod.exit_code}): a preempted or overcommitted machine"
        return Failure("Killed", True, [problem])
    if _PEERS.search(text):
        problem = f"{pod.name} lost its peers or waited for them longer than dist_timeout"
        return Failure("Collective", True, [problem, *last])
    code = "" if pod.exit_code is None else f" with exit code {pod.exit_code}"
    last = last or [f"  {line}" for line in pod.message.splitlines()[-_LINES:]]
    return Failure("Error", False, [f"{pod.name} failed{code}; its last lines:", *last])


def _problems(message: str) -> list[str]:
    """The process's own sentences, as jobs/torchrun.py left them."""
    try:
        return [str(problem) for problem in json.loads(message)["problems"]]
    except (ValueError, KeyError, TypeError):
        return []


def never_starts(pods: Sequence[Pod]) -> Failure | None:
    """What keeps a container from starting and will not go away by waiting."""
    for pod in pods:
        if pod.waiting.partition(":")[0] in _NEVER_STARTS:
            reason, advice = "Container", "see its events"
            if "Image" in pod.waiting:
                reason, advice = "ImagePull", "check the image's name, and that the cluster may pull it"
            return Failure(reason, False, [f"{pod.name} does not start: {pod.waiting}: {advice}"])
    return None


def limit_exceeded(job: str, limit: str, minutes: int, detail: str, pods: Sequence[Pod]) -> Failure:
    """A phase took longer than its parameter allows."""
    waiting = [f"{pod.name}: {pod.waiting}" for pod in pods if pod.waiting]
    reason = {"queue_limit": "Queue", "start_limit": "Start", "run_limit": "Run"}[limit]
    if limit == "start_limit" and any(pod.waiting.startswith("Unschedulable") for pod in pods):
        reason = "Unschedulable"
    problem = f"{limit}: {job} exceeded {minutes} minutes ({detail}): raise {limit}, or remove what it waits for"
    return Failure(reason, False, [problem, *waiting])
