"""Drafts of one target on the same prompts: in an engine where there is one, else by our own greedy decoder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from draft_model import engine as engines
from draft_model.dataset.encode import end_tokens, load_tokenizer
from draft_model.dataset.tokens import Split
from draft_model.drafts import family
from draft_model.drafts.base import Draft
from draft_model.engine import Job, Measured, Process
from draft_model.errors import DraftModelError
from draft_model.evaluation import greedy
from draft_model.evaluation.prompts import Prompts, choose_prompts
from draft_model.parameters import Parameters
from draft_model.ranks import hardware
from draft_model.target.model import Target, load_target
from draft_model.workers import Workers

logger = logging.getLogger(__name__)

ROUNDS = 3  # timed runs at each batch size, of which the median counts
CPU_BATCH_SIZE = 4  # A CPU is timed with at most so many requests at once

Row = dict[str, Any]
Times = dict[int, list[float]]  # tokens per second of each run, by batch size


@dataclass(frozen=True)
class Case:
    """What all measurements of an evaluation share."""

    parameters: Parameters
    model: Path  # folder of the target
    tokenizer: Any
    prompts: Prompts
    end_tokens: list[int]  # ids that end a reply
    engine: str  # vllm, sglang, or transformers: our own decoder
    gpus: int  # over which an engine splits the target; 0: on a CPU
    work: Path

    @property
    def target_bytes(self) -> int:
        """Of the target's weights on disk."""
        return sum(path.stat().st_size for path in self.model.glob("*.safetensors"))


@dataclass(frozen=True)
class Candidate:
    """A draft to measure: its name in messages, its weights, and the folder where an engine reads it."""

    name: str
    draft: Draft
    folder: Path
    timed: tuple[int, ...] = ()  # numbers of proposals at which an engine's throughput is timed
    required: bool = True  # what fails of another one is noted, and the rest goes on


@dataclass(frozen=True)
class Results:
    """What was measured on a case's prompts."""

    alone: Measured
    drafts: list[Measured | None]  # in the order of the candidates; None where an optional one failed
    speed: list[list[Row]]  # of each candidate: tokens per second with it and without, by proposals and batch size
    timing: str  # how the two were timed against one another
    not_measured: list[str]  # what failed, a sentence each


def check_engine(p: Parameters) -> str:
    """The engine to measure in; raises where it is not installed, or something that it cannot do is asked for."""
    engine = engines.choose(p.evaluation_engine)
    if p.evaluation_temperature and engine == "transformers":
        raise DraftModelError(
            f"evaluation_temperature: given {p.evaluation_temperature:g}, but only an engine measures sampling, and "
            "there is none here: install vLLM, or leave it out"
        )
    return engine


def open_case(p: Parameters, model: Path, dataset: Path | None, template: str, longest: int, work: Path) -> Case:
    """Chooses the engine and the prompts; `template` counts where there is no data set.

    `model` and `dataset` are local folders, `longest` the positions that the draft has.
    """
    engine = check_engine(p)
    with Workers() as worker:  # it is a stranger's
        tokenizer = worker.call(load_tokenizer, model)
    if dataset is not None:
        template = json.loads((dataset / "report.json").read_text(encoding="utf-8"))["chat_template"]
    split = Split(dataset / "validation") if dataset and (dataset / "validation").is_dir() else None
    longest -= p.evaluation_max_new_tokens + max(timed_proposals(p)) + 1
    prompts = choose_prompts(p.evaluation_prompts, split, tokenizer, template, p.evaluation_conversations, longest)
    ends = end_tokens(model, tokenizer, template)
    return Case(p, model, tokenizer, prompts, ends, engine, 0 if engine == "transformers" else gpus_of(p), work)


def gpus_of(p: Parameters) -> int:
    """GPUs that an engine splits the target over; 0 on a machine without any."""
    there = torch.cuda.device_count()
    wanted = p.number_of_gpu_to_use_evaluation or p.number_of_gpu_to_use_draft_model_training
    if wanted > there > 0:
        raise DraftModelError(
            f"number_of_gpu_to_use_evaluation: {wanted} are asked for (0: as many as a node of the training), and "
            f"this machine has {there}: lower it"
        )
    return min(wanted, there)


def timed_proposals(p: Parameters, block: int = 0) -> tuple[int, ...]:
    """Numbers of proposals that a draft's throughput is timed with, to find the best one; a block's own alone."""
    return (p.num_speculative_tokens,) if block else tuple(range(1, p.num_speculative_tokens + 3))


def measure(case: Case, candidates: Sequence[Candidate]) -> Results:
    """Decodes the prompts with the target alone and with each draft; an engine that fails is a DraftModelError."""
    if case.engine != "transformers":
        return _in_engine(case, candidates)
    try:
        return _by_our_decoder(case, candidates)
    except torch.OutOfMemoryError as error:
        raise DraftModelError(
            f"evaluation: out of GPU memory while decoding in float32 ({str(error).splitlines()[0]}); install vLLM for "
            "evaluation_engine=vllm, which decodes in the target's own type on several GPUs"
        ) from error


def _in_engine(case: Case, candidates: Sequence[Candidate]) -> Results:
    """One engine process per draft and number of proposals, beside one of the target alone where memory holds both."""
    usual, problems = case.parameters.num_speculative_tokens, list[str]()
    sizes = [int(size) for size in case.parameters.evaluation_batch_sizes.split(",") if size]
    sizes = [size for size in sizes if case.gpus or size <= CPU_BATCH_SIZE]
    both = bool(sizes) and _holds_two_targets(case)

    def process(candidate: Candidate | None, proposals: int) -> Process:
        return Process(case.engine, job_of(case, candidate, proposals, 0.45 if both else 0.9))

    drafts: list[Measured | None] = []
    timed: list[list[tuple[int, Times, Times]]] = []
    with ExitStack() as stack:
        alone = stack.enter_context(process(None, usual))
        reference = alone.measure()
        before: Times = {} if both else _time([alone], sizes)[0]
        if not both:
            stack.close()
        for candidate in candidates:
            found, runs = None, []
            for proposals in dict.fromkeys((usual, *(candidate.timed if sizes else ()))):
                try:
                    with process(candidate, proposals) as helped:
                        if proposals == usual:
                            found = helped.measure()
                        if sizes and proposals in candidate.timed:
                            *own, theirs = _time([alone, helped] if both else [helped], sizes)
                            runs.append((proposals, own[0] if own else before, theirs))
                except DraftModelError as error:
                    if found is None and candidate.required:
                        raise
                    problems.append(f"{candidate.name}, {proposals} tokens proposed at a time: {error}")
                    logger.warning("not measured: %s", problems[-1])
            drafts.append(found)
            timed.append(runs)
    if before:
        with process(None, usual) as again:  # a machine may have become slower meanwhile
            for size, times in _time([again], sizes)[0].items():
                before[size] += times
    timing = "in turn, run by run" if both else "one after the other, the target alone before and after the others"
    return Results(reference, drafts, [_speed_rows(runs) for runs in timed], timing, problems)


def _holds_two_targets(case: Case) -> bool:
    if case.gpus:
        return case.target_bytes / case.gpus < 0.35 * torch.cuda.get_device_properties(0).total_memory
    return 5 * case.target_bytes < psutil.virtual_memory().available  # 16-bit weights twice in float32, and the rest


def _time(processes: Sequence[Process], sizes: Sequence[int]) -> list[Times]:
    """Times processes in turn, each with the same prompts, after a run that warms up."""
    times: list[Times] = [{size: [] for size in sizes} for _ in processes]
    for process in processes if sizes else ():
        process.ask("time", max(sizes), 0)
    for number in range(ROUNDS):
        for size in sizes:
            for process, its in zip(processes, times, strict=True):
                its[size].append(process.ask("time", size, number))
    return times


def _speed_rows(runs: Sequence[tuple[int, Times, Times]]) -> list[Row]:
    return [
        {
            "num_speculative_tokens": proposals,
            "batch_size": size,
            "target_alone_tokens_per_second": median(own),
            "tokens_per_second": median(theirs[size]),
            "speed_up": median(theirs[size]) / median(own),
        }
        for proposals, alone, theirs in runs
        for size, own in alone.items()
    ]


def recommend(rows: Sequence[Row]) -> int | None:
    """The number of proposals with the highest geometric mean of speed-ups; None where only one was timed."""
    logs: dict[int, float] = {}
    for row in rows:
        k = row["num_speculative_tokens"]
        logs[k] = logs.get(k, 0.0) + math.log(row["speed_up"])
    return max(logs, key=logs.__getitem__) if len(logs) > 1 else None


def job_of(case: Case, candidate: Candidate | None, proposals: int, share: float = 0.9) -> Job:
    """What an engine, or our decoder, is to load and decode; without a candidate the target alone."""
    p = case.parameters
    method, options = "", {}
    if candidate:
        its = family(candidate.draft.config.family)
        method, options = its.vllm_method, {"num_speculative_tokens": proposals}
        if case.engine == "sglang":
            options = {name.replace("-", "_"): value for name, value in its.sglang_options(proposals).items()}
            method = its.sglang_algorithm
    return Job(
        target=str(case.model),
        draft=str(candidate.folder) if candidate else "",
        method=method,
        options=options,
        proposals=proposals,
        groups=list(case.prompts.groups.values()),
        max_new_tokens=p.evaluation_max_new_tokens,
        end_tokens=case.end_tokens,
        temperature=p.evaluation_temperature,
        seed=p.seed,
        gpus=case.gpus,
        memory_share=share,
    )


def _by_our_decoder(case: Case, candidates: Sequence[Candidate]) -> Results:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = [candidate.draft.config.aux_layers for candidate in candidates]
    target = load_target(case.model, layers[0], torch.float32, device)
    proposals = case.parameters.num_speculative_tokens
    alone = greedy.run(job_of(case, None, proposals), target, None, "target alone", hardware(device))
    drafts = [
        greedy.run(
            job_of(case, candidate, proposals), Target(target.model, its), candidate.draft.to(device),
            f"with {candidate.name}", hardware(device),
        )
        for candidate, its in zip(candidates, layers, strict=True)
    ]  # fmt: skip
    own = {size: [speed] for size, speed in alone.speed.items()}
    speed = [_speed_rows([(proposals, own, {size: [each] for size, each in found.speed.items()})]) for found in drafts]
    return Results(alone, [*drafts], speed, "one after the other", [])


def category_table(case: Case, found: Measured) -> list[dict[str, Any]]:
    """Acceptance length by category of the prompts."""
    return [
        {
            "category": category,
            "prompts": len(prompts),
            "rounds": its.rounds,
            "acceptance_length": its.acceptance_length,
        }
        for (category, prompts), its in zip(case.prompts.groups.items(), found.counts, strict=True)
    ]
