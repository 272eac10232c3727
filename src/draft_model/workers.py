"""Processes that read a stranger's files, with limits on memory, CPU time and wall time.

A chat template runs in transformers' Jinja sandbox and a pickle as `weights_only`, which keeps them from files and
code, but not from looping or growing. So they are read in processes without keys in their environment, forked in
milliseconds from a server that has loaded the libraries once; they end with the process that uses them, also where that
is killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import resource
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.forkserver import ensure_running
from typing import Any, NamedTuple, TypeVar, cast

from draft_model.errors import DraftModelError

T = TypeVar("T")
Tag = TypeVar("Tag")

_SECRET = re.compile(r"^(AWS_|HF_|MLFLOW_|KFP_)|TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY")
_PRELOADED = ["draft_model.preloaded"]


class Limits(NamedTuple):
    """What a process may take."""

    memory: int = 8 << 30  # bytes
    cpu: float = 600  # seconds of one call; to encode 8 MB of conversations takes some ten
    wall: float = 1200  # seconds of one call, which may wait for something that never comes


_starting = threading.Lock()  # the environment is the whole process's
LIMITS = Limits()  # of processes that render and tokenise conversations
STOPPED = (
    "one of {processes} processes was stopped. Either memory is short: lower build_dataset_num_proc or give the step "
    "more memory. Or the model's chat template or tokenizer does not end: it took more than {cpu} s of CPU time, "
    "{wall} s in all or {memory} GiB of memory for some conversations; check where the model comes from"
)


class Workers:
    """Processes for the length of a `with` block; `stopped` is the sentence where one was stopped, limits in braces."""

    def __init__(self, processes: int = 1, limits: Limits | None = None, stopped: str = STOPPED) -> None:
        context = multiprocessing.get_context("forkserver")  # a fork of this process, with its threads, could hang
        context.set_forkserver_preload(_PRELOADED)
        with _starting:
            _start_server()
        self._processes, self._limits, self._stopped = processes, limits or LIMITS, stopped
        self._pool = ProcessPoolExecutor(processes, context, _start, (self._limits.memory,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # whoever stops the run does not wait for a call to end
            for process in (self._pool._processes or {}).values():  # kill_workers() from Python 3.14 on
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Calls a function in one of the processes."""
        ((_, result),) = self.map(work, [(None, arguments)])
        return cast(T, result)

    def map(
        self, work: Callable[..., T], calls: Iterable[tuple[Tag, tuple[Any, ...] | None]]
    ) -> Iterator[tuple[Tag, T | None]]:
        """Calls a function many times, only a few calls ahead, so that memory stays flat.

        `calls` are tags with arguments, None where nothing is to be called. Yields the tags with results, in order.
        """
        pending: deque[tuple[Tag, Callable[[], T | None]]] = deque()
        seconds = self._limits.cpu, self._limits.wall
        try:
            for tag, arguments in calls:
                future = None if arguments is None else self._pool.submit(_call, seconds, work, *arguments)
                pending.append((tag, future.result if future else lambda: None))
                if len(pending) > self._processes + 1:
                    tag, result = pending.popleft()
                    yield tag, result()
            for tag, result in pending:
                yield tag, result()
        except (BrokenProcessPool, MemoryError) as error:
            limits = self._limits._replace(memory=self._limits.memory >> 30)._asdict()
            raise DraftModelError(self._stopped.format(processes=self._processes, **limits)) from error


@functools.cache
def _start_server() -> None:
    """Starts the server without keys, which its children could read, and without a way to the Hub."""
    before = dict(os.environ)
    try:
        for name in filter(_SECRET.search, before):
            del os.environ[name]
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        ensure_running()
    finally:
        for name in os.environ.keys() - before:
            del os.environ[name]
        os.environ |= before


def _start(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # also where it was killed with -9
    os._exit(1)


def _call(seconds: tuple[float, float], work: Callable[..., T], *arguments: Any) -> T:
    timers = (signal.ITIMER_PROF, signal.ITIMER_REAL)  # each ends the process, native code too
    for timer, limit in zip(timers, seconds, strict=True):
        signal.setitimer(timer, limit)
    try:
        return work(*arguments)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # PyTorch has no type of its own for it
            raise MemoryError from error
        raise
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
