"""Times one whole training step (target, draft, loss, optimizer) beside the same step of the peers.

Each trainer runs in a process of its own, in an environment of its own (`make bench-peers`) or in this one where the
peer is installed there, on the same random target and batch (steps/common.py). All start at once and then take turns
step by step, so that a busy machine slows all of them alike; a GPU has to hold them together (two of the large shape
need 60 GB; on a small card name fewer with --trainer). Printed, as soon as it is known: tokens per second (median),
peak memory, the ratio to each peer, and the share of the floor, which is the time that the step's necessary
multiply-adds take at the rate of the machine's matrix product (steps/floor.py). A trainer that does not answer in time
is ended, and its row says so.

Usage: python benchmarks/training_step.py [--shape medium] [--supervised 1.0] [--rounds 5] [--help]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = HERE / "steps"
REPOSITORY = HERE.parent
sys.path[:0] = [str(STEPS), str(REPOSITORY / "src")]

TRAINERS = ("ours", "specforge", "specforge-cached", "speculators")
NOTES = {
    "specforge": "SpecForge 0.2.0; on a CPU its Triton loss is replaced by its own reference `_compute_loss` and "
    "`triton` by an empty stand-in; target features by hooks as ours, logits at all positions by the target's head. It "
    "empties the CUDA cache in every step",
    "specforge-cached": "the same without emptying the cache",
    "speculators": "vLLM speculators 0.9.0, kl_div (fused on a GPU, eager on a CPU); conversations packed with "
    "document ids; target features by hooks as ours, teacher logits over the draft vocabulary as it does. It never "
    "trains its lm_head, about 15 % less work",
}
BLOCK_NOTES = {
    "specforge": "SpecForge 0.2.0; its DFlash learns the data's tokens, so that it needs no logits of the target",
    "speculators": "vLLM speculators 0.9.0, kl_div (DFlash) or 0.1 ce + 0.9 tv (DSpark), eager on a CPU; conversations "
    "packed with document ids; logits of all blocks at once",
}


@dataclass
class Trainer:
    """One process that trains on demand; `problem` is set once it cannot go on with a scene."""

    name: str
    process: subprocess.Popen[str]
    limit: float
    answers: queue.Queue[str] = field(default_factory=queue.Queue)
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    peak: int = 0
    problem: str = ""

    @classmethod
    def start(cls, name: str, threads: int, limit: float) -> Trainer:
        """Starts it; it imports what it needs meanwhile."""
        package = name.partition("-")[0]
        own = REPOSITORY / f".venv-{package}/bin/python"
        python = sys.executable if name == "ours" or not own.exists() else str(own)
        if python == sys.executable and name != "ours" and not importlib.util.find_spec(package):
            raise SystemExit(f"{package} is not installed: run 'make bench-peers', or give --trainer ours")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]),
        }
        process = subprocess.Popen(
            [python, str(STEPS / f"step_{package}.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        trainer = cls(name, process, limit)
        threading.Thread(target=trainer._read, daemon=True).start()
        return trainer

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                self.answers.put(line)
        self.answers.put(json.dumps({"error": "its process ended; its output is above"}))

    def send(self, line: str) -> None:
        """Asks for something; `receive` waits for the answer."""
        if self.process.poll() is None:
            assert self.process.stdin
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer; ends the process where none comes in time."""
        try:
            limit = self.limit if self.process.poll() is None else 1.0
            answer: dict[str, Any] = json.loads(self.answers.get(timeout=limit))
        except queue.Empty:
            self.process.kill()
            answer = {"error": f"no answer within {self.limit:.0f} s"}
        self.problem = answer.get("error", "")
        return answer

    def build(self, settings: dict[str, Any]) -> None:
        """Has it make a scene; `receive` waits until it is made."""
        self.seconds, self.first, self.peak, self.problem = [], 0.0, 0, ""
        self.send(json.dumps(settings | {"empty_cache": self.name != "specforge-cached"}))

    def note(self, answer: dict[str, Any], timed: bool) -> None:
        """Keeps what a step took."""
        if not self.problem:
            self.peak = answer["peak"]
            self.first = self.first or answer["seconds"]
            self.seconds += [answer["seconds"]] if timed else []

    def stop(self) -> None:
        """Ends the process."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def arguments() -> argparse.Namespace:
    """The command line."""
    shape = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=shape)
    parser.add_argument("--shape", nargs="+", default=["small", "medium", "long"], help="rows of steps/common.py")
    parser.add_argument("--family", default="eagle3", choices=("eagle3", "dflash", "dspark"), help="kind of draft")
    parser.add_argument("--supervised", nargs="+", type=float, default=[1.0, 0.5], help="share that is learnt from")
    parser.add_argument("--trainer", nargs="+", choices=TRAINERS, help="all; on a CPU without specforge-cached")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each trainer")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before that")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each trainer")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "flex_attention"), help="of every trainer")
    parser.add_argument("--our-attention", default="", help="another one for ours")
    parser.add_argument("--tokens", type=int, default=0, help="another length of the conversations than the shape's")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a trainer may take for one answer")
    parser.add_argument("--json", type=Path, help="file for the rows as JSON")
    options = parser.parse_args()
    if not options.trainer:
        options.trainer = [name for name in TRAINERS if options.device == "cuda" or name != "specforge-cached"]
    return options


def main() -> None:
    """Prints the table."""
    options = arguments()
    common = {name: getattr(options, name) for name in ("threads", "device", "dtype", "family")}
    common["changes"] = {"tokens": options.tokens} if options.tokens else {}
    print(f"{date.today()}, {_machine(options.device, options.threads)}, {options.dtype}, {options.attention}, "
          f"median of {options.rounds} steps\n")  # fmt: skip
    print("| shape | supervised | trainer | tokens/s | ours is | peak memory | ours needs | share of the floor |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    trainers = [Trainer.start(name, options.threads, options.limit) for name in options.trainer]
    try:
        for shape in options.shape:
            for share in options.supervised:
                rows += _time(trainers, {**common, "shape": shape, "supervised": share}, options)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    finally:
        for trainer in trainers:
            trainer.stop()
    notes = NOTES if options.family == "eagle3" else BLOCK_NOTES
    for name in options.trainer:
        if name in notes:
            print(f"\n{name}: {notes[name]}.")


def _time(trainers: list[Trainer], settings: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    from tqdm import tqdm

    rates = [_gemm_rate(settings)]
    with tqdm(total=options.warm_up + options.rounds, desc=settings["shape"], leave=False) as progress:
        for trainer in trainers:
            attention = options.our_attention if trainer.name == "ours" else ""
            trainer.build({**settings, "attention": attention or options.attention})
        for trainer in trainers:
            trainer.receive()
        for _ in range(options.warm_up):  # at the same time, for kernels are compiled
            going = [trainer for trainer in trainers if not trainer.problem]
            for trainer in going:
                trainer.send("step")
            for trainer in going:
                trainer.note(trainer.receive(), timed=False)
            progress.update()
        for _ in range(options.rounds):
            rates.append(_gemm_rate(settings))
            for trainer in trainers:
                if not trainer.problem:
                    trainer.send("step")
                    trainer.note(trainer.receive(), timed=True)
            progress.update()
    return [_row(trainer, trainers[0], settings, statistics.median(rates)) for trainer in trainers]


def _row(trainer: Trainer, ours: Trainer, settings: dict[str, Any], rate: float) -> dict[str, Any]:
    floor, tokens = _floor(settings)
    head = f"| {settings['shape']} | {settings['supervised']:.0%} | {trainer.name} |"
    row = {"shape": settings["shape"], "supervised": settings["supervised"], "trainer": trainer.name, "rate": rate}
    if trainer.problem or not trainer.seconds:
        print(f"{head} {trainer.problem or 'not timed'} | | | | |", flush=True)
        return {**row, "problem": trainer.problem}
    seconds = statistics.median(trainer.seconds)
    faster = memory = ""
    if trainer is not ours and ours.seconds:
        faster = f"{seconds / statistics.median(ours.seconds):.2f}x as fast"
        memory = f"{ours.peak / trainer.peak:.2f}x"
    print(
        f"{head} {tokens / seconds:,.0f} | {faster} | {trainer.peak / 1e6:,.0f} MB | {memory} "
        f"| {floor / rate / seconds:.0%} |",
        flush=True,
    )
    return {**row, "seconds": trainer.seconds, "first": trainer.first, "peak": trainer.peak, "floor": floor / rate,
            "tokens": tokens}  # fmt: skip


def _gemm_rate(settings: dict[str, Any]) -> float:
    import torch

    from floor import gemm_rate

    torch.set_num_threads(settings["threads"])
    return gemm_rate(torch.device(settings["device"]), getattr(torch, settings["dtype"]))


def _floor(settings: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds and tokens of a step."""
    from common import SHAPES, make_batch
    from floor import multiply_adds

    shape = replace(SHAPES[settings["shape"]], **settings["changes"])
    batch = make_batch(shape, settings["supervised"])
    return multiply_adds(shape, settings["family"], *batch), shape.batch * shape.tokens


def _machine(device: str, threads: int) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {threads} threads"


if __name__ == "__main__":
    main()
