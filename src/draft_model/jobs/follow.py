"""Following one job to its end: its pods' logs, what is waited for, and when waiting is over."""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from draft_model.entrypoint import printable
from draft_model.errors import DraftModelError
from draft_model.jobs.backends import Backend
from draft_model.jobs.cluster import Forbidden, Unavailable
from draft_model.jobs.spec import Job
from draft_model.jobs.states import Failure, Pod, State, Status, classify, never_starts

logger = logging.getLogger(__name__)

QUEUE_SECONDS = 30.0  # by then Kueue has a Workload for every job that it manages
STUCK_SECONDS = 60.0  # an image that a registry refused once may come a moment later
FORBIDDEN_SECONDS = 60.0  # an API server that was just started has read its Roles by then
OPERATOR_SECONDS = 120.0  # by then an operator has written a status
DRAIN_SECONDS = 15.0
CAUSE_SECONDS = 60.0  # a pod whose process was killed ends after its other processes have
POLL_SECONDS = 10  # with a watch: for pods, limits and events, which it does not cover
POLL_ALONE_SECONDS = 2.0  # without one
LOG_SECONDS = 1.0  # between two attempts to read a log
_TAIL = 60
_RANK = re.compile(r"\[\d+\] ")
_BAR = re.compile(r"(?:\[\d+\] )?\r")


def prefixed(line: str, node: int) -> str:
    """A pod's line with the rank that wrote it; of a progress bar, which rewrites its line, the last state.

    torchrun writes the rank before each line of its processes; its own lines get the node's.
    """
    rank = _RANK.match(line)
    text = next((part for part in reversed(_BAR.split(line[rank.end() :] if rank else line)) if part.strip()), "")
    return printable(f"{rank.group() if rank else f'[node {node}] '}{text}")


class LogStreams:
    """The logs of one job's pods, each followed by a thread: to a file, and to this step's own log as `[rank] line`.

    `read` gives time and text of a pod's lines after a time, until its container ends.
    """

    def __init__(
        self,
        read: Callable[[str, str], Iterator[tuple[str, str]]],
        folder: Path,
        show: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._read_log, self.folder, self._show = read, folder, show
        self.tails: dict[str, deque[str]] = {}
        self._pods: dict[str, Pod] = {}  # by uid: a queue that resumes a job makes new pods of the same names
        self._threads: dict[str, threading.Thread] = {}
        self._closed = threading.Event()

    def follow(self, pods: Sequence[Pod]) -> None:
        """Notes where the pods are, and starts to follow those that are new."""
        self._pods = {pod.uid: pod for pod in pods}
        for pod in pods:
            if pod.started and pod.uid not in self._threads:
                self.tails[pod.name] = deque(maxlen=_TAIL)
                thread = threading.Thread(target=self._read, args=(pod,), name=f"log of {pod.name}", daemon=True)
                self._threads[pod.uid] = thread
                thread.start()

    def finish(self, seconds: float, *, close: bool = True) -> None:
        """Waits for the logs' ends, which come with their containers'; closes those that do not end in time."""
        deadline = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        if close:
            self._closed.set()

    def _read(self, pod: Pod) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        since = ""
        with (self.folder / f"{pod.name}.log").open("a", encoding="utf-8") as file:
            while not self._closed.is_set():
                now = self._pods.get(pod.uid)  # before reading, so that the last lines are not missed
                ended = now is None or now.ended
                try:
                    for moment, line in self._read_log(pod.name, since):
                        since = moment
                        file.write(line + "\n")
                        self.tails[pod.name].append(line)
                        self._show(prefixed(line, pod.node))
                except (Unavailable, DraftModelError):
                    pass
                file.flush()
                if ended:
                    return
                self._closed.wait(LOG_SECONDS)


class Follower:
    """Follows one job and the logs of its pods."""

    def __init__(
        self, backend: Backend, job: Job, logs: LogStreams, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backend, self._job, self._logs, self._now = backend, job, logs, clock
        self._name, self._stage = job.name, job.stage
        self._parameters, self._queue = job.parameters, job.compute.queue
        self._started = self._entered = self._last = clock()
        self._state, self._running = State.STARTING, 0.0  # for the limits
        self._shown: tuple[Status, str] = Status(State.STARTING), ""
        self._before = State.STARTING
        self._warned: list[str] = []
        self._stuck_since, self._queue_known, self._watching = math.inf, not self._queue, True

    def follow(self) -> Failure | None:
        """Waits for the job's end, or for the moment from which waiting makes no sense; gives why it failed.

        An API server that does not answer ends nothing: the job goes on without it, and so does the waiting.
        """
        answered, away = -math.inf, False
        while True:
            try:
                ended, failure = self._read()
                if away:
                    logger.info("the API server answers again")
                away, answered = False, self._now()
                if ended:
                    return failure
            except (Unavailable, Forbidden) as error:
                if isinstance(error, Forbidden) and self._now() - answered > FORBIDDEN_SECONDS:
                    raise
                if not away:
                    logger.warning(
                        "the API server does not answer (%s): the job goes on without it; asking again", error
                    )
                away = True
            try:  # an event that is lost costs seconds and nothing else
                self._backend.wait(self._job, POLL_SECONDS)
                self._watching = True
            except (Unavailable, DraftModelError) as error:
                if self._watching:
                    logger.info("no watch now, so the job is read every %.0f s (%s)", POLL_ALONE_SECONDS, error)
                self._watching = False
                time.sleep(POLL_ALONE_SECONDS)

    def _read(self) -> tuple[bool, Failure | None]:
        """Whether the job has ended or cannot go on, and why it failed if it did."""
        status, pods, earlier = self._backend.read(self._job)
        detail = self._log(status, earlier)
        if status.state is State.DELETED:
            again = "run again with resume=true to go on from its newest checkpoint"
            again = again if self._stage == "train" else "run this step again"
            return True, Failure("Deleted", False, [f"{self._name} was deleted while it was {self._before}: {again}"])
        self._logs.follow(pods)
        if status.state is State.SUCCEEDED:
            self._logs.finish(DRAIN_SECONDS)
            return True, None
        if status.state is State.FAILED:
            return True, self._cause(status.detail)
        if status.state is not State.RUNNING:
            for line in self._backend.warnings(self._job):
                if line not in self._warned:
                    self._warned.append(line)
                    logger.warning("%s", line)
        hopeless, late = self._hopeless(status, pods), self._late(status.state, detail, pods)
        return bool(hopeless or late), hopeless or late

    def _late(self, state: State, detail: str, pods: Sequence[Pod]) -> Failure | None:
        """Notes the state; a failure where it lasts longer than the parameter allows that limits it."""
        now = self._now()
        if self._state.limit == "run_limit":
            self._running += now - self._last
        self._last = now
        if state is not self._state:
            self._state, self._entered = state, now
        if not (limit := state.limit):
            return None
        minutes = getattr(self._parameters, limit)
        if (self._running if limit == "run_limit" else now - self._entered) <= 60.0 * minutes:
            return None
        reason = limit.partition("_")[0].capitalize()  # Queue, Start or Run
        if reason == "Start" and any(pod.waiting.startswith("Unschedulable") for pod in pods):
            reason = "Unschedulable"
        problem = (
            f"{limit}: {self._name} exceeded {minutes} minutes ({detail}): raise {limit}, or remove what it waits for"
        )
        waiting = [f"{pod.name}: {pod.waiting}" for pod in pods if pod.waiting]
        return Failure(reason, False, [problem, *waiting, *self._warned[-3:]])

    def _cause(self, detail: str) -> Failure:
        """Why the job failed. A pod that lost its peers may end, and fail the job, before the one that is to blame."""
        pods: list[Pod] = []
        for seconds in (DRAIN_SECONDS, CAUSE_SECONDS):
            deadline = time.monotonic() + seconds
            while not pods or (time.monotonic() < deadline and not all(pod.ended for pod in pods)):
                pods = self._backend.read(self._job)[1] or pods
                self._logs.follow(pods)
                if not pods:
                    break
                time.sleep(LOG_SECONDS)
            self._logs.finish(DRAIN_SECONDS, close=False)
            failure = classify(self._name, self._stage, detail, pods, self._logs.tails)
            if failure.reason != "Collective":
                break
        self._logs.finish(0)
        return failure

    def _log(self, status: Status, earlier: Sequence[str]) -> str:
        """A line for each change of state, and for each other detail while the job starts; gives the detail."""
        detail = status.detail
        if status.state is State.QUEUED and self._queue:
            detail = f"queue {self._queue}: {self._backend.workload(self._job) or 'no word from Kueue yet'}"
        elif status.state is State.STARTING and earlier:
            pods = f"{', '.join(earlier[:3])}{' and more' if len(earlier) > 3 else ''}"
            detail += f"; earlier pods of this run still end and hold their GPUs: {pods}"
        if (status, detail) != self._shown:
            seconds = self._now() - self._started
            logger.info("%s: %s%s (%.0f s)", self._name, status.state, f", {detail}" if detail else "", seconds)
            self._before, self._shown = self._shown[0].state, (status, detail)
        return detail

    def _hopeless(self, status: Status, pods: Sequence[Pod]) -> Failure | None:
        """What no waiting will change: no operator, a queue that nothing manages, a container that cannot start."""
        name, kind, now = self._name, self._backend.kind.kind, self._now()
        if not status.touched and not self._warned and now - self._started >= OPERATOR_SECONDS:
            # The kind's definition is installed, but nothing acts on its objects: no status, no pod, no event.
            return Failure(
                "NoOperator", False,
                [f"training_backend: after {OPERATOR_SECONDS:.0f} s {kind} {name} has no status: the cluster knows the "
                 f"kind {kind}, but its operator does not run: start it, or choose another training_backend"],
            )  # fmt: skip
        if not self._queue_known and now - self._started >= QUEUE_SECONDS:
            if status.state is State.QUEUED and self._backend.workload(self._job) is None:
                return Failure(
                    "UnmanagedQueue", False,
                    [f"queue {self._queue!r} of the compute map: after {QUEUE_SECONDS:.0f} s Kueue has no Workload for "
                     f"{name}, so it would wait for ever: have Kueue manage {kind} (`integrations.frameworks`; not by "
                     "default since 0.19) and make the LocalQueue, or use a compute without a queue"],
                )  # fmt: skip
            self._queue_known = True
        failure = never_starts(pods)
        self._stuck_since = min(self._stuck_since, now) if failure else math.inf
        return failure if now - self._stuck_since >= STUCK_SECONDS else None
