"""The four chat templates: which characters of a rendered conversation are the assistant's.

The text itself is written by the tokenizer's own chat template. A name says only what an assistant turn looks like in
that text, as one regular expression: the header, the content, the token that ends the turn. The header is what an
engine puts before generation begins, with the scaffold of a template that opens the model's reasoning for it; the
content is all that the model writes then, reasoning, tool calls and the channels of gpt-oss included. Messages that
contain a control token are refused beforehand, so nothing in the text can be mistaken for a marker.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model.dataset.reader import Rejected, Row
from draft_model.errors import DraftModelError

# A template that writes today's date would make another data set each day.
_ONE_DATE = "{% macro strftime_now(format) %}{{ {'%d %b %Y': '26 Jul 2024'}.get(format, '2024-07-26') }}{% endmacro +%}"


@dataclass(frozen=True)
class Span:
    """An assistant turn, as character offsets into the rendered text."""

    start: int  # of the content
    end: int  # one past the content: the end-of-turn token begins here
    close: int  # one past the end-of-turn token


@dataclass(frozen=True)
class Template:
    """What one `chat_template` name stands for."""

    name: str
    header: str  # what an engine writes before the assistant's content
    headers: str  # expression for it, where it takes other forms too
    ends: tuple[str, ...]  # tokens that end a turn; the first is the one after an answer
    control: tuple[str, ...]  # tokens that frame turns: each is one token of such a tokenizer, and in no message
    jinja: str  # for a tokenizer without a chat template
    content: str = ".*?"  # expression for the content
    opening: str = ""  # what the model writes before the text of an answer

    def turns(self, scaffold: str = "") -> re.Pattern[str]:
        """Returns an expression for an assistant turn, with the groups `content` and `end`.

        The scaffold is what the tokenizer's template writes between header and generation.
        """
        ends = "|".join(map(re.escape, self.ends))
        header = f"(?:{self.headers})(?:{re.escape(scaffold)})?"
        return re.compile(f"{header}(?P<content>{self.content})(?P<end>{ends})", re.DOTALL)

    def refuse_control_tokens(self, row: Row) -> None:
        """Raises Rejected where a message or a tool has a control token in its text."""
        texts = [(f"message {n} ({m['role']})", value) for n, m in enumerate(row.messages, 1) for value in m.values()]
        for where, value in [*texts, ("`tools`", row.tools)]:
            text = value if isinstance(value, str) else as_json(value)
            if "<" in text and (found := next((token for token in self.control if token in text), None)):
                raise Rejected("control token", f"{where} contains {found}")


def as_json(value: Any) -> str:
    """Returns JSON text as templates write it; empty for None."""
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _jinja(name: str) -> str:
    r"""A template from its file, in which only `\n` is a line break."""
    file = Path(__file__).parent / "chat" / f"{name}.jinja"
    return "".join(file.read_text(encoding="utf-8").splitlines()).replace(r"\n", "\n")


# A template puts an empty block before an answer of a model that can reason and did not: it wrote it, not the model.
_EMPTY_THINK = "(?:<think>\n\n</think>\n\n)?"
_HARMONY_TEXT = r"[^<]*(?:<(?!\|(?:end|return|call|start)\|>)[^<]*)*"

LLAMA3 = Template(
    name="llama3",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    headers=re.escape("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ends=("<|eot_id|>", "<|eom_id|>"),
    control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
    jinja=_jinja("llama3"),
)
QWEN = Template(
    name="qwen",
    header="<|im_start|>assistant\n",
    headers=re.escape("<|im_start|>assistant\n") + _EMPTY_THINK,
    ends=("<|im_end|>",),
    control=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    jinja=_jinja("qwen"),
)
GPT_OSS = Template(
    name="gpt-oss",
    header="<|start|>assistant",
    headers=re.escape("<|start|>assistant"),
    # One generation: channels that end in <|end|> are followed by the next, up to an answer or a call.
    content=rf"(?:<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>{_HARMONY_TEXT}<\|end\|><\|start\|>assistant)*"
    rf"[^<]*(?:<\|channel\|>[^<]*)?(?:<\|constrain\|>[^<]*)?<\|message\|>{_HARMONY_TEXT}",
    ends=("<|return|>", "<|end|>", "<|call|>"),
    opening="<|channel|>final<|message|>",
    control=(
        "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>",
        "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>",
    ),
    jinja=_jinja("gpt-oss"),
)  # fmt: skip
DEEPSEEK = Template(
    name="deepseek-r1-distill",
    header="<｜Assistant｜>",
    headers="<｜Assistant｜>|<｜tool▁outputs▁end｜>(?!<｜User｜>)",  # after a tool's output the assistant goes on
    ends=("<｜end▁of▁sentence｜>",),
    control=("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    jinja=_jinja("deepseek-r1-distill"),
)
TEMPLATES = {template.name: template for template in (LLAMA3, QWEN, GPT_OSS, DEEPSEEK)}


def template_text(tokenizer: Any, template: Template, *, tools: bool = False) -> str:
    """Returns the Jinja text to render with: the tokenizer's own, else the named one's; its date is fixed.

    Of several templates that a tokenizer has by name, engines take `tool_use` for tools, if there is one, or `default`.
    """
    own = tokenizer.chat_template or template.jinja
    if isinstance(own, dict):
        name = "tool_use" if tools and "tool_use" in own else "default"
        if name not in own and len(own) > 1:
            names = ", ".join(sorted(own))
            raise DraftModelError(
                f"model: its tokenizer has chat templates {names}, but no `default`; rename the right one to `default`"
            )
        own = own.get(name) or next(iter(own.values()))
    return _ONE_DATE + own if "strftime_now" in own else str(own)
