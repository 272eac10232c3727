"""What the evaluation decodes: the validation split, prompts of a file, or published benchmarks.

A line of a file is `{"prompt": "..."}`, or a conversation as in the training data, whose last reply is left out; the
data set's reader and the tokenizer's chat template make a prompt of it. `category` is kept. Benchmarks come from the
Hugging Face Hub; `datasets` downloads and caches them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from draft_model.dataset.encode import encode_prompts
from draft_model.dataset.reader import Row, read_conversations
from draft_model.dataset.tokens import Split
from draft_model.errors import DraftModelError
from draft_model.model_import.hub import hub_address
from draft_model.parameters import Parameters
from draft_model.workers import Workers

logger = logging.getLogger(__name__)

_ALLOWED = '{"prompt": "..."}, or a conversation as in the training data, and perhaps `category`'
VALIDATION = "the validation split"
_REFUSALS = (401, 403, 404)  # what the Hub answers where it has no such data set, or not for this token


@dataclass(frozen=True)
class Prompts:
    """Prompts to decode: token ids up to where the reply begins, by category; and where they come from, in words."""

    groups: dict[str, list[list[int]]]
    source: str

    @property
    def tokens(self) -> list[list[int]]:
        """All prompts, category by category."""
        return [prompt for group in self.groups.values() for prompt in group]


class Benchmark(NamedTuple):
    """A published benchmark: its data set; what a row asks and the row's category, as formats of its columns."""

    hub_id: str
    config: str
    split: str
    text: str
    category: str


_CODE = "Complete this Python function:\n\n```python\n{prompt}```"
BENCHMARKS = {
    "mt-bench": Benchmark("HuggingFaceH4/mt_bench_prompts", "", "train", "{prompt[0]}", "mt-bench {category}"),
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", "{question}", "gsm8k"),
    "humaneval": Benchmark("openai/openai_humaneval", "", "test", _CODE, "humaneval"),
    "alpaca": Benchmark("tatsu-lab/alpaca", "", "train", "{instruction}\n\n{input}", "alpaca"),
    "cnn-dm": Benchmark("abisee/cnn_dailymail", "3.0.0", "test", "Summarize this article:\n\n{article}", "cnn-dm"),
}


def choose_prompts(
    given: str, validation: Split | None, tokenizer: Any, template: str, limit: int, longest: int
) -> Prompts:
    """Reads the prompts that parameter evaluation_prompts names.

    Args:
        given: files, names of benchmarks with commas between them, or empty for the validation split.
        validation: that split; None where there is none.
        tokenizer: the target's.
        template: name of the chat template.
        limit: how many of the validation split, of the files or of each benchmark; 0 for all.
        longest: longer prompts than this are left out, in tokens.
    """
    benchmarks = _named(given)
    if not given:
        if validation is None:
            raise DraftModelError("dataset_validation_split, evaluation_prompts: neither is given; nothing to decode")
        found = list(islice(_of_split(validation), limit or None))
        source = VALIDATION
    else:
        rows = [row for benchmark in benchmarks for row in _of_benchmark(benchmark, limit)]
        source = ", ".join(benchmark.hub_id for benchmark in benchmarks) or given
        found = encode(rows or _of_files(given, limit), source, tokenizer, template)
    kept = [(tokens, category) for tokens, category in found if 2 <= len(tokens) <= longest]
    if not kept:
        name = "evaluation_prompts" if given else "dataset_validation_split"
        raise DraftModelError(f"{name}: none of {source} has a prompt of 2 to {longest} tokens to decode from")
    if len(kept) < len(found):
        logger.info(
            "%d of %d prompts are left out: not 2 to %d tokens long", len(found) - len(kept), len(found), longest
        )
    groups: dict[str, list[list[int]]] = {}
    for tokens, category in kept:
        groups.setdefault(category, []).append(tokens)
    return Prompts(groups, source)


def encode(rows: Sequence[tuple[Row, str]], source: str, tokenizer: Any, template: str) -> list[tuple[list[int], str]]:
    """Token ids of prompts with their categories; the chat template runs in a limited process and may refuse one."""
    with Workers() as worker:
        encoded = worker.call(encode_prompts, tokenizer, template, [row for row, _ in rows])
    found = []
    for number, (prompt, (_, category)) in enumerate(zip(encoded, rows, strict=True), start=1):
        if isinstance(prompt, str):
            raise DraftModelError(
                f"evaluation_prompts: conversation {number} of {source} makes no prompt ({prompt}); allowed: {_ALLOWED}"
            )
        found.append((prompt, category))
    return found


def check(p: Parameters, tokenizer: Any = None) -> None:
    """Reads as many prompts of files as the evaluation will, before anything runs; benchmarks are left to `ask_hub`.

    With the target's tokenizer it writes them too, so that one that the chat template refuses is found.
    """
    if p.evaluation_prompts and not _named(p.evaluation_prompts):
        rows = _of_files(p.evaluation_prompts, p.evaluation_conversations)
        if tokenizer is not None:
            encode(rows, p.evaluation_prompts, tokenizer, p.chat_template)


def to_fetch(given: str) -> list[str]:
    """The Hub's ids of the benchmarks that evaluation_prompts names and the cache of `datasets` here does not have."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    folders = {it.hub_id: cache / it.hub_id.replace("/", "___") / it.config for it in _named(given)}
    return [hub_id for hub_id, folder in folders.items() if not folder.is_dir()]


def ask_hub(names: Sequence[str], seconds: float) -> tuple[list[str], list[str]]:
    """Asks the Hub whether it has benchmarks; returns problems, and notes where it does not answer from here."""
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


def _of_split(split: Split) -> Iterator[tuple[list[int], str]]:
    """The conversations up to their last assistant turn."""
    for index in range(len(split)):
        row = split[index]
        starts = [at for at in range(1, len(row.loss_mask)) if row.loss_mask[at] and not row.loss_mask[at - 1]]
        if starts:
            yield row.input_ids[: starts[-1]].tolist(), "first reply" if len(starts) == 1 else "later reply"


def _of_files(given: str, limit: int) -> list[tuple[Row, str]]:
    """Conversations of files with their categories."""
    try:
        rows = read_conversations(given, limit)
    except DraftModelError as error:
        others = ", or name benchmarks: " + ", ".join(BENCHMARKS)
        problems = [problem + (others if "there is no" in problem else "") for problem in error.problems]
        raise DraftModelError([f"evaluation_prompts: {problem}" for problem in problems]) from error
    if not rows:
        raise DraftModelError(f"evaluation_prompts: there is no line in {given}; allowed: {_ALLOWED}")
    return [(row, str(row.columns.get("category") or "prompts")) for row in rows]


def _of_benchmark(benchmark: Benchmark, limit: int) -> list[tuple[Row, str]]:
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
    texts = [benchmark.text.format_map(row).strip() for row in chosen]
    categories = [benchmark.category.format_map(row) for row in chosen]
    return [(Row([{"role": "user", "content": text}]), it) for text, it in zip(texts, categories, strict=True)]
