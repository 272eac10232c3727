"""Which schedule, optimizer, unroll and initialisation gives the longest acceptance length for the same tokens.

    python benchmarks/recipe.py TARGET --conversations 400 --variants base batch-1 muon --seeds 0 1 2
    python benchmarks/recipe.py TARGET --table

TARGET is the demo's model (examples/smollm2/prepare_target.py). Every variant learns from the same conversations, one
epoch, with the product's own objective and order of data; the target's states are computed once and kept in WORK, so a
variant takes the draft's half of a step. A result is one line of WORK/results.jsonl, and what is there is not run
again. Time is CPU time of the process, which other work on the machine changes little, the target's forward pass
included, and stands in the table relative to the first variant. The acceptance length is the validation's: simulated
greedy decoding of the target's own replies with 1, 3 and 5 proposals. Per minute: what it is above 1 with 3 proposals,
by the minutes of CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draft_model import dataset, drafts, model_import
from draft_model.dataset import vocabulary
from draft_model.dataset.tokens import Split
from draft_model.drafts.batch import Batch, collate
from draft_model.drafts.counts import Counts
from draft_model.drafts.eagle3 import objective as loss_module
from draft_model.drafts.eagle3.objective import Objective
from draft_model.parameters import Parameters
from draft_model.target.model import Target, load_target
from draft_model.training.order import plan_steps
from draft_model.training.plan import draft_of, read_config

ROOT = Path(__file__).resolve().parent.parent
PROPOSALS = 3
MOST_PROPOSALS = 5


@dataclass(frozen=True)
class Recipe:
    """One way to train; by default as the demo was trained at first."""

    batch: int = 2  # conversations
    rate: float = 1e-3
    warmup: float = 0.03
    decay: str = "cosine"  # or linear, or wsd: flat, then linear over the last fifth
    floor: float = 0.0  # share of the peak rate that is left at the end
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 0.5
    muon: float = 0.0  # its rate, for the layer's and fc's matrices; 0: AdamW for all
    muon_momentum: float = 0.95
    muon_steps: int = 5  # of the Newton-Schulz iteration
    ema: float = 0.0  # decay per step of the averaged weights that are validated
    steps: int = 3  # ttt_length
    step_decay: float = 0.8
    length: int = 512  # tokens of a conversation that are learnt from, its first ones
    loss: str = "kl"  # or lk, or tv
    embedding: float = 1.0  # standard deviation of the embedding's half of q, k and v at the start, relative
    noise: float = 1.0  # of fc beside its identity, relative


BASE = Recipe()
MUON = replace(BASE, muon=2e-2)
LIGHT = replace(MUON, muon_momentum=0.5)
VARIANTS: dict[str, Recipe] = {
    "base": BASE,
    "batch-1": replace(BASE, batch=1),
    "batch-4": replace(BASE, batch=4),
    "batch-8": replace(BASE, batch=8),
    "batch-8-rate-3e-3": replace(BASE, batch=8, rate=3e-3),
    "beta2-0.95": replace(BASE, beta2=0.95),
    "warmup-0.1": replace(BASE, warmup=0.1),
    "clip-none": replace(BASE, clip=1e9),
    "linear": replace(BASE, decay="linear"),
    "wsd": replace(BASE, decay="wsd"),
    "floor-0.1": replace(BASE, floor=0.1),
    "ema-0.98": replace(BASE, ema=0.98),
    "unroll-2": replace(BASE, steps=2),
    "unroll-4": replace(BASE, steps=4),
    "step-decay-1.0": replace(BASE, step_decay=1.0),
    "quiet": replace(BASE, embedding=0.0, noise=0.0),
    "muon-1e-2": replace(BASE, muon=1e-2),
    "muon-2e-2": MUON,
    "muon-2e-2-step-decay-0.5": replace(MUON, step_decay=0.5),
    "muon-2e-2-rate-2e-3": replace(MUON, rate=2e-3),
    "muon-2e-2-ns3": replace(MUON, muon_steps=3),
    "muon-2e-2-m0.9": replace(MUON, muon_momentum=0.9),
    "beta1-0.5": replace(BASE, beta1=0.5),
    "muon-2e-2-lk": replace(MUON, loss="lk"),
    "muon-4e-2": replace(MUON, muon=4e-2),
    "muon-2e-2-m0.8": replace(MUON, muon_momentum=0.8),
    "muon-2e-2-m0.5": LIGHT,
    "muon-2e-2-m0.6": replace(MUON, muon_momentum=0.6),
    "muon-2e-2-m0.3": replace(MUON, muon_momentum=0.3),
    "muon-2e-2-m0.3-floor-0.1": replace(MUON, muon_momentum=0.3, floor=0.1),
    "muon-2e-2-m0.5-beta1-0.5": replace(LIGHT, beta1=0.5),
    "muon-2e-2-m0.5-rate-2e-3": replace(LIGHT, rate=2e-3),
    "muon-2e-2-m0.5-b1": replace(LIGHT, batch=1),
    "muon-1e-2-m0.5": replace(LIGHT, muon=1e-2),
    "muon-3e-2-m0.7": replace(MUON, muon=3e-2, muon_momentum=0.7),
    "muon-2e-2-m0.5-floor-0.1": replace(LIGHT, floor=0.1),
    "muon-2e-2-m0.5-unroll-1": replace(LIGHT, steps=1),
    "muon-2e-2-m0.5-unroll-2": replace(LIGHT, steps=2),
    "muon-2e-2-m0.5-unroll-4": replace(LIGHT, steps=4),
    "muon-2e-2-m0.5-unroll-5": replace(LIGHT, steps=5),
    "muon-2e-2-m0.5-length-256": replace(LIGHT, length=256),
    "muon-2e-2-m0.5-length-192": replace(LIGHT, length=192),
    "muon-2e-2-wsd": replace(MUON, decay="wsd"),
    "muon-2e-2-floor-0.1": replace(MUON, floor=0.1),
    "muon-2e-2-floor-0.3": replace(MUON, floor=0.3),
    "muon-2e-2-unroll-2": replace(MUON, steps=2),
    "muon-2e-2-b1": replace(MUON, batch=1),
    "muon-2e-2-b4": replace(MUON, batch=4),
}


@dataclass(frozen=True)
class Case:
    """The data and the target."""

    target: Target
    model: Path
    data: Path
    work: Path
    parameters: Parameters
    t2d: Tensor
    d2t: Tensor


def prepare(target: Path, data: Path, work: Path) -> Case:
    """Imports the target and builds the data set, unless they are there."""
    train = next(data.glob("train.jsonl*"))
    p = Parameters(
        pytorch_model_path=str(target), dataset_train_split=str(train), chat_template="qwen", max_length=512,
        dataset_validation_split=str(next(data.glob("validation.jsonl*"))), build_dataset_num_proc=1,
        draft_model_config=str(ROOT / "examples/smollm2/draft.json"),
    )  # fmt: skip
    model = model_import.run(model_import.ImportConfig(str(work / "model"), work / "scratch", p)).uri
    built = dataset.run(dataset.DatasetConfig(model, str(work / "dataset"), p, work / "scratch")).uri
    shape = draft_of(read_config(model), p)
    t2d, d2t = vocabulary.load_vocabulary(Path(built) / vocabulary.FILE)
    loaded = load_target(Path(model), shape.aux_layers, torch.bfloat16, torch.device("cpu"))
    return Case(loaded, Path(model), Path(built), work, p, t2d, d2t)


class States:
    """A split's target states, kept on disk; the final state is zero where the target's favourite has no draft id."""

    def __init__(self, case: Case, name: str) -> None:
        self.case, self.split, self.length = case, Split(case.data / name), case.parameters.max_length
        self.starts = np.concatenate(([0], np.cumsum(self.split.lengths)))
        width = 4 * case.target.config.hidden_size
        path = case.work / f"{name}-states.bin"
        rows = int(self.starts[-1])
        self.kept = torch.from_file(str(path), shared=True, size=rows * width, dtype=torch.bfloat16).view(rows, width)
        self.mark = case.work / f"{name}-kept.npy"
        self.have = np.load(self.mark) if self.mark.exists() else np.zeros(len(self.split), dtype=bool)

    def batch(self, conversations: list[int]) -> Batch:
        """Conversations as the objective reads them, `length` tokens of each at most."""
        rows = [self.split[index] for index in conversations]
        return collate([
            (torch.from_numpy(row.input_ids[: self.length]), torch.from_numpy(row.loss_mask[: self.length]))
            for row in rows
        ])  # fmt: skip

    def fill(self, conversations: list[int]) -> None:
        """Computes what is missing."""
        self.length = self.case.parameters.max_length
        missing = sorted((i for i in conversations if not self.have[i]), key=lambda i: int(self.split.lengths[i]))
        began = time.monotonic()
        for start in range(0, len(missing), 4):
            part = missing[start : start + 4]
            batch = self.batch(part)
            for row, (index, states) in enumerate(zip(part, self.case.target.states(batch), strict=True)):
                final = states[:, -self.case.target.config.hidden_size :]
                teaching = batch.predicted[row, : len(states)].nonzero()[:, 0]
                favourite = self.case.target.logits(final[teaching]).max(-1).indices
                final[teaching[~self.case.t2d[favourite]]] = 0.0
                self.kept[self.starts[index] : self.starts[index + 1]] = states
            self.have[part] = True
            if start % 100 == 0 or start + 4 >= len(missing):
                np.save(self.mark, self.have)
                print(f"states {start + len(part)}/{len(missing)}, {time.monotonic() - began:.0f} s", flush=True)

    def __getitem__(self, index: int) -> Tensor:
        return self.kept[self.starts[index] : self.starts[index + 1]][: self.length]


class KeptObjective(Objective):
    """The objective on kept states: the teacher's head has the draft's rows alone, and a column for all others."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        head = self.target.head[self.target_ids]
        count = len(head)

        def logits(states: Tensor) -> Tensor:
            out = states.new_empty(len(states), count + 1)
            torch.mm(states, head.T, out=out[:, :count])
            out[:, count] = torch.where((states == 0).all(-1), 1e9, -1e9)
            return out

        self.teacher_head, self.target_ids = logits, torch.arange(count)
        self.draft_ids = torch.cat((self.target_ids, torch.tensor([-1])))


def rate_at(recipe: Recipe, step: int, total: int) -> float:
    """The share of the peak rate at a step."""
    warm = int(recipe.warmup * total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "wsd": min(1.0, (1 - done) / 0.2)}
    return recipe.floor + (1 - recipe.floor) * shape[recipe.decay]


def optimizers(recipe: Recipe, draft: torch.nn.Module) -> Iterator[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices but the head."""
    named = dict(draft.named_parameters())
    matrices = [p for name, p in named.items() if recipe.muon and p.dim() == 2 and name != "lm_head.weight"]
    taken = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in taken]
    yield torch.optim.AdamW(others, lr=recipe.rate, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0, fused=True)
    if matrices:
        yield torch.optim.Muon(
            matrices, lr=recipe.muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw",
            momentum=recipe.muon_momentum, ns_steps=recipe.muon_steps,
        )  # fmt: skip


def create(case: Case, recipe: Recipe, seed: int) -> torch.nn.Module:
    """A draft before its first step."""
    family = drafts.family("eagle3")
    draft = family.create(draft_of(read_config(str(case.model)), case.parameters), case.t2d, case.d2t)
    draft.initialise(seed, case.target)
    hidden = draft.config.hidden_size
    with torch.no_grad():
        attention = draft.midlayer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:, :hidden] *= recipe.embedding
        identity = torch.zeros_like(draft.fc.weight)
        identity[:, -hidden:].diagonal().add_(1.0)
        draft.fc.weight.sub_(identity).mul_(recipe.noise).add_(identity)
    return draft


def run(case: Case, recipe: Recipe, conversations: int, seed: int, train: States, validation: States) -> dict:
    """Trains and validates once."""
    torch.manual_seed(seed)
    loss_module.STEP_DECAY, train.length = recipe.step_decay, recipe.length
    draft = create(case, recipe, seed)
    target_seconds = time_target(case, train, recipe.batch)
    longest = int(max(train.split.lengths.max(), validation.split.lengths.max()))
    objective = KeptObjective(draft, case.target, recipe.steps, "sdpa", torch.bfloat16, longest, recipe.loss)
    opts = list(optimizers(recipe, draft))
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    lengths = np.minimum(train.split.lengths[:conversations], recipe.length)
    total = conversations // recipe.batch
    average = [p.detach().clone() for p in draft.parameters()] if recipe.ema else []
    parameters = list(draft.parameters())
    clock, norms, log, window = time.process_time(), [], [], Counts.zeros(recipe.steps)
    for number, step in zip(range(total), plan_steps(lengths, recipe.batch, seed), strict=False):
        sums = Counts.zeros(recipe.steps)
        for start in range(0, recipe.batch, 2):
            part = [int(i) for i in step.conversations[start : start + 2]]
            loss, micro = objective(train.batch(part), [train[i] for i in part])
            loss.backward()
            sums = sums + micro
        grads = [p.grad for p in parameters]
        torch._foreach_mul_(grads, 1.0 / float(sums.supervised[0].clamp(min=1)))
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)))
        for opt, rates in zip(opts, peaks, strict=True):
            for group, peak in zip(opt.param_groups, rates, strict=True):
                group["lr"] = peak * rate_at(recipe, number, total)
            opt.step()
        for grad in grads:
            grad.zero_()
        if recipe.ema:
            decay = min(recipe.ema, (1 + number) / (10 + number))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        window = window + sums
        if (number + 1) % max(1, total // 8) == 0:
            log.append(round(window.acceptance_length(PROPOSALS), 4))
            window = Counts.zeros(recipe.steps)
    seconds = time.process_time() - clock
    if recipe.ema:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    measured = validate(case, draft, validation)
    return {
        "steps": total, "tokens": int(lengths.sum()), "cpu_seconds": round(seconds, 1), "log": log,
        "target_seconds": round(target_seconds * int(lengths.sum()), 1),
        "clipped": sum(n > recipe.clip for n in norms) / len(norms), "norm": round(statistics.median(norms), 3),
        **measured,
    }  # fmt: skip


def time_target(case: Case, train: States, batch: int) -> float:
    """CPU seconds per token of the target's forward pass over as many conversations at once as a step has."""
    count, began = min(batch, 2), time.process_time()
    batches = [train.batch(list(range(first, first + count))) for first in range(0, 8, count)]
    for each in batches:
        case.target.states(each)
    return (time.process_time() - began) / sum(int(each.lengths.sum()) for each in batches)


@torch.no_grad()
def validate(case: Case, draft: torch.nn.Module, split: States) -> dict:
    """The validation's simulated acceptance length, as the training job computes it."""
    objective = KeptObjective(
        draft, case.target, MOST_PROPOSALS, "sdpa", torch.bfloat16, int(split.split.lengths.max())
    )
    sums = Counts.zeros(MOST_PROPOSALS)
    order = np.argsort(-split.split.lengths, kind="stable")
    for start in range(0, len(order), 2):
        part = [int(i) for i in order[start : start + 2]]
        sums = sums + objective(split.batch(part), [split[i] for i in part])[1]
    means = sums.means()
    return {
        "acceptance_length": round(sums.acceptance_length(PROPOSALS), 4),
        "by_proposals": [round(sums.acceptance_length(k + 1), 4) for k in range(MOST_PROPOSALS)],
        "conditional": [round(x, 4) for x in means["conditional_acceptance"]],
        "loss": [round(x, 4) for x in means["loss"]],
    }


def table(results: list[dict]) -> None:
    """Prints a line per variant and size."""
    print("| variant | conversations | tokens | CPU time | K = 1 | K = 3 | K = 5 | per minute | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in sorted({row["conversations"] for row in results}):
        of: dict[str, list[dict]] = {}
        for row in results:
            if row["conversations"] == size:
                of.setdefault(row["variant"], []).append(row)
        cost = {
            name: statistics.mean(row["cpu_seconds"] + row["target_seconds"] for row in rows)
            for name, rows in of.items()
        }
        length = {name: statistics.mean(row["acceptance_length"] for row in rows) for name, rows in of.items()}
        for name in sorted(of, key=length.__getitem__, reverse=True):
            values = [row["acceptance_length"] for row in of[name]]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            others = [row["by_proposals"] for row in of[name] if "by_proposals" in row]
            one, five = (f"{statistics.mean(row[k - 1] for row in others):.3f}" if others else "" for k in (1, 5))
            relative, minute = cost[name] / next(iter(cost.values())), (length[name] - 1) / cost[name] * 60
            print(
                f"| {name} | {size:,} | {of[name][0]['tokens']:,} | {relative:.2f} | {one} | "
                f"{length[name]:.3f}{spread} | {five} | {minute:.3f} | {len(values)} |"
            )


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT / "examples/smollm2")
    parser.add_argument("--work", type=Path, default=ROOT / "demo/recipe")
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--table", action="store_true", help="print what was measured, and run nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not args.table:
        torch.set_num_threads(1)
        case = prepare(args.target, args.data, args.work)
        train, validation = States(case, "train"), States(case, "validation")
        validation.fill(list(range(len(validation.split))))
        train.fill(list(range(args.conversations)))
        for seed in args.seeds:
            for name in args.variants:
                key = {"variant": name, "conversations": args.conversations, "seed": seed}
                if any(key.items() <= row.items() for row in results):
                    continue
                found = run(case, VARIANTS[name], args.conversations, seed, train, validation)
                results.append(key | found | {"recipe": asdict(VARIANTS[name])})
                with path.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(
                    f"{name} seed {seed}: {found['acceptance_length']:.3f} {found['cpu_seconds']} s {found}", flush=True
                )
    table(results)


if __name__ == "__main__":
    main()
