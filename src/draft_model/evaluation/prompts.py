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
from pathlib import Path
from typing import Any

from draft_model.dataset.files import File, find, read_errors
from draft_model.dataset.templates import TEMPLATES, template_text
from draft_model.dataset.tokens import Split
from draft_model.errors import DraftModelError
from draft_model.hub import hub_address

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]

_LINE = '{"prompt": "..."}, or `messages` with role and content, and perhaps `category`'
_REFUSALS = (401, 403, 404)
"""What the Hub answers where it has no such data set, or not for this token."""


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
        benchmarks = _named(given)
        rows = (
            [row for benchmark in benchmarks for row in _of_benchmark(benchmark, limit)]
            if benchmarks
            else list(islice(_of_files(find(given)), limit or None))
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


def check(given: str, limit: int) -> None:
    """Reads prompts of files before anything runs, as the evaluation will; benchmarks are left to `ask_hub`.

    Args:
        given: value of evaluation_prompts.
        limit: how many will be decoded; 0 for all.

    Raises:
        DraftModelError: they are not there, cannot be read, or are no prompts.
    """
    if not given or _named(given):
        return
    try:
        files = find(given)
    except DraftModelError as error:
        benchmarks = ", ".join(BENCHMARKS)
        raise DraftModelError([f"{problem}, or name benchmarks: {benchmarks}" for problem in error.problems]) from error
    if not sum(1 for _ in islice(_of_files(files), limit or None)):
        names = ", ".join(file.uri for file in files[:3])
        raise DraftModelError(f"evaluation_prompts: there is no line in {names}; allowed: {_LINE}")


def to_fetch(given: str) -> list[str]:
    """The Hub's ids of the benchmarks that evaluation_prompts names and this machine's cache does not have."""
    return [benchmark.hub_id for benchmark in _named(given) if not _is_cached(benchmark)]


def ask_hub(names: Sequence[str], seconds: float) -> tuple[list[str], list[str]]:
    """Asks the Hub whether it has benchmarks; downloads nothing.

    Args:
        names: their ids there.
        seconds: to wait for each answer.

    Returns:
        Problems; and notes, where it does not answer from here.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    problems: list[str] = []
    for name in names:
        try:
            HfApi().dataset_info(name, timeout=seconds)
        except (HTTPError, OfflineModeIsEnabled) as error:
            answer = error.response if isinstance(error, HfHubHTTPError) else None
            if answer is None or answer.status_code not in _REFUSALS:
                why = f"status {answer.status_code}" if answer is not None else type(error).__name__
                return problems, [
                    f"evaluation_prompts: not looked at from here; the evaluation fetches {', '.join(names)} after the "
                    f"training: {hub_address()} cannot be reached ({why}); if it cannot be from the evaluation either, "
                    "give a file of prompts"
                ]
            problems.append(
                f"evaluation_prompts: given the benchmark {name}, which {hub_address()} does not give (status "
                f"{answer.status_code}); put it there, check the token in HF_TOKEN, or give a file of prompts"
            )
    return problems, []


def _named(given: str) -> list[Benchmark]:
    """The benchmarks that a value names; none where it is no list of them."""
    names = [name.strip().lower() for name in given.split(",")]
    return [BENCHMARKS[name] for name in names] if BENCHMARKS.keys() >= set(names) else []


def _is_cached(benchmark: Benchmark) -> bool:
    """Whether `datasets` has it on this machine, as an earlier evaluation leaves it."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return (cache / benchmark.hub_id.replace("/", "___") / benchmark.config).is_dir()


def _of_split(split: Split) -> Iterator[tuple[list[int], str]]:
    """The conversations up to their last assistant turn."""
    for index in range(len(split)):
        row = split[index]
        starts = [at for at in range(1, len(row.loss_mask)) if row.loss_mask[at] and not row.loss_mask[at - 1]]
        if starts:
            yield row.input_ids[: starts[-1]].tolist(), "first reply" if len(starts) == 1 else "later reply"


def _of_files(files: Sequence[File]) -> Iterator[tuple[Messages, str]]:
    for file in files:
        yield from _of_file(file)


def _of_file(file: File) -> Iterator[tuple[Messages, str]]:
    with read_errors(file.uri, "evaluation_prompts"), file.open() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                    yield _messages(row), str(row.get("category", "prompts"))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise DraftModelError(
                        f"evaluation_prompts: line {number} of {file.name} is no prompt ({error}); allowed: {_LINE}"
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
        reason = str(error).splitlines()[0]
        raise DraftModelError(
            f"evaluation_prompts: the benchmark {benchmark.hub_id} is not in the cache of `datasets` and cannot be "
            f"fetched from {hub_address()} ({reason}); give a file of prompts, or fetch it once where the Hub is "
            "reachable and set HF_HOME to that cache"
        ) from error
    chosen = rows.select(range(min(limit or len(rows), len(rows))))
    return [([{"role": "user", "content": benchmark.text(row)}], benchmark.category(row)) for row in chosen]


def _tokens(tokenizer: Any, jinja: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, chat_template=jinja, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
