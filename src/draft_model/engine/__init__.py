"""An inference engine, vLLM or SGLang, in a process of its own.

A `Process` loads the target, alone or with a draft, and answers requests: JSON lines on its standard input and output,
its log on standard error. A crash, a refused draft or exhausted memory ends that process alone and becomes one
sentence here. This module and those that the process runs import nothing but the standard library and the engine, so
the engine may live in another environment, whose Python DRAFT_MODEL_ENGINE_PYTHON names.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import reduce
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from draft_model.errors import DraftModelError
from draft_model.processes import ROOT, end_with_parent

if TYPE_CHECKING:
    from typing import Self  # not in every engine's Python

PYTHON = "DRAFT_MODEL_ENGINE_PYTHON"  # environment variable: the Python that has the engine; not set: this one
TIME_LIMIT = 2 * 3600  # seconds that one process may take
TIE_MARGINS = {"float32": 1e-4, "float16": 0.06, "bfloat16": 0.5}
"""By compute type: two tokens tie where their logprobs are closer than this, because a forward pass over K + 1 tokens
rounds otherwise than one over a single token. For 16 bits, about four steps of a logit between 16 and 32."""


@dataclass(frozen=True)
class Job:
    """What one process loads and decodes."""

    target: str  # folder
    draft: str  # folder; empty for the target alone
    method: str  # the draft's family, as the engine names it
    options: dict[str, int]  # the engine's further settings of speculative decoding
    proposals: int  # K, tokens proposed in a round
    groups: list[list[list[int]]]  # token ids of the prompts by category
    max_new_tokens: int
    end_tokens: list[int]
    temperature: float  # of sampling, which is measured beside greedy decoding; 0: greedy alone
    seed: int  # of sampling
    gpus: int = 0  # over which the target is split; 0: on a CPU
    memory_share: float = 0.9  # of each GPU's memory that this process may take

    @property
    def prompts(self) -> list[list[int]]:
        """All prompts, category by category."""
        return [prompt for group in self.groups for prompt in group]

    def batch(self, size: int, number: int) -> list[list[int]]:
        """The prompts of the n-th timed run: taken in turn, again where there are not enough."""
        return [self.prompts[index % len(self.prompts)] for index in range(number * size, (number + 1) * size)]


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

    @property
    def standard_error(self) -> float:
        """Of the acceptance length, with rounds taken as independent."""
        rounds = max(1, self.rounds)
        square = sum((2 * k + 1) * count for k, count in enumerate(self.by_position)) / rounds  # mean of accepted^2
        return math.sqrt(max(0.0, square - (self.accepted / rounds) ** 2) / rounds)

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
    # Of the target alone: best logprob less the second, by token.
    margins: list[list[list[float]]] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)  # of greedy decoding by category; empty for the target alone
    drafted: list[list[list[bool]]] = field(default_factory=list)  # whether the draft proposed a token, where known
    sampled: Counts | None = None  # of sampling, over all categories
    speed: dict[int, float] = field(default_factory=dict)  # tokens per second by batch size; of our own decoder

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


def compare_replies(alone: Measured, found: Measured) -> tuple[int, list[Difference]]:
    """Compares replies with the target's own, token by token; both are of one compute type.

    Returns:
        Tokens compared, up to a reply's end or first difference, and the differences.
    """
    compared, differences, tie_margin = 0, [], TIE_MARGINS.get(alone.dtype, TIE_MARGINS["bfloat16"])
    decoded, expected = ([*chain.from_iterable(its.outputs)] for its in (found, alone))
    margins = [*chain.from_iterable(alone.margins)]
    for number, (reply, own) in enumerate(zip(decoded, expected, strict=True)):
        length = min(len(reply), len(own))
        position = next((i for i in range(length) if reply[i] != own[i]), length)
        compared += position
        if position == len(reply) == len(own):
            continue
        apart = margins[number][position] if position < length else None  # None: one reply goes on
        tie = apart is not None and apart < tie_margin
        differences.append(Difference(number, position, apart, tie))
    return compared, differences


def choose(wanted: str) -> str:
    """The engine that evaluation_engine means: vllm, sglang or transformers; `auto` is vLLM where it can be imported.

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


class Process:
    """A running engine; leaving the context ends it and all that it started.

    `engine` is a module of this package that reads the job and answers; after time_limit seconds it is ended.
    """

    enlarge, lower = "number_of_gpu_to_use_evaluation", "evaluation_max_new_tokens and evaluation_batch_sizes"
    """Parameters to change where memory does not suffice."""

    def __init__(
        self, engine: str, job: Any, time_limit: float = TIME_LIMIT, environment: Mapping[str, str] | None = None
    ) -> None:
        draft = getattr(job, "draft", "")
        self.name = f"evaluation_engine: {engine} with the {'draft' if draft else 'target alone'}"
        self._log: deque[str] = deque(maxlen=400)
        self._late, self._limit = False, time_limit
        # This package alone: what is installed beside it is not for the engine, which may be another Python's.
        self._package = tempfile.TemporaryDirectory()
        Path(self._package.name, "draft_model").symlink_to(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [self._package.name, os.environ.get("PYTHONPATH")]))
        # A session of its own, because the engine starts processes too and all of them must end.
        self._process = subprocess.Popen(
            [_python(), "-m", f"draft_model.engine.{engine}"], text=True, errors="replace",
            env={**os.environ, "PYTHONPATH": path, ROOT: str(os.getpid()), **(environment or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._copy_log, self._end_group)]
        self._timer = threading.Timer(time_limit, self._end_late)
        for thread in (*self._threads, self._timer):
            thread.start()
        self.send(asdict(job))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._package.cleanup()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the process's engine with JSON values; returns its result as JSON.

        Raises:
            DraftModelError: when the process fails; says why and what to do.
        """
        self.send([method, *arguments])
        return self.receive()

    def receive(self) -> Any:
        """Waits for an answer, JSON; raises as `ask`."""
        if answer := self._process.stdout.readline():  # type: ignore[union-attr]
            return json.loads(answer)
        code = self._process.wait()
        self._kill()
        if self._late:
            raise DraftModelError(
                f"{self.name} took longer than {self._limit / 60:.0f} minutes; lower evaluation_conversations or "
                "evaluation_max_new_tokens"
            )
        raise DraftModelError(f"{self.name} {explain(code, ''.join(self._log), self.enlarge, self.lower)}")

    def measure(self) -> Measured:
        """Decodes all prompts of the job."""
        values = self.ask("measure")
        sampled = values["sampled"] and Counts(**values["sampled"])
        return Measured(**{**values, "counts": [Counts(**its) for its in values["counts"]], "sampled": sampled})

    def send(self, value: Any) -> None:
        """Sends a JSON value."""
        with suppress(BrokenPipeError):  # the process is gone: its answer says why
            self._process.stdin.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def _copy_log(self) -> None:
        for line in self._process.stderr:  # type: ignore[union-attr]
            sys.stderr.write(line)
            self._log.append(line)

    def _end_group(self) -> None:
        """What the engine started must not outlive it, and holds the pipes open."""
        self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _end_late(self) -> None:
        self._late = True
        self._process.kill()

    def _kill(self) -> None:
        self._timer.cancel()
        self._process.kill()
        for thread in self._threads:
            thread.join(10)


_MEMORY = re.compile(
    r"out of memory|OutOfMemory|Cannot allocate memory|No available memory for the cache blocks|"
    r"larger than the available KV cache memory|less than desired GPU memory utilization",
    re.IGNORECASE,
)
_ERROR = re.compile(
    r"^(?:\([^)]*\)\s*|\[rank\d+\]:\s*)*(?:ERROR\s[^\]]*\]\s*)?((?:\w+\.)*\w*(?:Error|Exception|Exit)): (\S.*)$",
    re.MULTILINE,
)
_CONSEQUENCE = re.compile(r"initialization failed|EngineDeadError|See (?:root cause above|stack trace)")


def explain(code: int, log: str, enlarge: str, lower: str) -> str:
    """Why a process ended with an exit status (negative: a signal) and these last lines of its log; half a sentence."""
    log = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log)
    causes = [
        f"{kind.rpartition('.')[2]}: {text}" for kind, text in _ERROR.findall(log) if not _CONSEQUENCE.search(text)
    ]
    if _MEMORY.search(log) or code == -signal.SIGKILL:
        reason = next((cause for cause in reversed(causes) if _MEMORY.search(cause)), f"exit status {code}")
        return f"ran out of memory ({reason}); use larger GPUs or a higher {enlarge}, or lower {lower}"
    if causes:
        return f"failed: {causes[-1]}"
    if code < 0:
        return f"was ended by signal {-code} ({signal.Signals(-code).name}); its log is above"
    return f"failed with exit status {code}: {(log.strip().splitlines() or ['it wrote no log'])[-1]}"


def begin() -> TextIO:
    """Begins an engine's process, which ends with the one that started it; returns where its answers go."""
    signal.signal(signal.SIGTERM, _end_all)
    end_with_parent()  # the end of the input is not seen while the engine loads
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is its log
    return answers


def _end_all(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)  # what the engine started too, or it keeps the GPU's memory


class Engine(ABC):
    """An engine with one job's target, in its own process."""

    job: Job

    @abstractmethod
    def describe(self) -> tuple[str, str, str]:
        """The engine's name and version, the hardware, and the compute type."""

    @abstractmethod
    def decode(
        self, prompts: list[list[int]], temperature: float = 0.0, margins: bool = False
    ) -> tuple[list[list[int]], list[list[float]], Counts]:
        """Replies, how far the two best logprobs lie apart at each token (where asked for), and what was counted."""

    def measure(self) -> Measured:
        """Greedy decoding of all prompts, and sampling where the job has a temperature."""
        job, alone = self.job, not self.job.draft
        greedy = [self.decode(group, margins=alone) for group in job.groups]
        return Measured(
            *self.describe(),
            outputs=[replies for replies, _, _ in greedy],
            margins=[margins for _, margins, _ in greedy] if alone else [],
            counts=[] if alone else [counts for _, _, counts in greedy],
            sampled=self.decode(job.prompts, job.temperature)[2] if job.draft and job.temperature else None,
        )

    def time(self, size: int, number: int) -> float:
        """Tokens per second of the n-th batch of a size."""
        started = time.perf_counter()
        replies, _, _ = self.decode(self.job.batch(size, number))
        return sum(map(len, replies)) / (time.perf_counter() - started)


def serve(load: Callable[[Any], Any], job: type = Job) -> None:
    """Main function of an engine's process: a job, then [method, argument, ...] a line; a JSON line in answer to each.

    `load` makes the engine of a job.
    """
    answers = begin()
    engine = load(job(**json.loads(sys.stdin.readline())))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer = getattr(engine, method)(*arguments)
        print(json.dumps(asdict(answer) if is_dataclass(answer) else answer), file=answers, flush=True)  # type: ignore[arg-type]
    _end_all()
