"""Conversations become token ids and loss masks.

The tokens are those of the whole rendered text, as an engine reads a conversation, and characters are mapped to tokens
by their offsets. Only a token that would span header and answer is taken apart, for no engine ever sees it: it ends the
prompt before the answer begins.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.reader import Line, Rejected, parse
from draft_model.dataset.render import Rendered, Renderer
from draft_model.dataset.templates import TEMPLATES
from draft_model.errors import DraftModelError

_BATCH = 256
"""Lines that are tokenised together."""
_CHARACTERS_PER_TOKEN = 8
"""Of a conversation that is longer than max_length at this rate, the rest is not tokenised."""
_BEFORE_SPACE = re.compile(r"(?<=\S) ")
_MARGIN = 16
"""Tokens before the end of a shortened text that may differ from those of the whole."""


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
    """Lines after encoding: the kept rows laid end to end, and the rejected ones.

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
        DraftModelError: the folder has no tokenizer that transformers can load without running the model's code.
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
    tokenizer.model_max_length = 1 << 60  # the encoder cuts and counts; no warning
    return tokenizer


class Encoder:
    """Turns lines into tokens and masks with one tokenizer.

    Args:
        settings: what shapes the result.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        from tokenizers import Tokenizer, processors

        self.settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.template = TEMPLATES[settings.chat_template]
        self.renderer = Renderer(self.tokenizer, self.template)
        self._with_tools = Renderer(self.tokenizer, self.template, tools=True)
        self._backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets with their spaces
        halves = [
            token for half in ("a\n", "\nb") for token in self._backend.encode(half, add_special_tokens=False).ids
        ]
        self._may_split = self._backend.decode(halves) == "a\n\nb"  # else a text's start gets a space of its own

    def encode(self, lines: Sequence[Line]) -> Encoded:
        """Encodes lines; one that cannot be used is put aside with its reason."""
        rejected: list[tuple[int, str, str]] = []
        kept: list[tuple[int, int, NDArray[np.int32], NDArray[np.bool_]]] = []
        truncated = 0
        for start in range(0, len(lines), _BATCH):
            rendered: list[tuple[int, Rendered]] = []
            for number, line in lines[start : start + _BATCH]:
                try:
                    row = parse(line)
                    rendered.append((number, (self._with_tools if row.tools else self.renderer).render(row)))
                except Rejected as refusal:
                    rejected.append((number, refusal.reason, refusal.detail))
            tokenised = self._tokenise([conversation for _, conversation in rendered])
            for (number, conversation), (ids, mask, is_cut) in zip(rendered, tokenised, strict=True):
                try:
                    self._check(ids, mask)
                except Rejected as refusal:
                    rejected.append((number, refusal.reason, refusal.detail))
                    continue
                truncated += is_cut
                kept.append((number, conversation.turns, ids, mask))
        numbers, turns, ids_of, mask_of = zip(*kept, strict=True) if kept else ((), (), (), ())
        return Encoded(
            ids=np.concatenate([np.zeros(0, np.int32), *ids_of]),
            mask=np.concatenate([np.zeros(0, np.bool_), *mask_of]),
            lengths=np.array([len(ids) for ids in ids_of], np.int64),
            numbers=np.array(numbers, np.int64),
            turns=np.array(turns, np.int64),
            truncated=truncated,
            rejected=sorted(rejected),
        )

    def _tokenise(self, rows: Sequence[Rendered]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], bool]]:
        """Yields ids and mask of each conversation, no longer than max_length, and whether it was longer."""
        length = self.settings.max_length
        limit = _CHARACTERS_PER_TOKEN * length
        texts = [_shorten(row.text, limit) for row in rows]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for row, text, encoding in zip(rows, texts, encodings, strict=True):
            longer = limit
            while len(encoding) < length + _MARGIN and len(text) < len(row.text):  # tokens of many characters
                longer *= 4
                text = _shorten(row.text, longer)
                encoding = self._backend.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)
            if split := [border for border in row.borders if _is_inside_a_token(border, offsets)]:
                ids, offsets = self._split(text, split, ids, offsets)
            starts = offsets[:length, 0]
            mask = np.zeros(len(starts), np.bool_)
            for span in row.supervised:
                first, last = np.searchsorted(starts, span)
                mask[first:last] = True
            yield np.array(ids[:length], np.int32), mask, len(ids) > length

    def _split(self, text: str, borders: list[int], ids: list[int], offsets: NDArray[np.int64]) -> Any:
        """Tokenises a text once more, in pieces; a tokenizer that cannot leaves the token out of the mask."""
        if not self._may_split:
            return ids, offsets
        pieces = list(itertools.pairwise([0, *borders, len(text)]))
        parts = self._backend.encode_batch([text[start:stop] for start, stop in pieces], add_special_tokens=False)
        shifted = [np.array(parts[n].offsets, np.int64).reshape(-1, 2) + start for n, (start, _) in enumerate(pieces)]
        return [token for part in parts for token in part.ids], np.concatenate(shifted)

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


def _shorten(text: str, limit: int) -> str:
    """Cuts a text before a space, about `limit` characters from its start."""
    found = _BEFORE_SPACE.search(text, limit) if len(text) > limit else None
    return text[: found.start()] if found else text


def _is_inside_a_token(border: int, offsets: NDArray[np.int64]) -> bool:
    before = int(np.searchsorted(offsets[:, 0], border)) - 1  # the last token that starts before the border
    return before >= 0 and bool(offsets[before, 1] > border)
