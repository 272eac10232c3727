"""Processes that run a stranger's chat template and tokenizer, with limits on memory, CPU time and wall time.

The templates run in transformers' Jinja sandbox, which keeps them from files and code, but not from looping or growing.
So they run in processes of their own, forked in milliseconds from a server that has loaded the libraries once; they end
with the process that uses them, also where that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar, cast

from draft_model.errors import DraftModelError

T = TypeVar("T")
Tag = TypeVar("Tag")

MEMORY = 8 << 30
"""Bytes that a process may take."""
SECONDS = 600
"""CPU time of one call; to encode 8 MB of conversations takes some ten seconds."""
WALL_SECONDS = 1200
"""Of one call, which may wait for something that never comes."""
_PRELOADED = [
    "draft_model.dataset.encode", "transformers.modeling_utils", "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.tokenization_llama", "pyarrow.parquet",
]  # fmt: skip


class Workers:
    """Processes for the length of a `with` block.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")  # a fork of this process, with its threads, could hang
        context.set_forkserver_preload(_PRELOADED)
        self._processes = processes
        self._pool = ProcessPoolExecutor(processes, context, _start, (MEMORY,))

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

        Args:
            work: what to call.
            calls: a tag and the arguments of each call; None where nothing is to be called.

        Yields:
            The tags with their results, in order.

        Raises:
            DraftModelError: a call exceeded a limit, or memory is short.
        """
        pending: deque[tuple[Tag, Future[T] | None]] = deque()
        try:
            for tag, arguments in calls:
                submitted = (
                    None if arguments is None else self._pool.submit(_call, (SECONDS, WALL_SECONDS), work, *arguments)
                )
                pending.append((tag, submitted))
                if len(pending) > self._processes + 1:
                    tag, future = pending.popleft()
                    yield tag, future.result() if future else None
            while pending:
                tag, future = pending.popleft()
                yield tag, future.result() if future else None
        except (BrokenProcessPool, MemoryError) as error:
            raise DraftModelError(
                f"one of {self._processes} processes was stopped. Either memory is short: lower build_dataset_num_proc "
                "or give the step more memory. Or the model's chat template or tokenizer does not end: it took "
                f"more than {SECONDS} s of CPU time, {WALL_SECONDS} s in all or {MEMORY >> 30} GiB of memory for some "
                "conversations; check where the model comes from"
            ) from error


def _start(memory: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
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
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
