"""The pods' logs: every line to a file, and to this step's own log as `[rank] line`, not faster than can be read."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Backend, Job, Pod, Unavailable

LINES_PER_SECOND = 20.0
BURST = 200.0
TAIL = 60
_RANK = re.compile(r"\[\d+\] ")
_BAR = re.compile(r"(?:\[\d+\] )?\r")
_AGAIN_SECONDS = 1.0


class Valve:
    """Lets through so many lines a second, and says how many it held back.

    Args:
        show: shows one line.
        clock: seconds, of any origin.
    """

    def __init__(self, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._allowed, self._last, self._held = BURST, clock(), 0
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        """Shows the line, or holds it back."""
        with self._lock:
            now = self._clock()
            self._allowed = min(BURST, self._allowed + (now - self._last) * LINES_PER_SECOND)
            self._last = now
            if self._allowed < 1:
                self._held += 1
                return
            self._tell_held()
            self._allowed -= 1
            self._show(line)

    def close(self) -> None:
        """Says what was held back last."""
        with self._lock:
            self._tell_held()

    def _tell_held(self) -> None:
        if self._held:
            self._show(f"... {self._held} lines are only in the whole log")
            self._held = 0


def prefixed(line: str, node: int) -> str:
    """A pod's line with the rank that wrote it.

    torchrun writes the rank before each line of its processes; what it says itself is the node's. Of a progress bar,
    which rewrites its line, the last state is taken.
    """
    rank = _RANK.match(line)
    text = next((part for part in reversed(_BAR.split(line[rank.end() :] if rank else line)) if part.strip()), "")
    return f"{rank.group() if rank else f'[node {node}] '}{text}"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class LogStreams:
    """The logs of one job's pods, each followed by a thread.

    Args:
        backend: that runs the job.
        job: the job.
        folder: the whole logs go there, a file per pod.
        show: shows one line; standard error, where not given.
    """

    def __init__(self, backend: Backend, job: Job, folder: Path, show: Callable[[str], None] = _to_stderr) -> None:
        self._backend, self._job, self.folder = backend, job, folder
        self._valve = Valve(show)
        self._tails: dict[str, deque[str]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._closed = threading.Event()

    @property
    def tails(self) -> Mapping[str, Sequence[str]]:
        """The last lines of each pod, by its name."""
        return {name: list(tail) for name, tail in self._tails.items()}

    def follow(self, pods: Sequence[Pod]) -> None:
        """Starts to follow the pods that are new."""
        for pod in pods:
            if pod.started and pod.uid not in self._threads:
                self._tails[pod.name] = deque(maxlen=TAIL)
                thread = threading.Thread(target=self._read, args=(pod,), name=f"log of {pod.name}", daemon=True)
                self._threads[pod.uid] = thread
                thread.start()

    def drain(self, seconds: float) -> None:
        """Waits until all logs have come to their ends, which is when their containers have.

        Args:
            seconds: to wait at most.
        """
        deadline = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def finish(self, seconds: float) -> None:
        """Reads the logs to their ends; a log that does not end in time is left.

        Args:
            seconds: to wait at most.
        """
        self.drain(seconds)
        self._closed.set()
        self._valve.close()

    def _read(self, pod: Pod) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        since = ""
        with (self.folder / f"{pod.name}.log").open("a", encoding="utf-8") as file:
            while not self._closed.is_set():
                ended = self._ended(pod)
                try:
                    for moment, line in self._backend.logs(self._job, pod, since):
                        since = moment
                        file.write(line + "\n")
                        self._tails[pod.name].append(line)
                        self._valve(prefixed(line, pod.node))
                    if ended:
                        return
                except (Unavailable, DraftModelError):
                    if ended:
                        return
                file.flush()
                self._closed.wait(_AGAIN_SECONDS)

    def _ended(self, pod: Pod) -> bool:
        """Whether nothing more will be written: asked before reading, so that the last lines are not missed."""
        try:
            now = next((other for other in self._backend.pods(self._job) if other.uid == pod.uid), None)
        except (Unavailable, DraftModelError):
            return False
        return now is None or now.ended
