"""JSONL lines become conversations of one shape, or a reason why not.

Three dialects are read: `conversations` or `messages` of role/content, and ShareGPT's from/value. Whatever
would be trained on wrongly if it were passed over (tools, reasoning beside the content) is refused by name,
never dropped.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from draft_model.errors import DraftModelError

Role = Literal["system", "user", "assistant"]
Line = tuple[int, bytes]
"""1-based number in the file, and the content."""

_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"
}  # fmt: skip
_NOT_RENDERED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"

# A chunk is what one worker is handed at a time. It depends on the file alone, so the result does too.
_CHUNK_LINES = 256
_CHUNK_BYTES = 4 << 20


class Rejected(Exception):
    """One line that cannot be used.

    Args:
        reason: the kind of fault, the same words for each line that has it: what the report counts.
        detail: where in the line, and what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail.encode("utf-8", "backslashreplace").decode()  # what the line holds need not be Unicode
        super().__init__(f"{reason}: {self.detail}")


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: who speaks.
        content: the text, never blank.
        cut: the text stops where generation was cut off (`"finish": "length"`): the speaker did not end the
            turn.
    """

    role: Role
    content: str
    cut: bool = False


def numbered_lines(path: Path, name: str) -> Iterator[Line]:
    """The non-blank lines of a JSONL file, plain or gzip, one at a time.

    Args:
        path: the file; gzip is told by its first bytes, not by its name.
        name: what to call the file in an error: the parameter and what was given.

    Raises:
        DraftModelError: the file cannot be read, or its gzip data is damaged.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP
        with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(_BOM) if number == 1 else line
                if content.strip():
                    yield number, content
    except (OSError, EOFError, zlib.error) as error:
        damaged = (
            "is damaged gzip data" if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)) else "cannot be read"
        )
        raise DraftModelError(f"{name}: {damaged} ({error}); give a readable .jsonl or .jsonl.gz file") from error


def chunks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Groups lines into what is encoded together: at most 256 of them, and few where they are long."""
    chunk: list[Line] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line[1])
        if len(chunk) == _CHUNK_LINES or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def parse(line: bytes) -> list[Turn]:
    """Reads one line.

    Args:
        line: one JSON object, UTF-8.

    Returns:
        The turns in order, at least one of them the assistant's.

    Raises:
        Rejected: the line is not a conversation that can be used.
    """
    row = _json_object(line)
    if row.get("tools"):
        raise Rejected("not supported", "the row has `tools`")
    messages = row.get("conversations")
    if messages is None:
        messages = row.get("messages")
    if not isinstance(messages, list):
        found = "of another type" if messages is not None else f"absent; the row has {_names(row)}"
        raise Rejected("wrong shape", f"`conversations` or `messages` must be a list; it is {found}")
    if not messages:
        raise Rejected("empty", "the list of messages is empty")
    turns = [_turn(message, f"message {number}") for number, message in enumerate(messages, start=1)]
    if not any(turn.role == "assistant" for turn in turns):
        raise Rejected("no assistant turn", f"the roles are {', '.join(turn.role for turn in turns)}"[:200])
    return turns


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise Rejected("wrong shape", f"the line is a JSON {type(row).__name__}, not an object")
    return row


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise Rejected("wrong shape", f"{where} is not an object")
    if unread := [key for key in _NOT_RENDERED if message.get(key)]:
        raise Rejected("not supported", f"{where} has `{unread[0]}`")
    given = message.get("role") or message.get("from")
    if not isinstance(given, str):
        raise Rejected("wrong shape", f"{where} has no `role` (or `from`) that is a string; it has {_names(message)}")
    if given not in _ROLES:
        raise Rejected("unknown role", f"{where} has the role {given[:40]!r}; allowed: {', '.join(_ROLES)}")
    content = _text(message["content"] if message.get("content") is not None else message.get("value"), where)
    if not content.strip():
        raise Rejected("empty", f"{where} ({given}) has no text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("not Unicode", f"{where} has half of a surrogate pair at character {error.start + 1}") from None
    return Turn(_ROLES[given], content, cut=message.get("finish") == "length")


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
        raise Rejected("wrong shape", f'{where} has a content part that is not {{"type": "text", "text": ...}}')
    raise Rejected("wrong shape", f"{where} has no `content` (or `value`) that is a string or a list of text parts")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(f"`{name[:40]}`" for name in list(row)[:8]) or "no fields"
