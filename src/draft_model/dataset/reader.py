"""JSON lines become conversations of one shape, or a reason why not.

Dialects: `conversations` or `messages` of role/content, ShareGPT's from/value, and `text` that a chat template has
rendered before. Messages come out as chat templates take them. A part that cannot be honoured is refused by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from draft_model.dataset.files import find, read_errors, read_line
from draft_model.errors import DraftModelError

Line = tuple[int, bytes]  # number from 1, and content
Message = dict[str, Any]

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
_MESSAGES = ("conversations", "messages")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "loss")
_READ_COLUMNS = {*_MESSAGES, "text", "prompt", "tools", "system", "finish"}


class Rejected(Exception):
    """A line that cannot be used.

    `reason` is the kind of fault, in the same words for each such line, since the report counts by it; `detail` says
    where in the line, and what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be written
        super().__init__(f"{reason}: {self.detail}")


@dataclass(frozen=True)
class Row:
    """One conversation: messages, or text that a chat template has rendered.

    The roles of messages are system, user, assistant and tool. An assistant's may have `tool_calls` and
    `reasoning_content`, a tool's `name` and `tool_call_id`.
    """

    messages: list[Message] = field(default_factory=list)
    cut: tuple[bool, ...] = ()  # per assistant turn: generation stopped at a length limit, so there is no end of turn
    ignored: tuple[bool, ...] = ()  # per assistant turn: `weight`, `train` or `loss` is 0, so it is not supervised
    tools: list[dict[str, Any]] | None = None  # functions that the assistant may call
    columns: dict[str, Any] = field(default_factory=dict)  # the row's others, which a chat template may read
    text: str = ""

    @property
    def answers(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_conversations(uri: str, limit: int = 0) -> list[Row]:
    """Reads the conversations of files, for prompts: `{"prompt": "..."}` and rows without an answer are taken too.

    `uri` is what `find` takes; no more rows than `limit` are read, 0 for all.
    """

    def rows() -> Iterator[Row]:
        for file in find(uri):
            with read_errors(file.uri), file.open() as stream:
                for number, line in enumerate(iter(partial(read_line, stream, file.uri), b""), start=1):
                    if not line.strip():
                        continue
                    try:
                        yield parse(line, needs_answer=False)
                    except (Rejected, RecursionError) as refusal:
                        raise DraftModelError(f"line {number} of {file.uri} is not a conversation: {refusal}") from None

    return list(itertools.islice(rows(), limit or None))


def parse(line: bytes, *, needs_answer: bool = True) -> Row:
    """Reads one line, UTF-8; raises Rejected where it is no conversation, or one without an assistant turn."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise Rejected("wrong shape", f"the line is a JSON {type(row).__name__}, not an object")
    messages = next((row[name] for name in _MESSAGES if row.get(name) is not None), None)
    columns = {name: value for name, value in row.items() if name not in _READ_COLUMNS and value is not None}
    if messages is None and isinstance(row.get("text"), str):
        return Row(text=_clean(row["text"], "`text`"), cut=_cuts(row, []), columns=columns)
    if messages is None and not needs_answer and row.get("prompt") is not None:
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list):
        found = "of another type" if messages is not None else f"absent; the row has {_names(row)}"
        raise Rejected("wrong shape", f"`conversations` or `messages` must be a list; it is {found}")
    if not messages:
        raise Rejected("empty", "the list of messages is empty")
    turns = [_message(message, f"message {number}") for number, message in enumerate(messages, start=1)]
    own = [message for message, turn in zip(messages, turns, strict=True) if turn["role"] == "assistant"]
    if needs_answer and not own:
        raise Rejected("no assistant turn", f"the roles are {', '.join(turn['role'] for turn in turns)}"[:200])
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": _clean(system, "`system`")})
    return Row(turns, _cuts(row, own), tuple(map(_is_ignored, own)), _tools(row.get("tools")), columns)


def _cuts(row: Mapping[str, Any], answers: list[dict[str, Any]]) -> tuple[bool, ...]:
    """Reads `finish` of each assistant message, or of the row as a list with an entry for each of them."""
    finish = row.get("finish")
    if not isinstance(finish, list):
        return tuple(answer.get("finish") == "length" for answer in answers) if answers else (finish == "length",)
    if answers and len(finish) != len(answers):
        raise Rejected("wrong shape", f"`finish` has {len(finish)} entries for {len(answers)} assistant turns")
    return tuple(entry == "length" for entry in finish)


def _is_ignored(answer: Mapping[str, Any]) -> bool:
    given = {name: answer[name] for name in _WEIGHTS if answer.get(name) is not None}
    if wrong := next((name for name, value in given.items() if value not in (0, 1)), None):  # true is 1, false is 0
        raise Rejected("wrong shape", f"`{wrong}` of an assistant message is {given[wrong]!r:.40}; allowed: 0 or 1")
    return 0 in given.values()


def _tools(given: Any) -> list[dict[str, Any]] | None:
    if not given:
        return None
    tools = _from_json(given, "`tools`") if isinstance(given, str) else _without_nulls(given)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected("wrong shape", "`tools` must be a list of objects, or that as a JSON string")
    return tools or None


def _without_nulls(value: Any) -> Any:
    """Arrow gives each object the keys of all rows, with null for those it lacked; a JSON string keeps its nulls."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise Rejected("wrong shape", f"{where} is not an object")
    given = message.get("role") or message.get("from")
    if not isinstance(given, str):
        raise Rejected("wrong shape", f"{where} has no `role` (or `from`) that is a string; it has {_names(message)}")
    if given not in _ROLES:
        raise Rejected("unknown role", f"{where} has the role {given[:40]!r}; allowed: {', '.join(_ROLES)}")
    turn: Message = {"role": _ROLES[given]}
    text = message["content"] if message.get("content") is not None else message.get("value")
    if given == "function_call":
        turn["tool_calls"], text = _tool_calls(text, where), None
    elif turn["role"] == "assistant":
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = _tool_calls(calls, where)
        if reasoning := next((message[name] for name in _REASONING if message.get(name)), None):
            turn["reasoning_content"] = _clean(_text(reasoning, where), where)
    elif turn["role"] == "tool":
        turn |= {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
    may_be_empty = turn.keys() & {"tool_calls", "reasoning_content"} or turn["role"] == "tool"
    if not text and may_be_empty:
        turn["content"] = None if "tool_calls" in turn else ""
    else:
        turn["content"] = _clean(_text(text, where), f"{where} ({given})")
    return turn


def _tool_calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Returns the calls as chat templates want them: a list of functions, their arguments an object."""
    calls = _from_json(given, f"{where}: its tool calls") if isinstance(given, str) else given
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise Rejected("wrong shape", f"{where} has tool calls that are not a list")
    exact = isinstance(given, str)  # Arrow adds no nulls inside a string
    return [_tool_call(call, where, exact=exact) for call in calls]


def _tool_call(call: Any, where: str, *, exact: bool) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Rejected("wrong shape", f"{where} has a tool call without the name of its function")
    arguments = function.get("arguments") if function.get("arguments") is not None else {}
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", f"{where}: the arguments of {function['name'][:40]}")
    elif not exact:
        arguments = _without_nulls(arguments)
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("wrong shape", f"{what} are no JSON ({error})") from None


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
        raise Rejected("wrong shape", f'{where} has a content part that is not {{"type": "text", "text": ...}}')
    raise Rejected("wrong shape", f"{where} has no `content` (or `value`) that is a string or a list of text parts")


def _clean(text: str, where: str) -> str:
    if not text.strip():
        raise Rejected("empty", f"{where} has no text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("not Unicode", f"{where} has half of a surrogate pair at character {error.start + 1}") from None
    return text


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name[:40]}`" for name in list(row)[:8]) or "no fields"
