"""An inference engine measures a draft: vLLM or SGLang, in a process of its own.

A process reads a `Job` as JSON, loads the target, alone or with a draft, decodes the prompts and writes a `Measured`. A
crash, a refused draft or exhausted memory ends that process alone and becomes one sentence here. This module and those
that the process runs import nothing but the standard library and the engine, so the engine may live in another
environment, whose Python DRAFT_MODEL_ENGINE_PYTHON names.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

from draft_model.errors import DraftModelError

PYTHON = "DRAFT_MODEL_ENGINE_PYTHON"
"""Environment variable: the Python that has the engine; not set: this one."""
ENGINES = ("vllm", "sglang")
TIME_LIMIT = 2 * 3600
"""Seconds that one process may take."""
TIE_MARGINS = {"float32": 1e-4, "float16": 0.06, "bfloat16": 0.5}
"""By compute type: two tokens tie where their logprobs are closer than this, because a forward pass over K + 1 tokens
rounds otherwise than one over a single token. For 16 bits, about four steps of a logit between 16 and 32."""
_SOURCES = str(Path(__file__).parents[2])
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    target: str  # folder
    draft: str  # folder; empty for the target alone
    method: str  # the draft's family, as vLLM names it
    proposals: int  # K, tokens proposed in a round
    groups: list[list[list[int]]]  # token ids of the prompts by category
    max_new_tokens: int
    end_tokens: list[int]
    temperature: float  # of sampling, which is measured beside greedy decoding; 0: greedy alone
    seed: int  # of sampling
    batch_sizes: list[int]  # throughput is timed with so many requests at once


@dataclass(frozen=True)
class Counts:
    """What decoding with a draft counted, summed over rounds, as vLLM counts it."""

    rounds: int  # forward passes of the target that checked a draft; the prompt's own pass is none
    drafted: int  # proposed tokens
    accepted: int  # of them, those that were kept
    by_position: list[int]  # rounds that kept the k-th proposal, [K]

    def plus(self, other: Counts, sign: int = 1) -> Counts:
        """The sum of two counts, or their difference."""
        return Counts(
            self.rounds + sign * other.rounds,
            self.drafted + sign * other.drafted,
            self.accepted + sign * other.accepted,
            [a + sign * b for a, b in zip(self.by_position, other.by_position, strict=True)],
        )

    @property
    def acceptance_length(self) -> float:
        """Tokens per forward pass of the target: 1 + accepted / rounds."""
        return 1.0 + self.accepted / max(1, self.rounds)

    def report(self) -> dict[str, Any]:
        """The counts with the shares derived from them, as evaluation.json has them.

        Cumulative acceptance at k is the share of all rounds that kept the k-th proposal; conditional acceptance is
        the share of those that kept the one before, None where there are none.
        """
        reached = [self.rounds, *self.by_position]
        return {
            "acceptance_length": self.acceptance_length,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_by_position": [count / max(1, self.rounds) for count in self.by_position],
            "conditional_acceptance_by_position": [
                now / before if before else None for before, now in pairwise(reached)
            ],
        }


@dataclass(frozen=True)
class Measured:
    """What one process measured."""

    engine: str  # name and version
    hardware: str
    dtype: str  # compute type
    outputs: list[list[list[int]]]  # greedy replies by category and prompt, token ids, the end token included
    margins: list[list[list[float]]] = field(
        default_factory=list
    )  # target alone: best logprob less the second, by token
    counts: list[Counts] = field(default_factory=list)  # of greedy decoding by category; empty for the target alone
    drafted: list[list[list[bool]]] = field(
        default_factory=list
    )  # by token, whether the draft proposed it, where known
    sampled: Counts | None = None  # of sampling, over all categories
    speed: dict[int, float] = field(default_factory=dict)  # tokens per second by batch size

    @property
    def total(self) -> Counts:
        """Counts over all categories."""
        return reduce(Counts.plus, self.counts)


@dataclass(frozen=True)
class Difference:
    """Where a reply with the draft first differs from the target's own."""

    prompt: int  # from 0
    position: int  # of the token in the reply, from 0
    margin: float | None  # distance of the target's two best tokens there; None where one reply is longer
    tie: bool  # within the rounding of the compute type


def compare_replies(
    decoded: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    dtype: str,
) -> tuple[int, list[Difference]]:
    """Compares replies with the target's own, token by token.

    Args:
        decoded: with a draft, token ids.
        expected: the target's own.
        margins: by reply and token, how far the target's two best tokens lie apart there.
        dtype: compute type of both.

    Returns:
        Tokens compared, up to a reply's end or first difference, and the differences.
    """
    compared, differences = 0, []
    for number, (reply, own) in enumerate(zip(decoded, expected, strict=True)):
        length = min(len(reply), len(own))
        position = next((i for i in range(length) if reply[i] != own[i]), length)
        compared += position
        if position == len(reply) == len(own):
            continue
        apart = margins[number][position] if position < length else None  # None: one reply goes on
        tie = apart is not None and apart < TIE_MARGINS.get(dtype, TIE_MARGINS["bfloat16"])
        differences.append(Difference(number, position, apart, tie))
    return compared, differences


def choose(wanted: str) -> str:
    """The engine to measure in: vllm, sglang or transformers.

    Args:
        wanted: parameter evaluation_engine; `auto` takes vLLM where it can be imported.

    Raises:
        DraftModelError: when the engine that is asked for is not installed.
    """
    if wanted == "transformers" or (wanted == "auto" and not _can_import("vllm")):
        return "transformers"
    if wanted == "auto":
        return "vllm"
    if not _can_import(wanted):
        raise DraftModelError(
            f"evaluation_engine: given {wanted!r}, but {_python()} cannot import {wanted}; install it there, name the "
            f"Python that has it in {PYTHON}, or use evaluation_engine=transformers"
        )
    return wanted


def _python() -> str:
    return os.environ.get(PYTHON) or sys.executable


def _can_import(module: str) -> bool:
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([_python(), "-c", find], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise DraftModelError(f"{PYTHON}: given {_python()!r}, which cannot be run ({error})") from error


def measure(engine: str, job: Job, work: Path, time_limit: float = TIME_LIMIT) -> Measured:
    """Runs a job in a process of its own; its log goes to standard error.

    Args:
        engine: vllm or sglang.
        job: what to measure.
        work: scratch folder.
        time_limit: seconds after which the process is ended.

    Raises:
        DraftModelError: when the process fails; says why and what to do.
    """
    work.mkdir(parents=True, exist_ok=True)
    request, answer = work / "job.json", work / "measured.json"
    request.write_text(json.dumps(asdict(job)), encoding="utf-8")
    answer.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [_SOURCES, os.environ.get("PYTHONPATH")]))
    command = [_python(), "-m", f"draft_model.engine.{engine}", str(request), str(answer)]
    last: deque[str] = deque(maxlen=400)
    started = time.monotonic()
    # A session of its own, because the engine starts processes too and all of them must end.
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        timer = threading.Timer(time_limit, lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                text = line.decode("utf-8", "replace")
                sys.stderr.write(text)
                last.append(text)
            code = process.wait()
        finally:
            timer.cancel()
            with suppress(ProcessLookupError):  # what the engine started must not outlive it
                os.killpg(process.pid, signal.SIGKILL)
    if code == 0 and answer.exists():
        values = json.loads(answer.read_text(encoding="utf-8"))
        values["counts"] = [Counts(**counts) for counts in values["counts"]]
        values["sampled"] = Counts(**values["sampled"]) if values["sampled"] else None
        values["speed"] = {int(size): speed for size, speed in values["speed"].items()}
        return Measured(**values)
    name = f"evaluation_engine: {engine} {'with the draft' if job.draft else 'with the target alone'}"
    if time.monotonic() - started >= time_limit:
        raise DraftModelError(
            f"{name} took longer than {time_limit / 60:.0f} minutes; lower evaluation_conversations or "
            "evaluation_max_new_tokens"
        )
    raise DraftModelError(f"{name} {explain(code, ''.join(last))}")


_MEMORY = re.compile(
    r"out of memory|OutOfMemory|Cannot allocate memory|No available memory for the cache blocks|"
    r"larger than the available KV cache memory|less than desired GPU memory utilization",
    re.IGNORECASE,
)
_ERROR = re.compile(
    r"^(?:\([^)]*\)\s*)*(?:ERROR\s[^\]]*\]\s*)?((?:\w+\.)*\w*(?:Error|Exception|Exit)): (\S.*)$", re.MULTILINE
)
_CONSEQUENCE = re.compile(r"initialization failed|EngineDeadError|See (?:root cause above|stack trace)")


def explain(code: int, log: str) -> str:
    """What a failed process's exit status (negative: a signal) and last log lines say, as half a sentence."""
    log = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log)
    causes = [
        f"{kind.rpartition('.')[2]}: {text}" for kind, text in _ERROR.findall(log) if not _CONSEQUENCE.search(text)
    ]
    if _MEMORY.search(log) or code == -signal.SIGKILL:
        reason = next((cause for cause in reversed(causes) if _MEMORY.search(cause)), f"exit status {code}")
        return (
            f"ran out of memory ({reason}); use larger or more GPUs for the evaluation, or lower "
            "evaluation_max_new_tokens"
        )
    if causes:
        return f"failed: {causes[-1]}"
    if code < 0:
        return f"was ended by signal {-code} ({signal.Signals(-code).name}); its log is above"
    return f"failed with exit status {code}: {(log.strip().splitlines() or ['it wrote no log'])[-1]}"


def serve(run: Callable[[Job], Measured]) -> None:
    """Main function of an engine's process: job.json in, measured.json out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # end with the process that started this one
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(asdict(run(job))), encoding="utf-8")


def time_batches(job: Job, on_gpu: bool, generate: Callable[[list[list[int]]], int]) -> dict[int, float]:
    """Tokens per second by batch size: medians of three runs after one that warms up.

    Args:
        job: its prompts are taken in turn, again where a batch is larger.
        on_gpu: a CPU is timed with few requests only.
        generate: decodes prompts at once and returns how many tokens it wrote.
    """
    prompts = [prompt for group in job.groups for prompt in group]
    found = {}
    for size in job.batch_sizes if on_gpu else [size for size in job.batch_sizes if size <= 4]:
        batch = [prompts[index % len(prompts)] for index in range(size)]
        generate(batch)
        speeds = []
        for _ in range(3):
            started = time.perf_counter()
            speeds.append(generate(batch) / (time.perf_counter() - started))
        found[size] = sorted(speeds)[1]
    return found
