"""Following one job to its end: its pods' logs, what is waited for, and when waiting is over."""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from draft_model.entrypoint import printable
from draft_model.errors import DraftModelError
from draft_model.jobs.backends import Backend
from draft_model.jobs.cluster import patiently
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
    """The logs of one job's pods, each followed by a thread: to a file, and to this step's own log as `[rank] line`."""

    def __init__(self, backend: Backend, folder: Path) -> None:
        self._backend, self.folder = backend, folder
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
        since, ended = "", False
        with (self.folder / f"{pod.name}.log").open("a", encoding="utf-8") as file:
            while not (ended or self._closed.is_set()):
                now = self._pods.get(pod.uid)  # before reading, so that the last lines are not missed
                ended = now is None or now.ended
                try:
                    for moment, line in self._backend.cluster.log(pod.name, self._backend.container, since):
                        since = moment
                        file.write(line + "\n")
                        self.tails[pod.name].append(line)
                        print(prefixed(line, pod.node), file=sys.stderr, flush=True)
                except DraftModelError:
                    pass
                file.flush()
                self._closed.wait(0.0 if ended else LOG_SECONDS)


class Follower:
    """Follows one job and the logs of its pods."""

    def __init__(
        self, backend: Backend, job: Job, logs: LogStreams, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backend, self._job, self._logs, self._now = backend, job, logs, clock
        self._started = self._entered = self._last = clock()
        self._state, self._running = State.STARTING, 0.0  # for the limits
        self._shown: tuple[Status, str] = Status(State.STARTING), ""
        self._warned: list[str] = []
        self._stuck_since, self._managed = math.inf, not job.compute.queue

    def follow(self) -> Failure | None:
        """Waits for the job's end, or for the moment from which waiting makes no sense; gives why it failed.

        An API server that does not answer ends nothing: the job goes on without it, and so does the waiting.
        """
        watching = True
        while True:
            ended, failure = patiently(self._read, math.inf, FORBIDDEN_SECONDS, self._now)
            if ended:
                return failure
            try:  # an event that is lost costs seconds and nothing else
                self._backend.wait(self._job, POLL_SECONDS)
                watching = True
            except DraftModelError as error:
                if watching:
                    logger.info("no watch now, so the job is read every %.0f s (%s)", POLL_ALONE_SECONDS, error)
                watching = False
                time.sleep(POLL_ALONE_SECONDS)

    def _read(self) -> tuple[bool, Failure | None]:
        """Whether the job has ended or cannot go on, and why it failed if it did."""
        status, pods, earlier = self._backend.read(self._job)
        name, state, detail, queue = self._job.name, status.state, status.detail, self._job.compute.queue
        said: str | None = ""
        if state is State.QUEUED and queue:
            said = self._backend.workload(self._job)
            detail = f"queue {queue}: {said or 'no word from Kueue yet'}"
        elif state is State.STARTING and earlier:
            names = f"{', '.join(earlier[:3])}{' and more' if len(earlier) > 3 else ''}"
            detail += f"; earlier pods of this run still end and hold their GPUs: {names}"
        if (status, detail) != self._shown:  # of each change, and of each other detail
            self._shown = status, detail
            after = self._now() - self._started
            logger.info("%s: %s%s (%.0f s)", name, state, f", {detail}" if detail else "", after)
        if state is State.DELETED:
            again = "run this step again"
            if self._job.stage == "train":
                again = "run again with resume=true to go on from its newest checkpoint"
            return True, Failure("Deleted", False, [f"{name} was deleted while it was {self._state}: {again}"])
        self._logs.follow(pods)
        if state is State.SUCCEEDED:
            self._logs.finish(DRAIN_SECONDS)
            return True, None
        if state is State.FAILED:
            return True, self._cause(detail)
        if state is not State.RUNNING:
            for event in self._backend.cluster.warnings():
                about = event.get("involvedObject", {}).get("name", "")
                line = f"{about}: {event.get('reason', '')}: {event.get('message', '')}"
                if (about == name or about.startswith(f"{name}-")) and line not in self._warned:
                    self._warned.append(line)
                    logger.warning("%s", line)
        self._managed |= said is not None
        hopeless, late = self._hopeless(status, pods), self._late(state, detail, pods)
        return bool(hopeless or late), hopeless or late

    def _late(self, state: State, detail: str, pods: Sequence[Pod]) -> Failure | None:
        """Notes the state; a failure where it lasts longer than the parameter allows that limits it."""
        now, limit = self._now(), state.limit
        if self._state.limit == "run_limit":
            self._running += now - self._last
        self._last = now
        if state is not self._state:
            self._state, self._entered = state, now
        minutes = getattr(self._job.parameters, limit)
        if (self._running if limit == "run_limit" else now - self._entered) <= 60.0 * minutes:
            return None
        reason = limit.partition("_")[0].capitalize()  # Queue, Start or Run
        if reason == "Start" and any(pod.waiting.startswith("Unschedulable") for pod in pods):
            reason = "Unschedulable"
        problem = f"{limit}: {self._job.name} exceeded {minutes} minutes ({detail}): raise {limit}, or remove what it "
        waiting = [f"{pod.name}: {pod.waiting}" for pod in pods if pod.waiting]
        return Failure(reason, False, [f"{problem}waits for", *waiting, *self._warned[-3:]])

    def _cause(self, detail: str) -> Failure:
        """Why the job failed. A pod that lost its peers may end, and fail the job, before the one that is to blame."""
        pods: list[Pod] = []
        for seconds in (DRAIN_SECONDS, CAUSE_SECONDS):
            deadline = time.monotonic() + seconds
            while True:
                self._logs.follow(pods := self._backend.read(self._job)[1] or pods)
                if time.monotonic() > deadline or all(pod.ended for pod in pods):
                    break
                time.sleep(LOG_SECONDS)
            self._logs.finish(DRAIN_SECONDS, close=False)
            failure = classify(self._job.name, self._job.stage, detail, pods, self._logs.tails)
            if failure.reason != "Collective":
                break
        self._logs.finish(0)
        return failure

    def _hopeless(self, status: Status, pods: Sequence[Pod]) -> Failure | None:
        """What no waiting will change: no operator, a queue that nothing manages, a container that cannot start."""
        name, kind, now = self._job.name, self._backend.kind.kind, self._now()
        if not status.touched and not self._warned and now - self._started >= OPERATOR_SECONDS:
            # The kind's definition is installed, but nothing acts on its objects: no status, no pod, no event.
            return Failure(
                "NoOperator", False,
                [f"training_backend: after {OPERATOR_SECONDS:.0f} s {kind} {name} has no status: the cluster knows the "
                 f"kind {kind}, but its operator does not run: start it, or choose another training_backend"],
            )  # fmt: skip
        if not self._managed and now - self._started >= QUEUE_SECONDS:
            return Failure(
                "UnmanagedQueue", False,
                [f"queue {self._job.compute.queue!r} of the compute map: after {QUEUE_SECONDS:.0f} s Kueue has no "
                 f"Workload for {name}, so it would wait for ever: have Kueue manage {kind} (`integrations.frameworks`;"
                 " not by default since 0.19) and make the LocalQueue, or use a compute without a queue"],
            )  # fmt: skip
        failure = never_starts(pods)
        self._stuck_since = min(self._stuck_since, now) if failure else math.inf
        return failure if now - self._stuck_since >= STUCK_SECONDS else None
