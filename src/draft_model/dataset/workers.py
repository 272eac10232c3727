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
from types import TracebackType
from typing import Any, TypeVar

from draft_model.dataset.encode import Encoder
from draft_model.dataset.tally import count
from draft_model.dataset.tokens import write_shard
from draft_model.errors import DraftModelError

log = logging.getLogger(__name__)
Tag = TypeVar("Tag")

BYTES_PER_PROCESS = 16 << 20
_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no orphan after kill -9


def _encode_file(path: Path, shard: Path) -> dict[str, Any]:
    assert _encoder is not None
    piece = path.read_bytes()
    path.unlink()
    return encode_piece(_encoder, piece, shard)


def encode_piece(encoder: Encoder, piece: bytes, shard: Path) -> dict[str, Any]:
    """Encodes the lines of a piece into a shard, which is not made without rows.

    Returns:
        The counts, as `Tally.add` takes them.
    """
    lines = piece.split(b"\n")
    rows = encoder.encode([(number, line) for number, line in enumerate(lines, start=1) if line.strip()])
    if len(rows.lengths):
        write_shard(rows, shard)
    return count(rows)


class Workers:
    """Encodes pieces on several processes, or in this one where the input is small; a context manager.

    Args:
        encoder: sent to the processes as it is: loading the tokenizer anew takes seconds.
        wanted: parameter build_dataset_num_proc; lowered to the cores and the input's size.
        size: bytes of all input files. A process takes a second to start.
    """

    def __init__(self, encoder: Encoder, wanted: int, size: int) -> None:
        cores = _cores()
        self._processes = max(1, min(wanted, cores, size // BYTES_PER_PROCESS))
        if self._processes < wanted:
            log.info("build_dataset_num_proc: %d lowered to %d (%d cores, %.1f MB of input)",
                     wanted, self._processes, cores, size / 1e6)  # fmt: skip
        self._encoder = encoder
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._processes > 1:
            # spawn: a fork after the tokenizer's threads have run can hang
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, spawn, _start, (self._encoder,))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, jobs: Iterable[tuple[Tag, tuple[bytes, Path] | None, Any]]) -> Iterator[tuple[Tag, Any]]:
        """Runs jobs and yields their counts in order.

        Args:
            jobs: a tag to yield with the result; piece and shard to write, or None with a result that is known.

        Raises:
            DraftModelError: a process died, as it does where memory is short.
        """
        from tqdm import tqdm

        pending: deque[tuple[Tag, Future[Any]]] = deque()

        def finish() -> tuple[Tag, Any]:
            tag, future = pending.popleft()
            try:
                counts = future.result()
            except BrokenProcessPool as error:
                raise DraftModelError(
                    f"build_dataset_num_proc: one of {self._processes} processes died, most likely for lack of "
                    "memory; lower it, or give the step more memory"
                ) from error
            if isinstance(counts, dict):
                bar.update(sum(counts["lengths"][1]) + len(counts["rejected"]))
            return tag, counts

        with tqdm(desc="dataset", unit=" rows", unit_scale=True, mininterval=0.1 if os.isatty(2) else 10) as bar:
            for tag, piece, known in jobs:
                pending.append((tag, self._submit(*piece) if piece else _done(known)))
                if len(pending) > self._processes + 1 or not self._pool:
                    yield finish()
            while pending:
                yield finish()

    def _submit(self, piece: bytes, shard: Path) -> Future[Any]:
        if not self._pool:
            return _done(encode_piece(self._encoder, piece, shard))
        path = shard.with_suffix(".jsonl")  # not through the pool's pipe, whose waiting jobs stay in memory
        path.write_bytes(piece)
        return self._pool.submit(_encode_file, path, shard)


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a pod's CPU limit is not in its affinity
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
