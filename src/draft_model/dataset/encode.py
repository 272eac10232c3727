"""Conversations become token ids and loss masks, on as many processes as there are cores.

A conversation is tokenised in pieces, prompt and answer by turns: a prompt ends with its header, so no token may span
that border (a header's newline and the answer's first one would), and the mask needs no offsets. Every other border is
at a control token, where a tokenizer cuts anyway.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.reader import Line, Rejected, Row, parse
from draft_model.dataset.render import Renderer
from draft_model.dataset.templates import TEMPLATES, Span
from draft_model.dataset.words import WordTokenizer
from draft_model.errors import DraftModelError

log = logging.getLogger(__name__)
Tag = TypeVar("Tag")


@dataclass(frozen=True)
class EncoderSettings:
    """All that shapes an encoder.

    Attributes:
        tokenizer: folder with the target's tokenizer files and config.json.
        chat_template: one of the four names.
        max_length: tokens that are kept of a conversation.
        vocab_size: rows of the target's embedding; every id is below.
    """

    tokenizer: Path
    chat_template: str
    max_length: int
    vocab_size: int


@dataclass
class Encoded:
    """What becomes of one chunk of lines: the kept rows laid end to end, and the rejected ones.

    Attributes:
        ids: token ids of all rows, int32 [tokens].
        mask: whether each token is supervised, bool [tokens].
        lengths: tokens of each row, int64 [rows].
        numbers: each row's line number, int64 [rows].
        turns: assistant turns of each row, int64 [rows].
        truncated: rows that were longer than max_length.
        rejected: line number, reason and detail of each unusable line, in order.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    numbers: NDArray[np.int64]
    turns: NDArray[np.int64]
    truncated: int = 0
    rejected: list[tuple[int, str, str]] = field(default_factory=list)


def load_tokenizer(folder: Path) -> Any:
    """Loads the target's fast tokenizer; never runs code that came with the model.

    Raises:
        DraftModelError: the folder has no tokenizer that transformers can load without running the model's
            code.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever the files happen to break
        raise DraftModelError(f"model: its tokenizer cannot be loaded from {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise DraftModelError(
            f"model: its tokenizer in {folder} has no fast form; save the model with a tokenizer.json"
        )
    tokenizer.model_max_length = 1 << 60  # what is too long is cut and counted here, not warned about
    return tokenizer


class Encoder:
    """Turns lines into tokens and masks with one tokenizer.

    Args:
        settings: what shapes the result.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.template = TEMPLATES[settings.chat_template]
        self.renderer = Renderer(self.tokenizer, self.template)
        self._words = WordTokenizer(self.tokenizer.backend_tokenizer)

    def encode(self, lines: Sequence[Line]) -> Encoded:
        """Encodes one chunk; a line that cannot be used is put aside with its reason."""
        rejected: list[tuple[int, str, str]] = []
        rendered: list[_Rendered] = []
        for number, line in lines:
            try:
                rendered.append(self._render(number, parse(line)))
            except Rejected as refusal:
                rejected.append((number, refusal.reason, refusal.detail))
        kept: list[tuple[_Rendered, NDArray[np.int32], NDArray[np.bool_]]] = []
        truncated = 0
        for row, (ids, mask, is_cut) in zip(rendered, self._tokenise(rendered), strict=True):
            try:
                self._check(ids, mask)
            except Rejected as refusal:
                rejected.append((row.number, refusal.reason, refusal.detail))
                continue
            truncated += is_cut
            kept.append((row, ids, mask))
        return Encoded(
            ids=np.concatenate([ids for _, ids, _ in kept] or [np.zeros(0, np.int32)]),
            mask=np.concatenate([mask for _, _, mask in kept] or [np.zeros(0, np.bool_)]),
            lengths=np.array([len(ids) for _, ids, _ in kept], np.int64),
            numbers=np.array([row.number for row, _, _ in kept], np.int64),
            turns=np.array([len(row.borders) // 2 for row, _, _ in kept], np.int64),
            truncated=truncated,
            rejected=sorted(rejected),
        )

    def _render(self, number: int, row: Row) -> _Rendered:
        text, spans = self.renderer.render(row)
        cut = itertools.chain(row.cut, itertools.repeat(False))
        borders = [border for span, is_cut in zip(spans, cut, strict=False) for border in _supervised(span, is_cut)]
        return _Rendered(number, text, borders)

    def _tokenise(self, rendered: Sequence[_Rendered]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], bool]]:
        """Ids and mask of each conversation, no longer than max_length, and whether it was longer."""
        length = self.settings.max_length
        limit = _CHARACTERS_PER_TOKEN * length
        pieces = [row.pieces(limit) for row in rendered]
        encoded = iter(self._words.encode([piece for row in pieces for piece in row]))
        for row, its_pieces in zip(rendered, pieces, strict=True):
            ids = [next(encoded) for _ in its_pieces]
            longer = limit
            while sum(map(len, ids)) < length and longer < len(row.text):  # few tokens of many characters
                longer *= 4
                ids = self._words.encode(row.pieces(longer))
            yield *_joined(ids, length), sum(map(len, ids)) > length or row.end(longer) < len(row.text)

    def _check(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> None:
        if len(ids) and ids.max() >= self.settings.vocab_size:
            raise Rejected(
                "token outside the vocabulary",
                f"token id {ids.max()}; the target's embedding has {self.settings.vocab_size} rows",
            )
        if not mask.any():
            raise Rejected(
                "nothing supervised",
                f"no token of an assistant turn among the first {len(ids)}; max_length keeps "
                f"{self.settings.max_length}",
            )


# Of a conversation that is longer, the rest is not tokenised to be thrown away.
_CHARACTERS_PER_TOKEN = 8
_BEFORE_SPACE = re.compile(r"(?<=\S) ")


@dataclass(frozen=True)
class _Rendered:
    """A conversation's text; `borders` are where supervision begins and ends, in characters, by turns."""

    number: int
    text: str
    borders: list[int]

    def end(self, limit: int) -> int:
        """Where to stop so that about `limit` characters are left: before a space, for no token spans that border."""
        if len(self.text) <= limit:
            return len(self.text)
        found = _BEFORE_SPACE.search(self.text, limit)
        return found.start() if found else len(self.text)

    def pieces(self, limit: int) -> list[str]:
        """The text in pieces, which alternate; the first is before any answer."""
        end = self.end(limit)
        borders = [0, *(border for border in self.borders if border < end), end]
        return [self.text[start:stop] for start, stop in itertools.pairwise(borders)]


def _supervised(span: Span, is_cut: bool) -> tuple[int, int]:
    return span.start, span.end if is_cut else span.close


def _joined(pieces: Sequence[Sequence[int]], length: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The first tokens of alternating pieces, and which of them are supervised."""
    sizes = [len(piece) for piece in pieces]
    ids = np.fromiter(
        itertools.islice(itertools.chain.from_iterable(pieces), length), np.int32, min(sum(sizes), length)
    )
    supervised = np.arange(len(pieces)) % 2 == 1
    mask: NDArray[np.bool_] = np.repeat(supervised, sizes)[:length]
    return ids, mask


_AHEAD = 16
"""Chunks that may be done before their turn: so many are encoded here while other processes start."""

_worker: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = encoder


def _encode_in_worker(lines: Sequence[Line]) -> Encoded:
    assert _worker is not None
    return _worker.encode(lines)


class Encoders:
    """Encodes chunks in order, in this process or on several; a context manager.

    Args:
        encoder: is sent to the others as it is: to load the tokenizer anew would take each of them three seconds, and
            300 MB of modules that encoding does not need.
        processes: how many, this one among them: it encodes whenever the others have enough to do.
    """

    def __init__(self, encoder: Encoder, processes: int) -> None:
        self._encoder = encoder
        self._others = processes - 1
        self._pool: ProcessPoolExecutor | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Encoders:
        if self._others:
            # spawn: a fork after the tokenizer's threads have run can hang.
            self._pool = ProcessPoolExecutor(
                self._others, multiprocessing.get_context("spawn"), _start_worker, (self._encoder,)
            )
            self._exit.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def map(self, chunks: Iterable[tuple[Tag, Sequence[Line]]]) -> Iterator[tuple[Tag, Encoded]]:
        """Encodes the chunks in order, ahead by a few at most, so that memory does not grow with the file.

        Args:
            chunks: each with whatever is to come back beside its result.

        Raises:
            DraftModelError: a process died, as it does where memory is short.
        """
        if self._pool is None:
            yield from ((tag, self._encoder.encode(lines)) for tag, lines in chunks)
            return
        pending: deque[tuple[Tag, Future[Encoded]]] = deque()
        try:
            for tag, lines in chunks:
                pending.append((tag, self._start(lines, sum(not future.done() for _, future in pending))))
                while pending and (pending[0][1].done() or len(pending) > 2 * self._others + _AHEAD):
                    tag, encoded = pending.popleft()
                    yield tag, encoded.result()
            while pending:
                tag, encoded = pending.popleft()
                yield tag, encoded.result()
        except BrokenProcessPool as error:
            raise DraftModelError(
                f"build_dataset_num_proc: one of {self._others + 1} processes died, most likely for lack of "
                "memory; lower it, or give the step more memory"
            ) from error

    def _start(self, lines: Sequence[Line], waiting: int) -> Future[Encoded]:
        if self._pool is not None and waiting < 2 * self._others:
            return self._pool.submit(_encode_in_worker, lines)
        done: Future[Encoded] = Future()
        done.set_result(self._encoder.encode(lines))
        return done


def usable_processes(wanted: int, size: int) -> int:
    """How many processes to build on.

    Args:
        wanted: parameter build_dataset_num_proc.
        size: bytes of all input files; a process takes a second to start, so small inputs get fewer.
    """
    cores = _cores()
    processes = max(1, min(wanted, cores, size // BYTES_PER_PROCESS))
    if processes < wanted:
        log.info("build_dataset_num_proc: %d lowered to %d (%d cores, %.1f MB of input)",
                 wanted, processes, cores, size / 1e6)  # fmt: skip
    return processes


BYTES_PER_PROCESS = 8 << 20
"""What a process encodes in twice the time that it takes to start (benchmarks/README.md)."""


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a pod's CPU limit is not in its affinity
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
