"""How fast conversations become tokens and masks, beside other ways to do it, and whether memory stays flat.

    python benchmarks/dataset.py MODEL                      # speed; MODEL is a folder with a ChatML tokenizer
    python benchmarks/dataset.py MODEL --peers PYTHON       # ... beside SpecForge and speculators, installed there
    python benchmarks/dataset.py MODEL --memory             # peak memory at 10,000 and 1,000,000 conversations

Each contender reads the same JSONL and leaves a data set that a trainer can read, in a process of its own that is
bound to as many cores as it has processes. Rounds are interleaved; the table gives medians. The clock runs from the
call to the end of the preparation, worker processes included, without the import of libraries; CPU seconds of all its
processes are what a busy machine disturbs less.

The conversations are those of examples/smollm2 with 3 % of the words replaced by new ones, because a corpus of this
size has too few different words, and typographic apostrophes in every tenth message.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "smollm2" / "train.jsonl.gz"
MAX_LENGTH = 2048
# SmolLM2's template, with the tags that say which tokens are the assistant's.
TAGGED = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
)
Prepared = tuple[int, int]  # rows, tokens


def generate(path: Path, rows: int, words: int | None = None) -> None:
    """Writes conversations; `words` cuts each message short."""
    draw = random.Random(0)
    with gzip.open(EXAMPLES, "rt", encoding="utf-8") as file:
        examples = [json.loads(line)["conversations"] for line in file]

    def changed(text: str) -> str:
        parts = text.split(" ")[:words]
        for place in range(len(parts)):
            if draw.random() < 0.03:
                parts[place] = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 10)))
        text = " ".join(parts)
        return text.replace("'", "’") + " …" if draw.random() < 0.1 else text

    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            messages = examples[row % len(examples)]
            made = [{"role": m["role"], "content": changed(m["content"]) or "-"} for m in messages]
            file.write(json.dumps({"conversations": made}) + "\n")


def ours(model: Path, data: Path, work: Path, processes: int) -> Prepared:
    """This project's dataset stage."""
    from draft_model.dataset import DatasetConfig, run
    from draft_model.parameters import Parameters

    parameters = Parameters(
        dataset_train_split=str(data), chat_template="qwen", max_length=MAX_LENGTH, build_dataset_num_proc=processes
    )
    counts = run(DatasetConfig(str(model), str(work / "out"), parameters, work)).train
    return counts.rows_kept, counts.tokens


def plain(model: Path, data: Path, work: Path, processes: int) -> Prepared:
    """`datasets.map` over `apply_chat_template(return_assistant_tokens_mask=True)`."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(row: dict) -> dict:
        made = tokenizer.apply_chat_template(
            row["conversations"], chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True,
            truncation=True, max_length=MAX_LENGTH,
        )  # fmt: skip
        return {"input_ids": made["input_ids"], "loss_mask": made["assistant_masks"]}

    raw = load_dataset("json", data_files=str(data), split="train", cache_dir=str(work))
    made = raw.map(encode, num_proc=processes, remove_columns=raw.column_names)
    return len(made), _tokens(made)


def specforge(model: Path, data: Path, work: Path, processes: int) -> Prepared:
    """SpecForge's build_eagle3_dataset."""
    from datasets import load_dataset
    from specforge.data.preprocessing import build_eagle3_dataset
    from transformers import AutoTokenizer

    raw = load_dataset("json", data_files=str(data), split="train", cache_dir=str(work))
    made = build_eagle3_dataset(
        raw, AutoTokenizer.from_pretrained(model), "qwen", MAX_LENGTH, num_proc=processes,
        cache_dir=str(work), cache_key="benchmark",
    )  # fmt: skip
    return len(made), _tokens(made)


def speculators(model: Path, data: Path, work: Path, processes: int) -> Prepared:
    """The preparation of speculators; from 0.6 on it needs a vLLM server to render, so 0.5.0 is what runs here."""
    from speculators.data_generation.preprocessing import build_eagle3_dataset, load_raw_dataset
    from transformers import AutoTokenizer

    raw = load_raw_dataset(str(data), num_proc=processes)
    made = build_eagle3_dataset(raw, AutoTokenizer.from_pretrained(model), MAX_LENGTH, num_proc=processes)
    return len(made), _tokens(made)


def _tokens(made: object) -> int:
    """Tokens of an Arrow data set, counted without decoding it."""
    import pyarrow.compute as pc

    column = made.with_format("arrow").data.column("input_ids")  # type: ignore[attr-defined]
    lists = column.combine_chunks()
    while hasattr(lists.type, "value_type"):
        lists = lists.flatten()
    return pc.count(lists, mode="all").as_py()


CONTENDERS: dict[str, Callable[[Path, Path, Path, int], Prepared]] = {
    "ours": ours,
    "datasets.map, apply_chat_template": plain,
    "SpecForge": specforge,
    "speculators": speculators,
}
PEERS = ("SpecForge", "speculators")
LIBRARIES = {
    "ours": ("draft_model.dataset",),
    "datasets.map, apply_chat_template": ("datasets",),
    "SpecForge": ("datasets", "specforge.data.preprocessing"),
    "speculators": ("datasets", "speculators"),
}


def measure(name: str, model: Path, data: Path, processes: int) -> None:
    """One run in this process; prints its figures as JSON."""
    import importlib

    for module in ("transformers", *LIBRARIES[name]):
        importlib.import_module(module)
    importlib.import_module("transformers").AutoTokenizer.from_pretrained(model)  # imports more when it is used
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:processes]))
    peak = _PeakMemory()
    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        before = _cpu_seconds()
        rows, tokens = CONTENDERS[name](model, data, Path(work), processes)
        seconds, cpu = time.perf_counter() - start, _cpu_seconds() - before
    print(json.dumps({"seconds": seconds, "cpu": cpu, "rows": rows, "tokens": tokens, "peak": peak.stop()}))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class _PeakMemory:
    """Resident memory of this process and its children, looked at ten times a second."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._done.wait(0.1):
            total = 0
            for process in (self._process, *self._process.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak


def run_apart(name: str, python: str, model: Path, data: Path, processes: int) -> dict[str, float] | None:
    """One run in a process of its own; None where it does not run here."""
    command = [python, __file__, str(model), "--measure", name, "--data", str(data), "--processes", str(processes)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HOME": cache, "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} does not run here: {(done.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare_speed(model: Path, rows: int, rounds: int, peers: str | None, names: list[str]) -> None:
    """Prints the table of speeds."""
    from draft_model import storage

    with tempfile.TemporaryDirectory() as folder:
        imported, data = Path(folder, "model"), Path(folder, "train.jsonl")
        storage.publish(_tokenizer_of(model, Path(folder, "files")), str(imported), stage="import", properties={})
        generate(data, rows)
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        names = [name for name in names if peers or name not in PEERS]
        for _ in range(rounds):
            for processes in (1, 2):
                for name in list(names):
                    python = peers if name in PEERS and peers else sys.executable
                    if found := run_apart(name, python, imported, data, processes):
                        runs.setdefault((name, processes), []).append(found)
                    else:
                        names.remove(name)
    print(
        f"| {rows} conversations | processes | rows/s | tokens/s | tokens per CPU second | MB | rows kept |\n"
        "|---|---|---|---|---|---|---|"
    )
    for (name, processes), found in sorted(runs.items(), key=lambda run: run[0][1]):
        seconds = statistics.median(run["seconds"] for run in found)
        cpu = statistics.median(run["cpu"] for run in found)
        tokens = found[0]["tokens"] / seconds
        per_cpu = found[0]["tokens"] / cpu
        print(
            f"| {name} | {processes} | {found[0]['rows'] / seconds:,.0f} | {tokens:,.0f} | {per_cpu:,.0f} | "
            f"{max(run['peak'] for run in found) / 1e6:,.0f} | {found[0]['rows']:,} |"
        )


def compare_memory(model: Path, sizes: list[int]) -> None:
    """Prints peak memory by size, on short conversations and one process, which is what a small input gets."""
    from draft_model import storage

    print("| conversations | tokens | seconds | peak MB | against the first |\n|---|---|---|---|---|")
    first = 0.0
    with tempfile.TemporaryDirectory() as folder:
        imported, data = Path(folder, "model"), Path(folder, "train.jsonl")
        storage.publish(_tokenizer_of(model, Path(folder, "files")), str(imported), stage="import", properties={})
        for size in sizes:
            generate(data, size, words=12)
            if found := run_apart("ours", sys.executable, imported, data, 1):
                first = first or found["peak"]
                print(
                    f"| {size:,} | {found['tokens']:,} | {found['seconds']:.0f} | {found['peak'] / 1e6:,.0f} | "
                    f"{found['peak'] / first:.2f} |",
                    flush=True,
                )


def _tokenizer_of(model: Path, into: Path) -> Path:
    into.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "manifest.json":
            (into / file.name).write_bytes(file.read_bytes())
    return into


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with config.json and the tokenizer")
    parser.add_argument("--rows", type=int, default=20_000, help="conversations of the comparison of speeds")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument(
        "--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, help="all, if not given"
    )
    parser.add_argument("--peers", help="a Python that has specforge and speculators==0.5.0")
    parser.add_argument("--memory", action="store_true", help="look at memory, not at speed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000], help="of --memory")
    for internal in ("--measure", "--data", "--processes"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.model, Path(given.data), int(given.processes))
    elif given.memory:
        compare_memory(given.model, given.sizes)
    else:
        compare_speed(given.model, given.rows, given.rounds, given.peers, given.contenders)


if __name__ == "__main__":
    main()
