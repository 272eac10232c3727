"""The one interface to whatever runs a training job: PyTorchJob, TrainJob, or torchrun on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from draft_model.errors import DraftModelError
from draft_model.jobs.request import JobRequest, Manifest
from draft_model.jobs.states import Status


class Unavailable(Exception):
    """The API server does not answer now; what was asked may be asked again."""


class Forbidden(DraftModelError):
    """The service account may not do what was asked; for some seconds after its start an API server says so of all."""


@dataclass(frozen=True)
class Job:
    """A job that was created or adopted.

    Attributes:
        request: what was asked for.
        uid: the object's; another one under the same name is another job.
        adopted: whether it was there already.
    """

    request: JobRequest
    uid: str
    adopted: bool = False

    @property
    def name(self) -> str:
        """The job's name."""
        return self.request.name


@dataclass(frozen=True)
class Pod:
    """One node of a job.

    Attributes:
        name: of the pod.
        node: its rank among the nodes.
        uid: of the pod; a queue that suspends a job makes new pods of the same names later.
        started: whether its container has started, so that it has a log.
        ended: whether its container has ended.
        finished: when the container ended, as Kubernetes writes times; empty where it did not.
        exit_code: of the container; None where there is none.
        reason: why it ended or was taken away: OOMKilled, Evicted, ...; empty where nothing says.
        message: what the container left for its end (the trainer's own problems), or what Kubernetes says.
        waiting: why the container does not start: ImagePullBackOff, Unschedulable, ...; empty where it does.
    """

    name: str
    node: int
    uid: str = ""
    started: bool = False
    ended: bool = False
    finished: str = ""
    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    waiting: str = ""


class Backend(Protocol):
    """Runs training jobs."""

    name: str

    def render(self, request: JobRequest) -> list[Manifest]:
        """What will be created, the same for the same request."""

    def create_or_adopt(self, request: JobRequest) -> Job:
        """Starts the job, or takes over the one that is there already and is the same.

        Raises:
            DraftModelError: where there is another job of that name, or the cluster refuses this one.
            Unavailable: when the API server does not answer.
        """

    def state(self, job: Job) -> Status:
        """Where the job is now.

        Raises:
            Unavailable: when the API server does not answer; the job may be well.
        """

    def pods(self, job: Job) -> list[Pod]:
        """The job's pods, by node."""

    def logs(self, job: Job, pod: Pod, since: str) -> Iterator[tuple[str, str]]:
        """Time and text of each line that a pod writes, until its container ends.

        Args:
            job: the job.
            pod: one of its pods, which has started.
            since: time of the last line that is known already; empty for all.
        """

    def delete(self, request: JobRequest) -> None:
        """Deletes the run's job of this attempt and all that belongs to it; that there is none is no error."""
