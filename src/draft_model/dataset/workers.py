"""Processes that encode pieces into shards, in order and only a few ahead, so that memory stays flat."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from draft_model.dataset.encode import Encoder
from draft_model.dataset.tally import count
from draft_model.dataset.tokens import write_shard
from draft_model.errors import DraftModelError

log = logging.getLogger(__name__)
Tag = TypeVar("Tag")

BYTES_PER_PROCESS = 8 << 20
_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # also where it was killed with -9
    os._exit(1)


def _encode(path: Path, encoder: Encoder | None = None) -> dict[str, Any]:
    """Encodes the lines of a file, and removes it; returns the counts. Without rows there is no shard."""
    encoder = encoder or _encoder
    assert encoder is not None
    lines = path.read_bytes().split(b"\n")
    path.unlink()
    rows = encoder.encode([(number, line) for number, line in enumerate(lines, start=1) if line.strip()])
    if len(rows.lengths):
        write_shard(rows, path.with_suffix(".parquet"))
    return count(rows)


def usable_processes(wanted: int, size: int) -> int:
    """Lowers build_dataset_num_proc to the cores and the bytes of all input: a process takes a second to start."""
    cores = _cores()
    processes = max(1, min(wanted, cores, size // BYTES_PER_PROCESS))
    if processes < wanted:
        text = "build_dataset_num_proc: %d lowered to %d (%d cores, %.1f MB of input)"
        log.info(text, wanted, processes, cores, size / 1e6)
    return processes


def encode_files(
    encoder: Encoder, processes: int, jobs: Iterable[tuple[Tag, Path | None]]
) -> Iterator[tuple[Tag, dict[str, Any] | None]]:
    """Encodes files of lines to shards beside them (`.parquet`), on several processes, or in this one if it is one.

    Args:
        encoder: sent to the processes as it is: loading the tokenizer anew takes seconds.
        processes: how many.
        jobs: what to yield with each result, and the file; None where nothing is to be done.

    Yields:
        The counts of each in order, as `Tally.add` takes them.

    Raises:
        DraftModelError: a process died, as it does where memory is short.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork after the tokenizer's threads have run can hang
    pool = ProcessPoolExecutor(processes, spawn, _start, (encoder,)) if processes > 1 else None
    pending: deque[tuple[Tag, Future[dict[str, Any]] | None]] = deque()
    try:
        for tag, path in jobs:
            if not pool:
                yield tag, _encode(path, encoder) if path else None
                continue
            pending.append((tag, pool.submit(_encode, path) if path else None))
            if len(pending) > processes + 1:
                yield _finish(*pending.popleft())
        while pending:
            yield _finish(*pending.popleft())
    except BrokenProcessPool as error:
        raise DraftModelError(
            f"build_dataset_num_proc: one of {processes} processes died, most likely for lack of memory; lower it, or "
            "give the step more memory"
        ) from error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _finish(tag: Tag, future: Future[dict[str, Any]] | None) -> tuple[Tag, dict[str, Any] | None]:
    return tag, future.result() if future else None


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a pod's CPU limit is not in its affinity
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
