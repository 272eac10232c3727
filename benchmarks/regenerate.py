"""What regeneration adds to the engine's own time, and what it gains in accepted tokens; both on this machine.

    python benchmarks/regenerate.py overhead demo/SmolLM2-135M-Instruct
    python benchmarks/regenerate.py gain demo/SmolLM2-135M-Instruct

`overhead` times the stage (reading, rendering, tokens, upload, report; not the engine's start) beside a loop of
`LLM.chat`, turn by turn over the same conversations with the same arguments, in vLLM for CPU.

`gain` trains two drafts with the same questions, steps and settings, one on foreign answers and one on the target's
own, and gives the acceptance length that the trainer simulates on the target's own greedy answers to other questions.
The foreign answers are people's: the questions ask what functions of NumPy do, and the answers are those functions'
docstrings: their prose up to the parameters, then their examples.
"""

from __future__ import annotations

import gzip
import inspect
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from draft_model import dataset, jobs, model_import
from draft_model.engine import PYTHON
from draft_model.engine.generate import Request
from draft_model.parameters import Parameters
from draft_model.regenerate import RegenerateConfig, run, stage
from draft_model.training import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples/smollm2"
COMMON = {"chat_template": "qwen", "regenerate_temperature": 0.0}
LOOP = """
import json, sys, time
from vllm import LLM, SamplingParams
from draft_model.engine.vllm import _CPU
model, rows, longest, context = json.loads(sys.argv[1])
llm = LLM(model=model, dtype="float32", max_model_len=context, enforce_eager=True, enable_prefix_caching=True, seed=0)
sampling = SamplingParams(temperature=0, max_tokens=longest)
llm.chat([[{"role": "user", "content": "Hello"}]], sampling, use_tqdm=False)
started, chats = time.perf_counter(), [[] for _ in rows]
for turn in range(max(map(len, rows))):
    going = [index for index, row in enumerate(rows) if turn < len(row)]
    for index in going:
        chats[index].append({"role": "user", "content": rows[index][turn]})
    for index, output in zip(going, llm.chat([chats[index] for index in going], sampling, use_tqdm=False)):
        chats[index].append({"role": "assistant", "content": output.outputs[0].text})
print("SECONDS", time.perf_counter() - started)
"""


def read(split: str, count: int) -> list[dict[str, Any]]:
    """The first conversations of the demo's data."""
    text = gzip.decompress((EXAMPLES / f"{split}.jsonl.gz").read_bytes())
    return [json.loads(line) for line in text.splitlines()[:count]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def imported(folder: str, work: Path) -> str:
    """The target, as the stages read it."""
    p = Parameters(pytorch_model_path=str(Path(folder).resolve()))
    return model_import.run(model_import.ImportConfig(str(work / "model"), work / "import", p)).uri


def overhead(folder: str, work: Path, count: int = 64, longest: int = 48, context: int = 512) -> None:
    """Prints conversations per second of the stage and of a plain loop, alternating."""
    model, rows = imported(folder, work), read("train", count)
    data = write(work / "train.jsonl", rows)
    p = Parameters(
        dataset_train_split=data,
        regenerate_answers="train",
        regenerate_max_new_tokens=longest,
        max_length=context,
        **COMMON,
    )
    start, started = stage._start_engines, [0.0]

    def warm(*given: Any) -> Iterator[Any]:
        for engine in start(*given):
            engine.submit(Request(-1, [1, 2, 3], 4, 0))
            engine.next()
            started[0] = time.perf_counter()
            yield engine

    stage._start_engines = warm  # type: ignore[assignment]
    questions = [[m["content"] for m in row["conversations"] if m["role"] == "user"] for row in rows]
    loop = [os.environ[PYTHON], "-c", LOOP, json.dumps([model, questions, longest, context])]
    path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    for attempt in range(2):
        log = subprocess.run(loop, env=environment, capture_output=True, text=True, check=True).stdout
        plain = float(re.search(r"SECONDS (\S+)", log)[1])  # type: ignore[index]
        run(RegenerateConfig(model, str(work / f"own-{attempt}"), p, work / f"work-{attempt}"))
        own = time.perf_counter() - started[0]
        print(
            f"LLM.chat loop {count / plain:.2f} conversations/s, the stage {count / own:.2f} "
            f"({own / plain - 1:+.1%} time)"
        )


def numpy_questions(characters: int = 480) -> list[dict[str, Any]]:
    """What each function of NumPy does: prose and examples of its docstring, whole lines up to so many characters."""
    import numpy as np

    modules = (np, np.linalg, np.fft, np.random, np.strings, np.ma, np.polynomial.polynomial, np.testing)
    found = {}
    for module in modules:
        for name in sorted(vars(module)):
            parts = re.split(r"\n([A-Z][\w ]+)\n-{4,}\n", inspect.getdoc(vars(module)[name]) or "")
            sections = dict(zip(parts[1::2], parts[2::2], strict=True))
            prose = "\n".join(line for line in parts[0].splitlines() if not re.match(r"\w+\(.*\)$", line)).strip()
            if name.startswith("_") or not prose or "Examples" not in sections:
                continue
            answer, lines = "", f"{prose}\n\nFor example:\n\n{sections['Examples'].strip()}".splitlines()
            for line in lines:
                if len(answer) + len(line) > characters:
                    break
                answer += f"{line}\n"
            question = f"What does NumPy's `{module.__name__}.{name}` do? Give an example."
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
            found.setdefault(answer, {"id": f"{module.__name__}.{name}", "conversations": messages})
    rows = list(found.values())
    random.Random(0).shuffle(rows)
    return rows


def gain(folder: str, work: Path, count: int = 160, held_out: int = 32, epochs: int = 2) -> None:
    """Prints acceptance lengths of the two drafts."""
    model, rows = imported(folder, work), numpy_questions()
    assert len(rows) >= count + held_out
    given = write(work / "foreign.jsonl", rows[:count])
    p = Parameters(
        dataset_train_split=given, dataset_validation_split=write(work / "held.jsonl", rows[count : count + held_out]),
        regenerate_answers="all", regenerate_max_new_tokens=96, max_length=192, max_rejected_fraction=0.1, **COMMON,
    )  # fmt: skip
    own = run(RegenerateConfig(model, str(work / "own"), p, work / "regenerate"))
    print({name: round(value, 3) for name, value in own.metrics().items()}, flush=True)
    parts = sorted(Path(own.split_uri("train")).glob("part-*"))
    answered = {json.loads(line)["id"] for part in parts for line in gzip.decompress(part.read_bytes()).splitlines()}
    write(Path(given), [row for row in rows[:count] if row["id"] in answered])  # the same questions for both
    steps = len(answered) * epochs // 2
    columns = ("trained on", "conversations", "supervised tokens", "steps", "acceptance length, K = 3")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, train in (("people's answers", given), ("the target's own answers", own.split_uri("train"))):
        settings = Parameters(
            dataset_train_split=train, dataset_validation_split=own.split_uri("validation"), chat_template="qwen",
            draft_model_config=str(EXAMPLES / "draft.json"), max_length=192, ttt_length=3, num_epochs=epochs,
            total_steps=steps, eval_interval=epochs, draft_global_batch_size=2, draft_micro_batch_size=2,
            training_batch_size=2, draft_optimizer="muon", learning_rate=0.001, warmup_ratio=0.03, log_steps=40,
            training_backend="local", max_rejected_fraction=0.1,
        )  # fmt: skip
        place = work / name.replace(" ", "-")
        built = dataset.run(dataset.DatasetConfig(model, str(place / "dataset"), settings, place / "work"))
        done = jobs.run(TrainConfig(model, built.uri, str(place / "output"), place / "train", settings))
        print(
            f"| {name} | {built.train.rows_kept} | {built.train.supervised_tokens:,} | {done.steps} | "
            f"{done.acceptance_length:.3f} |",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        {"overhead": overhead, "gain": gain}[sys.argv[1]](sys.argv[2], Path(scratch))
