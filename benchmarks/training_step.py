"""Times one whole training step (target, draft, loss, optimizer) beside the same step of the peers, interleaved.

Each trainer runs in a process of its own, in an environment of its own (`make bench-peers`), on the same random target
and batch (steps/common.py). In every round each does one step while the others wait, and the machine's matrix product
is timed as well. Printed: tokens per second (median), peak memory, the ratio to each peer, and the share of the floor,
which is the time that the step's necessary multiply-adds take at the matrix product's rate (steps/floor.py).

Usage: python benchmarks/training_step.py [--shape medium] [--supervised 1.0] [--rounds 5] [--help]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
STEPS = HERE / "steps"
REPOSITORY = HERE.parent
NOTES = {
    "specforge": "SpecForge 0.2.0, sdpa; on a CPU its Triton loss is replaced by its own reference `_compute_loss` "
    "and `triton` by an empty stand-in; target features by hooks as ours, logits at all positions by the target's head",
    "speculators": "vLLM speculators 0.9.0, sdpa, kl_div (eager on a CPU); conversations packed with document ids; "
    "target features by hooks as ours, teacher logits over the draft vocabulary as it does",
}


@dataclass
class Trainer:
    """One process that trains on demand.

    Attributes:
        name: ours, specforge, speculators.
        process: of it.
        seconds: of each timed step.
        peak: bytes.
    """

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @classmethod
    def start(cls, name: str, settings: dict[str, Any]) -> Trainer:
        """Starts it and waits until it is ready."""
        python = sys.executable if name == "ours" else str(REPOSITORY / f".venv-{name}/bin/python")
        if not Path(python).exists():
            raise click.ClickException(f"{name} is not installed: run 'make bench-peers', or give --trainer ours")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(settings["threads"]),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
        }
        process = subprocess.Popen(
            [python, str(STEPS / f"step_{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        trainer = cls(name, process)
        trainer.ask(json.dumps(settings))
        return trainer

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and waits for the answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("{"):
                return json.loads(answer)  # type: ignore[no-any-return]
        raise click.ClickException(f"{self.name} ended with exit code {self.process.wait()}; its output is above")

    def step(self, timed: bool) -> None:
        """Does one step."""
        answer = self.ask("step")
        self.peak = answer["peak"]
        if timed:
            self.seconds.append(answer["seconds"])

    def stop(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--shape", "shapes", multiple=True, default=("small", "medium", "long"), help="Rows of steps/common.py.")
@click.option(
    "--supervised", multiple=True, type=float, default=(1.0, 0.5), help="Share of tokens that is learnt from."
)
@click.option(
    "--trainer", "trainers", multiple=True, default=("ours", "specforge", "speculators"), help="Whom to time."
)
@click.option("--rounds", default=5, help="Timed steps of each trainer.")
@click.option("--warm-up", default=2, help="Steps before that.")
@click.option("--threads", default=2, help="CPU threads of each trainer.")
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--dtype", default="float32", help="float32 or bfloat16.")
@click.option("--attention", default="sdpa", help="sdpa or flex_attention, for every trainer.")
@click.option("--tokens", default=0, help="Another length of the conversations than the shape's.")
def main(
    shapes: tuple[str, ...],
    supervised: tuple[float, ...],
    trainers: tuple[str, ...],
    rounds: int,
    warm_up: int,
    threads: int,
    device: str,
    dtype: str,
    attention: str,
    tokens: int,
) -> None:
    """Time the training step of this project and of its peers on the same batch, and print a table."""
    settings = {
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "changes": {"tokens": tokens} if tokens else {},
    }
    click.echo(f"{date.today()}, {_machine(device, threads)}, {dtype}, {attention}, median of {rounds} steps\n")
    click.echo("| shape | supervised | trainer | tokens/s | ours is | peak memory | ours needs | share of the floor |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        for share in supervised:
            _time(shape, trainers, {**settings, "shape": shape, "supervised": share}, rounds, warm_up)
    for name in trainers:
        if name in NOTES:
            click.echo(f"\n{name}: {NOTES[name]}.")


def _time(shape: str, trainers: tuple[str, ...], settings: dict[str, Any], rounds: int, warm_up: int) -> None:
    from tqdm import tqdm

    running: list[Trainer] = []
    rates: list[float] = []
    try:
        with tqdm(total=len(trainers) * (1 + warm_up + rounds), desc=shape, leave=False) as progress:
            for name in trainers:
                running.append(Trainer.start(name, settings))
                progress.update()
            for number in range(warm_up + rounds):
                rates.append(_gemm_rate(settings))
                for trainer in running:
                    trainer.step(timed=number >= warm_up)
                    progress.update()
    finally:
        for trainer in running:
            trainer.stop()
    _print_rows(shape, running, settings, statistics.median(rates))


def _print_rows(shape: str, trainers: list[Trainer], settings: dict[str, Any], rate: float) -> None:
    floor, tokens = _floor(settings)
    ours = trainers[0]
    for trainer in trainers:
        seconds = statistics.median(trainer.seconds)
        compared = trainer is not ours
        click.echo(
            f"| {shape} | {settings['supervised']:.0%} | {trainer.name} | {tokens / seconds:,.0f} "
            f"| {f'{seconds / statistics.median(ours.seconds):.2f}x as fast' if compared else ''} "
            f"| {trainer.peak / 1e6:,.0f} MB | {f'{ours.peak / trainer.peak:.2f}x' if compared else ''} "
            f"| {floor / rate / seconds:.0%} |"
        )


def _gemm_rate(settings: dict[str, Any]) -> float:
    import torch

    sys.path[:0] = [str(STEPS)] if str(STEPS) not in sys.path else []
    from floor import gemm_rate

    torch.set_num_threads(settings["threads"])
    return gemm_rate(torch.device(settings["device"]), getattr(torch, settings["dtype"]))


def _floor(settings: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds and tokens of a step."""
    from common import SHAPES, make_batch
    from floor import multiply_adds

    shape = replace(SHAPES[settings["shape"]], **settings["changes"])
    return multiply_adds(shape, *make_batch(shape, settings["supervised"])), shape.batch * shape.tokens


def _machine(device: str, threads: int) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {threads} threads"


if __name__ == "__main__":
    main()
