"""Drafts of one target on the same prompts: in an engine where there is one, else by our own greedy decoder."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draft_model import engine as engines
from draft_model.dataset.encode import end_tokens, load_tokenizer
from draft_model.dataset.tokens import Split
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.engine import Difference, Job, Measured
from draft_model.errors import DraftModelError
from draft_model.evaluation import greedy
from draft_model.evaluation.prompts import Prompts, choose_prompts
from draft_model.parameters import Parameters
from draft_model.target.model import Target, load_target

BATCH_SIZES = [1, 4, 16, 64]
"""Requests at once, at which an engine's throughput is timed."""


@dataclass(frozen=True)
class Case:
    """What all measurements of an evaluation share."""

    parameters: Parameters
    model: Path  # folder of the target
    tokenizer: Any
    prompts: Prompts
    end_tokens: list[int]  # ids that end a reply
    engine: str  # vllm, sglang, or transformers: our own decoder
    work: Path


@dataclass(frozen=True)
class Candidate:
    """A draft to measure: its name in messages, its weights, and the folder where an engine reads it."""

    name: str
    draft: Eagle3Draft
    folder: Path


def check_engine(p: Parameters) -> str:
    """The engine to measure in.

    Raises:
        DraftModelError: when it is not installed, or something that it cannot do is asked for.
    """
    engine = engines.choose(p.evaluation_engine)
    if p.evaluation_temperature and engine == "transformers":
        raise DraftModelError(
            f"evaluation_temperature: given {p.evaluation_temperature:g}, but only an engine measures sampling, and "
            "there is none here: install vLLM, or leave it out"
        )
    return engine


def open_case(p: Parameters, model: Path, dataset: Path | None, template: str, longest: int, work: Path) -> Case:
    """Chooses the engine and the prompts.

    Args:
        p: of the run.
        model: folder of the target.
        dataset: folder of the data set; None where evaluation_prompts names prompts.
        template: name of the chat template, for a comparison without a data set.
        longest: positions that the draft has.
        work: scratch folder.
    """
    engine = check_engine(p)
    tokenizer = load_tokenizer(model)
    if dataset is not None:
        template = json.loads((dataset / "report.json").read_text(encoding="utf-8"))["chat_template"]
    split = Split(dataset / "validation") if dataset and (dataset / "validation").is_dir() else None
    longest -= p.evaluation_max_new_tokens + p.num_speculative_tokens + 1
    prompts = choose_prompts(p.evaluation_prompts, split, tokenizer, template, p.evaluation_conversations, longest)
    return Case(p, model, tokenizer, prompts, end_tokens(model, tokenizer, template), engine, work)


def measure(case: Case, candidates: Sequence[Candidate]) -> list[Measured]:
    """Decodes the prompts with the target alone, which comes first, and with each draft.

    Raises:
        DraftModelError: when the engine fails, or the target does not fit in memory.
    """
    if case.engine != "transformers":
        return [
            engines.measure(case.engine, _job(case, folder), case.work / "engine")
            for folder in ("", *(str(candidate.folder) for candidate in candidates))
        ]
    try:
        return _by_our_decoder(case, candidates)
    except torch.OutOfMemoryError as error:
        raise DraftModelError(
            f"evaluation: out of GPU memory while decoding in float32 ({str(error).splitlines()[0]}); install vLLM for "
            "evaluation_engine=vllm, which decodes in the target's own type on several GPUs"
        ) from error


def _job(case: Case, draft: str) -> Job:
    p = case.parameters
    return Job(
        target=str(case.model),
        draft=draft,
        method="eagle3",
        proposals=p.num_speculative_tokens,
        groups=list(case.prompts.groups.values()),
        max_new_tokens=p.evaluation_max_new_tokens,
        end_tokens=case.end_tokens,
        temperature=p.evaluation_temperature,
        seed=p.seed,
        batch_sizes=BATCH_SIZES,
    )


def _by_our_decoder(case: Case, candidates: Sequence[Candidate]) -> list[Measured]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = [candidate.draft.config.aux_layers for candidate in candidates]
    target = load_target(case.model, layers[0], torch.float32, device)
    hardware = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    found = [greedy.run(_job(case, ""), target, None, "target alone", hardware)]
    for candidate, its in zip(candidates, layers, strict=True):
        draft = candidate.draft.to(device)
        found.append(
            greedy.run(_job(case, "draft"), Target(target.model, its), draft, f"with {candidate.name}", hardware)
        )
    return found


def differences(alone: Measured, found: Measured) -> tuple[int, list[Difference]]:
    """Tokens compared with the target's own replies, and where a draft's replies differ; see `compare_replies`."""
    expected = [reply for group in alone.outputs for reply in group]
    margins = [own for group in alone.margins for own in group]
    return engines.compare_replies(
        [reply for group in found.outputs for reply in group], expected, margins, alone.dtype
    )


def speed_table(alone: Measured, found: Measured) -> list[dict[str, Any]]:
    """Tokens per second of the target alone and with a draft, by batch size."""
    names = ("batch_size", "target_alone_tokens_per_second", "tokens_per_second", "speed_up")
    rows = ((size, speed, found.speed[size], found.speed[size] / speed) for size, speed in alone.speed.items())
    return [dict(zip(names, row, strict=True)) for row in rows]


def category_table(case: Case, found: Measured) -> list[dict[str, Any]]:
    """Acceptance length by category of the prompts."""
    names = ("category", "prompts", "rounds", "acceptance_length")
    pairs = zip(case.prompts.groups.items(), found.counts, strict=True)
    rows = ((category, len(prompts), its.rounds, its.acceptance_length) for (category, prompts), its in pairs)
    return [dict(zip(names, row, strict=True)) for row in rows]
