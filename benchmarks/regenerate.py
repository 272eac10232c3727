"""What regeneration adds to the engine's own time, and what it gains in accepted tokens; both on this machine.

    python benchmarks/regenerate.py overhead demo/SmolLM2-135M-Instruct
    python benchmarks/regenerate.py gain demo/SmolLM2-135M-Instruct

`overhead` times the stage (reading, rendering, tokens, upload, report) beside a loop of `LLM.chat`, turn by turn over
the same conversations with the same arguments, in vLLM for CPU. What both do once before the first conversation is not
timed: fetching the target, loading its tokenizer, starting the engine.

`gain` trains two drafts with the same questions, steps and settings, one on foreign answers and one on the target's
own, and gives the acceptance length that the trainer simulates on the target's own greedy answers to other questions.
The foreign answers are people's: the questions ask what functions of NumPy do, and the answers are those functions'
docstrings: their prose up to the parameters, then their examples.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from draft_model import dataset, jobs, model_import
from draft_model.dataset.encode import end_tokens, load_tokenizer
from draft_model.engine import PYTHON
from draft_model.engine.generate import Sampling, Settings, VllmGenerator
from draft_model.parameters import Parameters
from draft_model.regenerate import RegenerateConfig, run, stage
from draft_model.training import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples/smollm2"
COMMON = {"chat_template": "qwen", "regenerate_temperature": 0.0}
LOOP = """
import json, os, sys, time
from draft_model.engine.vllm import set_variables
set_variables(gpus=0)
from vllm import LLM, SamplingParams
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
model, longest, context = json.loads(sys.argv[1])
llm = LLM(model=model, dtype="float32", max_model_len=context, enforce_eager=True, enable_prefix_caching=True,
          generation_config="vllm", seed=0)
sampling = SamplingParams(temperature=0, max_tokens=longest)
for line in sys.stdin:
    rows = json.loads(line)
    started, chats, tokens = time.perf_counter(), [[] for _ in rows], 0
    for turn in range(max(map(len, rows))):
        going = [index for index, row in enumerate(rows) if turn < len(row)]
        for index in going:
            chats[index].append({"role": "user", "content": rows[index][turn]})
        for index, output in zip(going, llm.chat([chats[index] for index in going], sampling, use_tqdm=False)):
            chats[index].append({"role": "assistant", "content": output.outputs[0].text})
            tokens += len(output.outputs[0].token_ids) - (output.outputs[0].finish_reason == "stop")
    print(json.dumps([time.perf_counter() - started, tokens]), file=answers, flush=True)
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


def cpu_seconds(session: int) -> float:
    """CPU time of all processes of a session so far."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            stats.append(path.read_text().rpartition(")")[2].split())
    return sum(int(it[11]) + int(it[12]) for it in stats if int(it[3]) == session) / os.sysconf("SC_CLK_TCK")


def overhead(folder: str, work: Path, count: int, rounds: int = 5, longest: int = 64, context: int = 768) -> None:
    """Prints seconds of the stage and of a plain loop, which take turns; each keeps its engine and rests meanwhile."""
    model, rows = imported(folder, work), read("train", count * rounds + 8)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    command = [os.environ[PYTHON], "-c", LOOP, json.dumps([model, longest, context])]
    ends = end_tokens(Path(model), load_tokenizer(Path(model)), "qwen")
    given = Settings(model, context, Sampling(temperature=0), ends, 0)
    with (
        subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True
        ) as loop,
        VllmGenerator(given) as engine,
    ):

        def plain(rows: list[dict[str, Any]]) -> tuple[float, float, int]:
            questions = [[m["content"] for m in row["conversations"] if m["role"] == "user"] for row in rows]
            before = cpu_seconds(loop.pid)
            print(json.dumps(questions), file=loop.stdin, flush=True)
            seconds, tokens = json.loads(loop.stdout.readline())
            return seconds, cpu_seconds(loop.pid) - before, tokens

        def own(rows: list[dict[str, Any]]) -> tuple[float, float, int]:
            place = work / rows[0]["id"]
            place.mkdir()
            p = Parameters(
                dataset_train_split=write(place / "train.jsonl", rows), regenerate_answers="train",
                regenerate_max_new_tokens=longest, max_length=context, **COMMON,
            )  # fmt: skip
            started, child = [], engine._process.pid

            def clocks() -> tuple[float, float]:
                return time.perf_counter(), time.process_time() + cpu_seconds(child)

            def start(*_: Any) -> Iterator[VllmGenerator]:
                started.extend(clocks())
                yield engine

            with patch.object(stage, "_start_engines", start):
                made = run(RegenerateConfig(model, str(place / "own"), p, place / "work"))
            ended = clocks()
            return ended[0] - started[0], ended[1] - started[1], made.splits["train"]["tokens"]

        with patch.object(VllmGenerator, "__exit__", lambda *_: None):
            plain(rows[-8:]), own(rows[-8:])  # starts both
            columns = ("round", "tokens", "LLM.chat loop, s", "stage, s", "more", "loop, CPU s", "stage, CPU s", "more")
            print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
            shares = []
            for number in range(rounds):
                part, measured = rows[number * count : (number + 1) * count], {}
                for way in (plain, own) if number % 2 else (own, plain):
                    time.sleep(2)  # the other engine's workers look for work for a second before they rest
                    measured[way] = way(part)
                a, b = measured[plain], measured[own]
                shares.append((b[0] / a[0] - 1, b[1] / a[1] - 1))
                times = (f"{a[0]:.2f}", f"{b[0]:.2f}", f"{shares[-1][0]:+.1%}", f"{a[1]:.2f}", f"{b[1]:.2f}")
                print(
                    "|",
                    *(f"{cell} |" for cell in (number + 1, f"{a[2]:,} and {b[2]:,}", *times)),
                    f"{shares[-1][1]:+.1%} |",
                    flush=True,
                )
            time_more, cpu_more = (statistics.median(each) for each in zip(*shares, strict=True))
            print(
                f"medians of {rounds} rounds of {count} conversations: {time_more:+.1%} time, {cpu_more:+.1%} CPU time"
            )
        loop.stdin.close()


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


def gain(folder: str, work: Path, count: int, steps: int, seeds: list[int], held_out: int = 48) -> None:
    """Prints acceptance lengths of the two drafts for each seed; what stands in `work` is not measured again."""
    model, rows = imported(folder, work), numpy_questions()[: count + held_out]
    asked = write(work / "asked.jsonl", rows[held_out:])
    p = Parameters(
        dataset_train_split=asked, dataset_validation_split=write(work / "held.jsonl", rows[:held_out]),
        regenerate_answers="all", regenerate_max_new_tokens=128, max_length=320, max_rejected_fraction=0.1,
        **COMMON,
    )  # fmt: skip
    own = run(RegenerateConfig(model, str(work / "own"), p, work / "regenerate"))
    print({name: round(value, 3) for name, value in own.metrics().items()}, flush=True)
    parts = sorted(Path(own.split_uri("train")).glob("part-*"))
    answered = {json.loads(line)["id"] for part in parts for line in gzip.decompress(part.read_bytes()).splitlines()}
    given = write(work / "foreign.jsonl", [row for row in rows if row["id"] in answered])  # the same questions for both
    columns = ("seed", "trained on", "conversations", "supervised tokens", "steps", "acceptance length, K = 3")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    sources = {"people's answers": given, "the target's own answers": own.split_uri("train")}
    for seed, (name, train) in itertools.product(seeds, sources.items()):
        settings = Parameters(
            dataset_train_split=train, dataset_validation_split=own.split_uri("validation"), chat_template="qwen",
            draft_model_config=str(EXAMPLES / "draft.json"), max_length=320, ttt_length=3, seed=seed, num_epochs=1,
            total_steps=steps, draft_global_batch_size=2, draft_micro_batch_size=2, training_batch_size=2,
            draft_optimizer="muon", momentum=0.95, learning_rate=0.001, warmup_ratio=0.03, log_steps=40,
            training_backend="local", max_rejected_fraction=0.1,
        )  # fmt: skip
        place = work / f"{name.replace(' ', '-')}-{steps}-{seed}"
        built = dataset.run(dataset.DatasetConfig(model, str(place / "dataset"), settings, place / "work"))
        result = place / "result.json"
        if not result.exists():
            done = jobs.run(TrainConfig(model, built.uri, str(place / "output"), place / "train", settings))
            result.write_text(json.dumps(asdict(done)), encoding="utf-8")
        done = json.loads(result.read_text(encoding="utf-8"))
        print(
            f"| {seed} | {name} | {built.train.rows_kept} | {built.train.supervised_tokens:,} | {done['steps']} | "
            f"{done['acceptance_length']:.3f} |",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "gain"))
    parser.add_argument("target", help="folder of the demo's model")
    parser.add_argument("--work", type=Path, help="folder for what is made, which is not made again (gain)")
    parser.add_argument("--count", type=int, default=320, help="conversations to train on, or of a timed round")
    parser.add_argument("--steps", type=int, default=120, help="of each draft's training, two conversations each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if options.what == "gain":
            gain(options.target, work.resolve(), options.count, options.steps, options.seeds)
        else:
            overhead(options.target, Path(scratch), options.count)
