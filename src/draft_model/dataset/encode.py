"""Conversations become token ids and loss masks, on as many processes as there are cores.

The rendered text is tokenised once, as an engine does, and the characters of the assistant's turns are mapped
to tokens by offsets. Where one token would span a turn's border (a header's newline and the answer's first
one), that conversation is tokenised piece by piece instead: a prompt ends with its header, so that is where
generation begins.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.reader import Line, Rejected, Turn, parse
from draft_model.dataset.templates import TEMPLATES, Span, render, template_text
from draft_model.errors import DraftModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderSettings:
    """All that shapes an encoder; small, so that it can be sent to another process.

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
        truncated: rows that were longer than max_length.
        rejected: line number, reason and detail of each unusable line, in order.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    numbers: NDArray[np.int64]
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
            f"model: its tokenizer in {folder} has no fast form, which maps tokens to characters; "
            "save the model with a tokenizer.json"
        )
    # With no special tokens to add, all that a post-processor does is to trim white space off the offsets.
    tokenizer.backend_tokenizer.post_processor = None
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
        self.jinja = template_text(self.tokenizer, self.template)

    def encode(self, lines: Sequence[Line]) -> Encoded:
        """Encodes one chunk; a line that cannot be used is put aside with its reason."""
        rejected: list[tuple[int, str, str]] = []
        rendered: list[tuple[int, str, list[tuple[int, int]]]] = []
        for number, line in lines:
            try:
                rendered.append((number, *self._render(parse(line))))
            except Rejected as refusal:
                rejected.append((number, refusal.reason, refusal.detail))
        kept: list[tuple[int, NDArray[np.int32], NDArray[np.bool_]]] = []
        truncated = 0
        for (number, _, _), (ids, mask) in zip(rendered, self._tokenise(rendered), strict=True):
            try:
                self._check(ids, mask)
            except Rejected as refusal:
                rejected.append((number, refusal.reason, refusal.detail))
                continue
            truncated += len(ids) > self.settings.max_length
            kept.append((number, ids[: self.settings.max_length], mask[: self.settings.max_length]))
        return Encoded(
            ids=np.concatenate([ids for _, ids, _ in kept] or [np.zeros(0, np.int32)]),
            mask=np.concatenate([mask for _, _, mask in kept] or [np.zeros(0, np.bool_)]),
            lengths=np.array([len(ids) for _, ids, _ in kept], np.int64),
            numbers=np.array([number for number, _, _ in kept], np.int64),
            truncated=truncated,
            rejected=sorted(rejected),
        )

    def _render(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and the supervised stretches of it in characters."""
        self.template.refuse_control_tokens(turns)
        text = render(self.tokenizer, self.jinja, turns)
        answers = [turn for turn in turns if turn.role == "assistant"]
        spans = self.template.spans(text)
        if len(spans) != len(answers):
            raise Rejected(
                "assistant turns not found",
                f"{len(answers)} assistant turns given, {len(spans)} in what the chat template makes of them",
            )
        return text, [_supervised(span, turn) for span, turn in zip(spans, answers, strict=True)]

    def _tokenise(
        self, rendered: Sequence[tuple[int, str, list[tuple[int, int]]]]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        if not rendered:
            return
        batch = self.tokenizer(
            [text for _, text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        for (_, text, stretches), ids, offsets in zip(
            rendered, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            mask = _mask(np.array(offsets, np.int64).reshape(-1, 2), np.array(stretches, np.int64))
            yield self._by_pieces(text, stretches) if mask is None else (np.array(ids, np.int32), mask)

    def _by_pieces(
        self, text: str, stretches: Sequence[tuple[int, int]]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        borders = [0, *(border for stretch in stretches for border in stretch), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
        encoded = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]
        ids = np.concatenate([np.array(piece, np.int32) for piece in encoded])
        # Pieces alternate, and the first is before any answer.
        mask = np.repeat(np.arange(len(pieces)) % 2 == 1, [len(piece) for piece in encoded])
        return ids, mask

    def _check(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> None:
        if len(ids) and ids.max() >= self.settings.vocab_size:
            raise Rejected(
                "token outside the vocabulary",
                f"token id {ids.max()}; the target's embedding has {self.settings.vocab_size} rows",
            )
        if not mask[: self.settings.max_length].any():
            raise Rejected(
                "nothing supervised",
                f"no token of an assistant turn among the first {self.settings.max_length} of {len(ids)}, "
                "which is what max_length keeps",
            )


def _supervised(span: Span, turn: Turn) -> tuple[int, int]:
    return span.start, span.end if turn.cut else span.close


def _mask(offsets: NDArray[np.int64], stretches: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Which tokens lie in one of the stretches; None where a token lies across the border of one.

    Args:
        offsets: first and one past the last character of each token, int64 [tokens, 2].
        stretches: the same of each supervised stretch, in order, int64 [stretches, 2].
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    borders = stretches.reshape(-1)
    before = np.searchsorted(starts, borders) - 1  # the last token that starts before each border
    if (ends[before[before >= 0]] > borders[before >= 0]).any():
        return None
    # An odd number of borders at or before a token's first character: it is inside.
    inside: NDArray[np.bool_] = np.searchsorted(borders, starts, side="right") % 2 == 1
    return inside


_worker: Encoder | None = None


def _start_worker(settings: EncoderSettings) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Encoder(settings)


def _encode_in_worker(lines: Sequence[Line]) -> Encoded:
    assert _worker is not None
    return _worker.encode(lines)


class Encoders:
    """Encodes chunks in order, in this process or on several; a context manager.

    Args:
        encoder: this process's own; others make themselves one of its settings.
        processes: how many; 1 works in this process.
    """

    def __init__(self, encoder: Encoder, processes: int) -> None:
        self.settings = encoder.settings
        self._encoder = encoder
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Encoders:
        if self._processes > 1:
            # spawn: a fork after the tokenizer's threads have run can hang.
            self._pool = ProcessPoolExecutor(
                self._processes, multiprocessing.get_context("spawn"), _start_worker, (self.settings,)
            )
            self._exit.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def map(self, chunks: Iterable[Sequence[Line]]) -> Iterator[Encoded]:
        """Encodes the chunks, ahead by a few at most, so that memory does not grow with the file.

        Raises:
            DraftModelError: a process died, as it does where memory is short.
        """
        if self._pool is None:
            yield from map(self._encoder.encode, chunks)
            return
        pending: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                pending.append(self._pool.submit(_encode_in_worker, chunk))
                if len(pending) > 2 * self._processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DraftModelError(
                f"build_dataset_num_proc: one of {self._processes} processes died, most likely for lack of "
                "memory; lower it, or give the step more memory"
            ) from error


def usable_processes(wanted: int, size: int) -> int:
    """How many processes to build on.

    Args:
        wanted: parameter build_dataset_num_proc.
        size: bytes of all input files; a process takes seconds to start, so small inputs get fewer.
    """
    cores = _cores()
    processes = max(1, min(wanted, cores, size // BYTES_PER_PROCESS))
    if processes < wanted:
        log.info("build_dataset_num_proc: %d lowered to %d (%d cores, %.1f MB of input)",
                 wanted, processes, cores, size / 1e6)  # fmt: skip
    return processes


BYTES_PER_PROCESS = 4 << 20


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a pod's CPU limit is not in its affinity
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
