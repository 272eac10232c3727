"""Conversations become token ids and loss masks.

The tokens are those of the whole rendered text, as an engine reads a conversation, and characters are mapped to tokens
by their offsets. Only a token that would span header and answer is taken apart, for no engine ever sees it: it ends the
prompt before the answer begins.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draft_model.dataset.reader import Line, Rejected, Row, parse
from draft_model.dataset.render import Rendered, Renderer
from draft_model.dataset.templates import TEMPLATES
from draft_model.errors import DraftModelError

_BATCH = 256  # lines that are tokenised together
_CHARACTERS_PER_TOKEN = 8  # of a conversation that is longer than max_length at this rate, the rest is not tokenised
_MARGIN = 16  # tokens before the end of a shortened text that may differ from those of the whole
_BEFORE_SPACE = re.compile(r"(?<=\S) ")


@dataclass(frozen=True)
class EncoderSettings:
    """All that shapes an encoder."""

    tokenizer: Path  # folder with the target's tokenizer files and config.json
    chat_template: str  # one of the four names
    max_length: int  # tokens that are kept of a conversation
    vocab_size: int  # rows of the target's embedding; every id is below


@dataclass
class Encoded:
    """Lines after encoding: the kept rows laid end to end, and the rejected ones."""

    ids: NDArray[np.int32]  # of all rows, [tokens]
    mask: NDArray[np.bool_]  # whether each token is supervised, [tokens]
    lengths: NDArray[np.int64]  # tokens of each row, [rows]
    numbers: NDArray[np.int64]  # line numbers, [rows]
    turns: NDArray[np.int64]  # assistant turns, [rows]
    truncated: int = 0  # rows that were longer than max_length
    rejected: list[tuple[int, str, str]] = field(default_factory=list)  # line number, reason, detail; in order


def load_tokenizer(folder: Path) -> Any:
    """Loads the target's fast tokenizer; never runs code that came with the model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever the files happen to break
        raise DraftModelError(f"model: its tokenizer cannot be loaded from {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise DraftModelError(f"model: its tokenizer in {folder} has no fast form; save the model with tokenizer.json")
    tokenizer.model_max_length = 1 << 60  # the encoder cuts and counts; no warning
    return tokenizer


def encode_prompts(tokenizer: Any, chat_template: str, rows: Sequence[Row]) -> list[list[int] | str]:
    """Token ids of each prompt, up to where the reply begins, or why a conversation makes none; for `Workers.call`."""
    renderers = {tools: Renderer(tokenizer, TEMPLATES[chat_template], tools=tools) for tools in (False, True)}
    prompts: list[list[int] | str] = []
    for row in rows:
        try:
            text = renderers[bool(row.tools)].prompt(row)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        except (Rejected, RecursionError) as refusal:
            prompts.append(str(refusal))
    return prompts


def end_tokens(model: Path, tokenizer: Any, template: str) -> list[int]:
    """Ids that end a reply, as in engines: generation_config's, the tokenizer's and the template's end of turn."""
    files = (path for name in ("generation_config.json", "config.json") if (path := model / name).exists())
    configs = (json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") for path in files)
    configured: int | list[int] = next((eos for eos in configs if eos is not None), [])
    ids = {configured} if isinstance(configured, int) else set(configured)
    end_of_turn = tokenizer.convert_tokens_to_ids(TEMPLATES[template].ends[0])
    return sorted((ids | {end_of_turn, tokenizer.eos_token_id}) - {None, tokenizer.unk_token_id})


class Encoder:
    """Turns lines into tokens and masks with one tokenizer."""

    def __init__(self, settings: EncoderSettings) -> None:
        from tokenizers import Tokenizer, processors

        self.settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.template = TEMPLATES[settings.chat_template]
        self.renderer = Renderer(self.tokenizer, self.template)
        self._with_tools = Renderer(self.tokenizer, self.template, tools=True)
        self._backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets with their spaces
        # Some tokenizers put a space of their own before each text, and cannot tokenise it in pieces.
        self._may_split = self._backend.decode(self._tokens(["a\n", "\nb"])[0]) == "a\n\nb"

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
                except RecursionError:
                    rejected.append((number, "wrong shape", "the line is nested too deeply"))
            tokenised = self._tokenise([conversation for _, conversation in rendered])
            for (number, conversation), (ids, mask, is_cut) in zip(rendered, tokenised, strict=True):
                vocab_size, length = self.settings.vocab_size, self.settings.max_length
                if len(ids) and ids.max() >= vocab_size:
                    detail = f"token id {ids.max()}; the target's embedding has {vocab_size} rows"
                    rejected.append((number, "token outside the vocabulary", detail))
                elif not mask.any():
                    detail = f"no token of an assistant turn among the first {len(ids)}; max_length keeps {length}"
                    rejected.append((number, "nothing supervised", detail))
                else:
                    truncated += is_cut
                    kept.append((number, conversation.turns, ids, mask))
        numbers, turns, ids_of, mask_of = zip(*kept, strict=True) if kept else ((), (), (), ())
        ids, mask = np.concatenate([np.zeros(0, np.int32), *ids_of]), np.concatenate([np.zeros(0, np.bool_), *mask_of])
        lengths, numbered, counts = (np.array([*of], np.int64) for of in (map(len, ids_of), numbers, turns))
        return Encoded(ids, mask, lengths, numbered, counts, truncated, sorted(rejected))

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
            before = np.searchsorted(offsets[:, 0], row.borders) - 1  # the last token that starts before each border
            borders = zip(row.borders, before, strict=True)
            inside = [border for border, n in borders if n >= 0 and offsets[n, 1] > border]
            if inside and self._may_split:  # else the token is left out of the mask
                cuts = [0, *(border for border in inside if border < len(text)), len(text)]
                ids, offsets = self._tokens([text[start:stop] for start, stop in itertools.pairwise(cuts)])
            starts = offsets[:length, 0]
            mask = np.zeros(len(starts), np.bool_)
            for span in row.supervised:
                first, last = np.searchsorted(starts, span)
                mask[first:last] = True
            yield np.array(ids[:length], np.int32), mask, len(ids) > length

    def _tokens(self, pieces: Sequence[str]) -> tuple[list[int], NDArray[np.int64]]:
        """Ids of all pieces and their offsets in the joined text, int64 [tokens, 2]."""
        parts = self._backend.encode_batch(list(pieces), add_special_tokens=False)
        shifts = itertools.accumulate(map(len, pieces), initial=0)
        offsets = [np.array(part.offsets, np.int64).reshape(-1, 2) + shift for part, shift in zip(parts, shifts)]  # noqa: B905
        return [token for part in parts for token in part.ids], np.concatenate(offsets)


def _shorten(text: str, limit: int) -> str:
    """Cuts a text before a space, about `limit` characters from its start."""
    found = _BEFORE_SPACE.search(text, limit) if len(text) > limit else None
    return text[: found.start()] if found else text
