"""The pods' logs: every line to a file, and to this step's own log as `[rank] line`."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from draft_model.errors import DraftModelError
from draft_model.jobs.cluster import Unavailable
from draft_model.jobs.states import Pod

_TAIL = 60
_RANK = re.compile(r"\[\d+\] ")
_BAR = re.compile(r"(?:\[\d+\] )?\r")
AGAIN_SECONDS = 1.0


def prefixed(line: str, node: int) -> str:
    """A pod's line with the rank that wrote it; of a progress bar, which rewrites its line, the last state.

    torchrun writes the rank before each line of its processes; its own lines get the node's.
    """
    rank = _RANK.match(line)
    text = next((part for part in reversed(_BAR.split(line[rank.end() :] if rank else line)) if part.strip()), "")
    return f"{rank.group() if rank else f'[node {node}] '}{text}"


class LogStreams:
    """The logs of one job's pods, each followed by a thread.

    Args:
        read: gives time and text of a pod's lines after a time, until its container ends.
        folder: for the whole logs, a file per pod.
        show: shows one line.
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

    def drain(self, seconds: float) -> None:
        """Waits until all logs have ended, which they do with their containers."""
        deadline = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def finish(self, seconds: float) -> None:
        """Reads the logs to their ends; a log that does not end in time is left."""
        self.drain(seconds)
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
                self._closed.wait(AGAIN_SECONDS)
