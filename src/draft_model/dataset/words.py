"""Text to token ids with a memory: a word that was seen before is looked up, not tokenised again.

A byte-level BPE tokenizer cuts text into words by a regular expression and merges within each, so a word has the same
ids wherever it stands. Conversations are made of few different words; finding them by Python's `re` and looking up
their ids takes half the time of the tokenizer or less. Words that are new are given to the tokenizer itself.

The short cut is taken where it is exact: for ASCII text, in which the expression's Unicode classes are plain ranges,
and for tokenizers of the known structure, of whom probes are compared first. All else goes to the tokenizer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

REMEMBERED = 1 << 18
"""Words kept in memory, about 50 MB; then it starts anew."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Letters and digits of ASCII by Unicode category; it has none of the other letter and mark categories.
_ASCII = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Lt": "", "Lm": "", "Lo": "", "M": ""}
_CLASS = re.compile(r"\\p\{(\w+)\}")
_BRACKETS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_PROBES = (
    "it's I'LL we've don't 'S 'tis ''s",
    " two  three   four\t tab\n\n  lines \r\n\r\n \n x\n",
    "a1b22c333 4444 5,678.90",
    "camelCase HTTPServer ABCdef A aB",
    'x=(y+[z]*{w})/_v-- !?;: #@\n\n\t// "quote\'s"',
    "   ",
    "\n",
    " \n ",
    "...\n\n\n  end",
    "<|notoken|> </s> <b>&amp;</b>",
    "\x00\x01\x1c\x1f\x7f\x0b\x0c",
    "def f(x):\n    return x\n\n\n  ",
    *(f"a{chr(code)}{chr(code)} {chr(code)}1" for code in range(128)),
)


class WordTokenizer:
    """Tokenises as its tokenizer does, byte for byte.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Attributes:
        remembers: whether the short cut is taken.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._special, self._words = _expressions(tokenizer)
        self.remembers = self._words is not None and self._by_words(_PROBES) == self._directly(_PROBES)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; no special tokens are added, those in the text are found."""
        if not self.remembers:
            return self._directly(texts)
        plain = [text.isascii() for text in texts]
        by_words = iter(self._by_words([text for text, is_plain in zip(texts, plain, strict=True) if is_plain]))
        others = iter(self._directly([text for text, is_plain in zip(texts, plain, strict=True) if not is_plain]))
        return [next(by_words if is_plain else others) for is_plain in plain]

    def _directly(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _by_words(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._words is not None
        find = self._words.findall
        split: list[list[str]] = []
        for text in texts:
            words: list[str] = []
            # Every second part is a special token.
            for number, part in enumerate(self._special.split(text) if self._special else (text,)):
                if number % 2:
                    words.append(part)
                elif part:
                    words += find(part)
            split.append(words)
        new = {word for words in split for word in words if word not in self._known}
        if len(self._known) + len(new) > REMEMBERED:
            self._known.clear()
            new = set(itertools.chain.from_iterable(split))
        in_order = sorted(new)
        self._known.update(zip(in_order, self._directly(in_order), strict=True))
        known = self._known.__getitem__
        return [list(itertools.chain.from_iterable(map(known, words))) for words in split]


def _expressions(tokenizer: Any) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """What finds special tokens, and words between them; no expression for words where the structure is another."""
    structure = json.loads(tokenizer.to_str())
    tokens = structure.get("added_tokens", [])
    special = sorted((token["content"] for token in tokens), key=len, reverse=True)
    find_special = re.compile(f"({'|'.join(map(re.escape, special))})") if special else None
    plain = not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens)
    normalizer = (structure.get("normalizer") or {"type": "NFC"})["type"]  # which leaves ASCII as it is
    pattern = _word_pattern(structure.get("pre_tokenizer") or {})
    if not (plain and normalizer == "NFC" and structure["model"]["type"] == "BPE" and pattern):
        return find_special, None
    try:
        find_words = re.compile(_in_ascii(pattern), re.ASCII)
    except (re.error, KeyError):
        return find_special, None
    covers = all(find_words.fullmatch(chr(code)) for code in range(128))  # so `findall` leaves nothing out
    return find_special, find_words if covers and not find_words.groups else None


def _word_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return _GPT2 if steps[0]["use_regex"] else None
    split = steps[0]
    if len(steps) > 2 or split.get("type") != "Split" or steps[1]["use_regex"]:
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern if split["behavior"] == "Isolated" and not split["invert"] else None


def _in_ascii(pattern: str) -> str:
    """The expression as it acts on ASCII text, with ranges for Unicode classes.

    Raises:
        KeyError: it has a class that is not known here.
    """

    def ranges(found: re.Match[str]) -> str:
        return _ASCII[found[1]]

    inside = _BRACKETS.sub(lambda brackets: _CLASS.sub(ranges, brackets[0]), pattern)
    return _CLASS.sub(lambda found: f"[{ranges(found)}]", inside)
