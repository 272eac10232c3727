"""Acceptance length of every draft family after the same training time, on the demo's target.

    python benchmarks/families.py demo/SmolLM2-135M-Instruct --seconds 400 --families eagle3 dspark

Each family is trained on the demo's data by its recipe (examples/smollm2/run.yaml) in a process of its own with one
thread. Time is the process's CPU time, the target's forward pass included, so that other work on the machine changes
little: eight steps are timed, and the training has as many as then fit into --seconds. The drafts are compared by
`draft-model compare` on prompts of the validation split and of another kind, for each number of proposals. What is in
WORK is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from draft_model import dataset, model_import, storage
from draft_model.parameters import Parameters

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples/smollm2"
TIMED = 8
# A block draft has few layers and anchors here, for a target so small and so little data, and learns by kl: the
# gradient of the total variation is small as long as draft and target have nothing in common.
BLOCKS = {"num_hidden_layers": 2, "num_anchors": 48}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # parameters, draft_model_config
    "eagle3": ({}, {"draft_vocab_size": 8192}),
    "eagle3.1": ({"draft_architecture": "eagle3.1"}, {"draft_vocab_size": 8192}),
    "dflash": ({"draft_architecture": "dflash", "num_speculative_tokens": 7, "draft_loss": "kl"}, BLOCKS),
    "dspark": ({"draft_architecture": "dspark", "num_speculative_tokens": 7, "draft_loss": "kl"}, BLOCKS),
    "dspark-3": ({"draft_architecture": "dspark", "draft_loss": "kl"}, BLOCKS),
}


def parameters(name: str, target: Path, work: Path, **changes: Any) -> Parameters:
    """The demo's parameters for a draft."""
    own, config = VARIANTS[name]
    path = work / f"{name}.json"
    path.write_text(json.dumps(config))
    demo = yaml.safe_load((DEMO / "run.yaml").read_text())
    paths = {key: str(ROOT / demo[key]) for key in ("dataset_train_split", "dataset_validation_split")}
    paths |= {"pytorch_model_path": str(target), "draft_model_config": str(path),
              "evaluation_prompts": str(DEMO / "prompts.jsonl")}  # fmt: skip
    return Parameters(**demo | paths | own | changes)


def train(name: str, model: str, data: str, target: Path, work: Path, seconds: float) -> None:
    """Trains one draft for so many seconds of CPU time, and writes it and what it took."""
    import torch

    from draft_model.drafts.files import save_draft
    from draft_model.ranks import start_ranks
    from draft_model.training.config import TrainConfig
    from draft_model.training.prepare import fetch_inputs, prepare
    from draft_model.training.trainer import Interrupted
    from draft_model.training.trainer import train as run

    torch.set_num_threads(1)
    clock: list[float] = []

    def learn(total: int, stop_after: int) -> tuple[Any, float]:
        config = TrainConfig(model, data, str(work / name), work / f"{name}-scratch",
                             parameters(name, target, work, total_steps=total))  # fmt: skip
        config.work.mkdir(exist_ok=True)
        training = replace(prepare(config, ranks, fetch_inputs(config), None, False), validation=None)
        clock[:] = [time.process_time()]

        def stop() -> bool:  # is asked twice in each step
            clock.append(time.process_time())
            return len(clock) > 2 * stop_after

        with suppress(Interrupted):
            run(training, lambda *_: None, stop)
        return training, time.process_time() - clock[0]

    with start_ranks(timedelta(minutes=5), 1) as ranks:
        learn(1000, TIMED)
        step = statistics.mean(b - a for a, b in zip(clock[2::2], clock[4::2], strict=False))
        training, spent = learn(max(1, round(seconds / step)), 1 << 30)
    save_draft(work / name, training.draft)
    storage.publish(work / name, str(work / name), stage="train", properties={"step": training.done})
    record = {"steps": training.done, "tokens": training.history.tokens, "seconds": spent, "log": training.history.log}
    (work / f"{name}.result.json").write_text(json.dumps(record))


def compare(
    names: list[str], proposals: int, tokens: int, model: str, data: str, target: Path, work: Path
) -> list[dict[str, Any]]:
    """Decodes the same prompts with each draft that can propose so many tokens."""
    from draft_model.evaluation.compare import CompareConfig
    from draft_model.evaluation.compare import compare as run

    path = work / f"compared-{proposals}-{tokens}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    able = [name for name in names if name.startswith("eagle3") or block(name) >= proposals]
    if missing := [name for name in able if name not in found]:
        p = parameters("eagle3", target, work, num_speculative_tokens=proposals, evaluation_max_new_tokens=tokens,
                       evaluation_engine="transformers")  # fmt: skip
        folders = tuple(str(work / name) for name in missing)
        found |= zip(missing, run(CompareConfig(model, data, folders, work / "compare", p)), strict=True)
        path.write_text(json.dumps(found))
    return [{"name": name, "proposals": proposals, **found[name]} for name in able]


def block(name: str) -> int:
    """The proposals that a draft is trained for."""
    return int(VARIANTS[name][0].get("num_speculative_tokens", 3))


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "demo/families")
    parser.add_argument("--seconds", type=float, default=400.0, help="CPU time of each training")
    parser.add_argument("--families", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--proposals", nargs="+", type=int, default=[3, 7])
    parser.add_argument("--tokens", type=int, default=96, help="decoded for each prompt")
    parser.add_argument("--processes", type=int, default=2, help="trainings at once")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    p = parameters("eagle3", args.target, args.work)
    model = model_import.run(model_import.ImportConfig(str(args.work / "model"), args.work / "scratch", p)).uri
    data = dataset.run(dataset.DatasetConfig(model, str(args.work / "dataset"), p, args.work / "scratch")).uri
    given = (model, data, args.target, args.work)
    missing = [name for name in args.families if not (args.work / f"{name}.result.json").exists()]
    with ProcessPoolExecutor(args.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(train, name, *given, args.seconds) for name in missing]:
            future.result()
    rows = [row for count in args.proposals for row in compare(args.families, count, args.tokens, *given)]
    print("| draft | trained for K | steps | tokens | CPU time | proposals | acceptance length | by kind |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        took = json.loads((args.work / f"{row['name']}.result.json").read_text())
        kinds = ", ".join(f"{each['category']} {each['acceptance_length']:.2f}" for each in row["by_category"])
        print(f"| {row['name']} | {block(row['name'])} | {took['steps']} | {took['tokens']:,} | "
              f"{took['seconds']:.0f} s | {row['proposals']} | {row['acceptance_length']:.2f} | {kinds} |")  # fmt: skip


if __name__ == "__main__":
    main()
