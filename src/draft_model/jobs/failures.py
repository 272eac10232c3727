"""Why a job failed, whether another attempt makes sense, and what a person should do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from draft_model.jobs.backend import Pod

_LINES = 15
_PEERS = re.compile(
    r"Watchdog caught collective operation timeout|NCCL (?:error|timeout)|DistBackendError|ncclRemoteError"
    r"|ncclSystemError|Connection (?:closed|reset) by peer|Timed out (?:waiting|after)|DistNetworkError"
    r"|RendezvousConnectionError|RendezvousTimeoutError|Broken pipe|wait timeout after"
    r"|another one is gone or does not answer",
    re.IGNORECASE,
)
_GPU_MEMORY = re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED")
_MACHINE = (
    "Evicted", "NodeLost", "NodeShutdown", "Terminated", "Shutdown", "Preempting", "PreemptionByScheduler",
    "DeletionByTaintManager", "EvictionByEvictionAPI", "DeletionByPodGC", "TerminationByKubelet",
    "ContainerStatusUnknown",
)  # fmt: skip
_NEVER_STARTS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull",
                 "CreateContainerConfigError", "CreateContainerError", "RunContainerError")  # fmt: skip
_SMALLER = "lower draft_micro_batch_size, training_batch_size or max_length"


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed.

    Attributes:
        reason: one word: OOMKilled, Evicted, ImagePull, Unschedulable, Collective, UserError, ...
        retryable: whether the machines failed, so that another attempt makes sense.
        problems: sentences for the user.
    """

    reason: str
    retryable: bool
    problems: list[str]


def classify(job: str, detail: str, pods: Sequence[Pod], tails: Mapping[str, Sequence[str]]) -> Failure:
    """Finds the cause among all that failed after it.

    A process that dies takes its peers with it, each with an error about its connection. The cause is the pod that
    ended first with something else to say.

    Args:
        job: its name.
        detail: what the job's own status says.
        pods: all its pods.
        tails: the last lines of each pod's log, by pod name.
    """
    failed = sorted((pod for pod in pods if pod.exit_code or (pod.ended and pod.exit_code is None)),
                    key=lambda pod: pod.finished or "~")  # fmt: skip
    found = [_of_pod(pod, tails.get(pod.name, ())) for pod in failed]
    for wanted in (
        _is("UserError"),
        _is("OOMKilled"),
        lambda failure: failure.reason != "Collective",
        _is("Collective"),
    ):
        if cause := next(filter(wanted, found), None):
            return cause
    if "longer than specified deadline" in detail or "DeadlineExceeded" in detail:
        return Failure("Deadline", False, [f"{job} ran longer than start_limit + run_limit: raise run_limit"])
    return Failure("Failed", False, [f"{job} failed: {detail or 'Kubernetes does not say why'}"])


def _is(reason: str) -> Callable[[Failure], bool]:
    return lambda failure: failure.reason == reason


def _of_pod(pod: Pod, tail: Sequence[str]) -> Failure:
    text = "\n".join([*tail, pod.message])
    if pod.exit_code == 2 and (problems := _problems(pod.message)):
        return Failure("UserError", False, problems)
    if pod.reason == "OOMKilled":
        return Failure(
            "OOMKilled", False,
            [f"{pod.name} used more memory than its limit (OOMKilled): {_SMALLER}, or choose a larger instance type"],
        )  # fmt: skip
    if pod.reason in _MACHINE:
        return Failure(pod.reason, True, [f"{pod.name} lost its machine ({pod.reason}): {pod.message or 'no details'}"])
    if _GPU_MEMORY.search(text):
        return Failure(
            "GPUMemory", False,
            [f"{pod.name} has too little GPU memory: {_SMALLER}, or choose GPUs with more", *_last(tail)],
        )  # fmt: skip
    if pod.exit_code in (137, 143):
        return Failure(
            "Killed", True,
            [f"{pod.name} was ended from outside (exit code {pod.exit_code}): a preempted or overcommitted machine"],
        )  # fmt: skip
    if _PEERS.search(text):
        return Failure(
            "Collective", True,
            [f"{pod.name} lost its peers or waited for them longer than dist_timeout", *_last(tail)],
        )  # fmt: skip
    code = "" if pod.exit_code is None else f" with exit code {pod.exit_code}"
    return Failure(
        "Error", False, [f"{pod.name} failed{code}; its last lines:", *_last(tail or pod.message.splitlines())]
    )


def _problems(message: str) -> list[str]:
    """The trainer's own sentences, as the pod's entry left them."""
    try:
        return [str(problem) for problem in json.loads(message)["problems"]]
    except (ValueError, KeyError, TypeError):
        return []


def _last(tail: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in tail[-_LINES:]]


def never_starts(pods: Sequence[Pod]) -> Failure | None:
    """What keeps a container from starting and will not go away by waiting."""
    for pod in pods:
        if pod.waiting.partition(":")[0] in _NEVER_STARTS:
            image = "Image" in pod.waiting
            advice = (
                "see that the image's name is right and that the cluster may pull it" if image else "see its events"
            )
            return Failure(
                "ImagePull" if image else "Container", False, [f"{pod.name} does not start: {pod.waiting}: {advice}"]
            )
    return None


def limit_exceeded(
    job: str, limit: str, minutes: int, detail: str, pods: Sequence[Pod], seen: Sequence[str]
) -> Failure:
    """A phase took longer than its parameter allows."""
    waiting = [pod for pod in pods if pod.waiting]
    reason = {"queue_limit": "Queue", "start_limit": "Start", "run_limit": "Run"}[limit]
    if limit == "start_limit" and any(pod.waiting.startswith("Unschedulable") for pod in waiting):
        reason = "Unschedulable"
    problem = f"{limit}: {job} exceeded {minutes} minutes ({detail}): raise {limit}, or remove what it waits for"
    return Failure(reason, False, [problem, *(f"{pod.name}: {pod.waiting}" for pod in waiting), *seen[-3:]])
