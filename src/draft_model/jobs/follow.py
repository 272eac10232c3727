"""Following one job to its end: what is shown, what is waited for, and when waiting is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from draft_model.jobs.backend import Forbidden, Job, Pod, Unavailable
from draft_model.jobs.failures import Failure, classify, limit_exceeded, never_starts
from draft_model.jobs.kubernetes import KubernetesBackend
from draft_model.jobs.logs import LogStreams
from draft_model.jobs.states import Clock, State, Status

logger = logging.getLogger(__name__)

QUEUE_SECONDS = 30.0  # by then Kueue has a Workload for every job that it manages
STUCK_SECONDS = 60.0  # an image that a registry refused once may come a moment later
FORBIDDEN_SECONDS = 60.0  # an API server that was started anew has read its Roles by then
DRAIN_SECONDS = 15.0
CAUSE_SECONDS = 60.0  # a pod whose process was killed ends after its other processes have


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        state: SUCCEEDED, FAILED or DELETED.
        failure: why, unless it succeeded.
    """

    state: State
    failure: Failure | None = None


class Follower:
    """Follows one job.

    Args:
        backend: that runs it.
        job: the job.
        logs: of its pods.
        clock: seconds, of any origin.
    """

    def __init__(
        self, backend: KubernetesBackend, job: Job, logs: LogStreams, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backend, self._job, self._logs, self._now = backend, job, logs, clock
        self._started = clock()
        self._clock = Clock(job.request.config.parameters, self._started)
        self._shown: Status | None = None
        self._warned: list[str] = []
        self._away = False
        self._seen: float | None = None
        self._stuck_since: float | None = None
        self._queue_known = not job.request.compute.queue

    def follow(self) -> Outcome:
        """Waits for the job's end, or for the moment from which waiting makes no sense.

        An API server that does not answer ends nothing: the job goes on without it, and so does the waiting.
        """
        with self._backend.changes(self._job) as changes:
            while True:
                try:
                    outcome = self._look()
                    self._say_away(None)
                    self._seen = self._now()
                except Forbidden as error:
                    if self._seen is None or self._now() - self._seen > FORBIDDEN_SECONDS:
                        raise
                    self._say_away(error)
                    outcome = None
                except Unavailable as error:
                    self._say_away(error)
                    outcome = None
                if outcome is not None:
                    return outcome
                changes.wait()

    def _look(self) -> Outcome | None:
        job, parameters = self._job, self._job.request.config.parameters
        status = self._backend.state(job)
        self._show(status)
        if status.state is State.DELETED:
            problem = (
                f"{job.name} was deleted while it was {self._before}: run again with resume=true to go on from its "
            )
            return Outcome(status.state, Failure("Deleted", False, [problem + "newest checkpoint"]))
        pods = self._backend.pods(job)
        self._logs.follow(pods)
        if status.state is State.SUCCEEDED:
            self._logs.finish(DRAIN_SECONDS)
            return Outcome(status.state)
        if status.state is not State.RUNNING:
            self._show_warnings()
        if status.state is State.FAILED:
            return Outcome(status.state, self._cause(status.detail))
        failure = self._unmanaged(status) or self._stuck(pods)
        if limit := self._clock.enter(status.state, self._now()):
            minutes = getattr(parameters, limit)
            failure = failure or limit_exceeded(job.name, limit, minutes, self._detail(status), pods, self._warned)
        return Outcome(State.FAILED, failure) if failure else None

    def _cause(self, detail: str) -> Failure:
        """Why the job failed. A pod that lost its peers may end, and fail the job, before the one that is to blame."""
        self._logs.drain(DRAIN_SECONDS)
        if (failure := self._classified(detail)).reason == "Collective":
            self._logs.drain(CAUSE_SECONDS)
            failure = self._classified(detail)
        self._logs.finish(0)
        return failure

    def _classified(self, detail: str) -> Failure:
        return classify(self._job.name, detail, self._backend.pods(self._job), self._logs.tails)

    def _show(self, status: Status) -> None:
        """A line for each change of state, and for each other detail while the job starts."""
        if self._shown is None or status != self._shown:
            detail = self._detail(status)
            seconds = self._now() - self._started
            logger.info("%s: %s%s (%.0f s)", self._job.name, status.state, f", {detail}" if detail else "", seconds)
            self._before = self._shown.state if self._shown else State.STARTING
            self._shown = status

    def _detail(self, status: Status) -> str:
        if status.state is State.QUEUED and self._job.request.compute.queue:
            said = self._backend.workload(self._job)
            return f"queue {self._job.request.compute.queue}: {said or 'no word from Kueue yet'}"
        return status.detail

    def _show_warnings(self) -> None:
        for line in self._backend.warnings(self._job):
            if line not in self._warned:
                self._warned.append(line)
                logger.warning("%s", line)

    def _unmanaged(self, status: Status) -> Failure | None:
        """A queue was asked for and nobody manages it: the job would wait for ever."""
        if self._queue_known or self._now() - self._started < QUEUE_SECONDS:
            return None
        self._queue_known = True
        if status.state is not State.QUEUED or self._backend.workload(self._job) is not None:
            return None
        queue, kind = self._job.request.compute.queue, self._backend.kind.kind
        return Failure(
            "UnmanagedQueue", False,
            [f"queue {queue!r} of the compute map: after {QUEUE_SECONDS:.0f} s Kueue has no Workload for "
             f"{self._job.name}, so it would wait for ever: have Kueue manage {kind} (`integrations.frameworks`; not "
             "by default since 0.19) and make the LocalQueue, or use a compute without a queue"],
        )  # fmt: skip

    def _stuck(self, pods: list[Pod]) -> Failure | None:
        failure = never_starts(pods)
        if failure is None:
            self._stuck_since = None
            return None
        self._stuck_since = self._now() if self._stuck_since is None else self._stuck_since
        return failure if self._now() - self._stuck_since >= STUCK_SECONDS else None

    def _say_away(self, error: Exception | None) -> None:
        if error and not self._away:
            logger.warning("the API server does not answer (%s): the job goes on without it; asking again", error)
        if self._away and not error:
            logger.info("the API server answers again")
        self._away = error is not None
