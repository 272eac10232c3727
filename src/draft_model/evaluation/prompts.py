"""What the evaluation decodes: the validation split, prompts of a file, or published benchmarks.

A line of a file is `{"prompt": "..."}`, or `messages` or `conversations` as in the training data, whose last reply is
left out; `category` is kept. Benchmarks come from the Hugging Face Hub; `datasets` fetches and caches them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from draft_model.dataset.files import File, find
from draft_model.dataset.templates import TEMPLATES, template_text
from draft_model.dataset.tokens import Split
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompts:
    """Prompts to decode.

    Attributes:
        tokens: of each, up to where the reply begins.
        categories: of each.
        source: where they come from, in words.
    """

    tokens: list[list[int]]
    categories: list[str]
    source: str


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark.

    Attributes:
        hub_id: of the data set.
        config: its configuration; empty for the default.
        split: of it.
        text: what a row asks.
        category: a row's.
    """

    hub_id: str
    config: str
    split: str
    text: Callable[[Mapping[str, Any]], str]
    category: Callable[[Mapping[str, Any]], str]


def _alpaca(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else str(row["instruction"])


BENCHMARKS = {
    "mt-bench": Benchmark(
        "HuggingFaceH4/mt_bench_prompts", "", "train",
        lambda row: row["prompt"][0], lambda row: f"mt-bench {row['category']}",
    ),
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", lambda row: row["question"], lambda _: "gsm8k"),
    "humaneval": Benchmark(
        "openai/openai_humaneval", "", "test",
        lambda row: f"Complete this Python function:\n\n```python\n{row['prompt']}```", lambda _: "humaneval",
    ),
    "alpaca": Benchmark("tatsu-lab/alpaca", "", "train", _alpaca, lambda _: "alpaca"),
    "cnn-dm": Benchmark(
        "abisee/cnn_dailymail", "3.0.0", "test",
        lambda row: f"Summarize this article:\n\n{row['article']}", lambda _: "cnn-dm",
    ),
}  # fmt: skip


def choose_prompts(
    given: str, validation: Split | None, tokenizer: Any, template: str, limit: int, longest: int
) -> Prompts:
    """The prompts that parameter evaluation_prompts means.

    Args:
        given: its value: a file, names of benchmarks with commas between them, or empty for the validation split.
        validation: validation split; None where there is none.
        tokenizer: the target's.
        template: name of the chat template, for a tokenizer that has none.
        limit: how many of the validation split, of the file or of each benchmark; 0 for all.
        longest: longer prompts than this are left out, in tokens.

    Raises:
        DraftModelError: when there are none, or they cannot be had.
    """
    if not given:
        if validation is None:
            return Prompts([], [], "")
        found = list(islice(_of_split(validation), limit or None))
        source = "the validation split"
    else:
        named = [name.strip().lower() for name in given.split(",")]
        benchmarks = [BENCHMARKS[name] for name in named if name in BENCHMARKS]
        rows = (
            [row for benchmark in benchmarks for row in _of_benchmark(benchmark, limit)]
            if len(benchmarks) == len(named)
            else list(islice(_of_files(given), limit or None))
        )
        jinja = template_text(tokenizer, TEMPLATES[template])
        found = [(_tokens(tokenizer, jinja, messages), category) for messages, category in rows]
        source = ", ".join(benchmark.hub_id for benchmark in benchmarks) if benchmarks else given
    kept = [(tokens, category) for tokens, category in found if 2 <= len(tokens) <= longest]
    if not kept:
        name = "evaluation_prompts" if given else "dataset_validation_split"
        raise DraftModelError(f"{name}: none of {source} has a prompt of 2 to {longest} tokens to decode from")
    if len(kept) < len(found):
        logger.info(
            "%d of %d prompts are left out: not 2 to %d tokens long", len(found) - len(kept), len(found), longest
        )
    return Prompts([tokens for tokens, _ in kept], [category for _, category in kept], source)


def check(given: str) -> list[str]:
    """What is wrong with a value of evaluation_prompts before anything runs, a sentence each."""
    if not given or all(name.strip().lower() in BENCHMARKS for name in given.split(",")):
        return []
    try:
        find(given)
    except DraftModelError as error:
        return [
            f"evaluation_prompts: {problem}, or name benchmarks: {', '.join(BENCHMARKS)}" for problem in error.problems
        ]
    return []


def _of_split(split: Split) -> Iterator[tuple[list[int], str]]:
    """The conversations up to their last assistant turn."""
    for index in range(len(split)):
        row = split[index]
        starts = [at for at in range(1, len(row.loss_mask)) if row.loss_mask[at] and not row.loss_mask[at - 1]]
        if starts:
            yield row.input_ids[: starts[-1]].tolist(), "first reply" if len(starts) == 1 else "later reply"


def _of_files(given: str) -> Iterator[tuple[Messages, str]]:
    for file in find(given):
        yield from _of_file(file)


def _of_file(file: File) -> Iterator[tuple[Messages, str]]:
    with file.open() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                    yield _messages(row), str(row.get("category", "prompts"))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise DraftModelError(
                        f"evaluation_prompts: line {number} of {file.name} is no prompt ({error}); allowed: "
                        '{"prompt": "..."}, or `messages` with role and content, and perhaps `category`'
                    ) from error


def _messages(row: Mapping[str, Any]) -> Messages:
    if "prompt" in row:
        text = row["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError("`prompt` is no text")
        return [{"role": "user", "content": text}]
    given = row["messages"] if "messages" in row else row["conversations"]
    messages = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in given]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError("there is nothing to reply to")
    return messages


def _of_benchmark(benchmark: Benchmark, limit: int) -> list[tuple[Messages, str]]:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(benchmark.hub_id, benchmark.config or None, split=benchmark.split)
    except Exception as error:  # datasets has no common ancestor for what a network can do
        hub, reason = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), str(error).splitlines()[0]
        raise DraftModelError(
            f"evaluation_prompts: the benchmark {benchmark.hub_id} is not in the cache of `datasets` and cannot be "
            f"fetched from {hub} ({reason}); give a file of prompts, or fetch it once where the Hub is reachable and "
            "set HF_HOME to that cache"
        ) from error
    chosen = rows.select(range(min(limit or len(rows), len(rows))))
    return [([{"role": "user", "content": benchmark.text(row)}], benchmark.category(row)) for row in chosen]


def _tokens(tokenizer: Any, jinja: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, chat_template=jinja, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
