"""Tokens per second of one training process and of two, a thread each; and three ways to sum gradients, timed.

    python benchmarks/scaling.py                    # one process against two, interleaved; goal: 1.8 times as fast
    python benchmarks/scaling.py --reduction        # one buffer, DistributedDataParallel, FSDP2, in two processes

Everything is made on the spot: a random Llama, random conversations. The share of this machine's peak that a step
reaches comes out too: FLOP counted by `draft_model.training.plan` over what a matrix product reaches on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

TOKENS, SUPERVISED = 512, 0.6
SHAPES = {"small": (256, 768, 4, 2_048, 1_024), "medium": (512, 1_536, 8, 32_000, 8_000)}
"""Hidden, intermediate, heads, vocabulary, draft vocabulary."""
WARM_UP = 2


class Conversations:
    """Random conversations in memory, as `Split` has them on disk."""

    def __init__(self, count: int, vocabulary: int) -> None:
        import numpy as np

        random = np.random.default_rng(0)
        prompt = int(TOKENS * (1 - SUPERVISED))
        self.lengths = np.full(count, TOKENS)
        self._ids = random.integers(0, vocabulary, (count, TOKENS)).astype(np.int32)
        self._mask = np.arange(TOKENS) >= prompt

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self._ids[index], loss_mask=self._mask)


def parts(shape: str, steps: int, device: Any) -> tuple[Any, Any, Any]:
    """A random target, a draft and the objective."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from draft_model.drafts.eagle3.config import draft_config_for
    from draft_model.drafts.eagle3.model import Eagle3Draft
    from draft_model.drafts.eagle3.objective import Objective
    from draft_model.target.model import Target

    hidden, intermediate, heads, vocabulary, known = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=8, num_attention_heads=heads,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=TOKENS,
    )  # fmt: skip
    draft_config = replace(draft_config_for(config.to_dict()), draft_vocab_size=known)
    target = Target(LlamaForCausalLM(config).to(device), draft_config.aux_layers)
    # Every target token that the random target may prefer is one that the draft knows, so all replies are supervised.
    favourites = target.head.norm(dim=1).topk(known).indices.sort().values
    t2d = torch.zeros(vocabulary, dtype=torch.bool)
    t2d[favourites] = True
    draft = Eagle3Draft(draft_config, t2d, favourites - torch.arange(known)).to(device)
    draft.initialise(0, target)
    return target, draft, Objective(draft, target, steps, "sdpa", torch.float32, TOKENS)


def train_worker(shape: str, steps: int) -> dict[str, Any]:
    """One process of a training; the first tells the speed."""
    import torch

    from draft_model.parameters import Parameters
    from draft_model.ranks import start_ranks
    from draft_model.training.trainer import Training, train

    with start_ranks(timedelta(minutes=10)) as ranks:
        target, draft, objective = parts(shape, 7, ranks.device)
        p = Parameters(
            number_of_gpu_to_use_draft_model_training=ranks.world, draft_global_batch_size=4, total_steps=steps,
            compute_dtype="float32", log_steps=1, learning_rate=1e-4,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(draft.parameters(), fused=True)
        conversations: Any = Conversations(4 * steps, target.config.vocab_size)
        training = Training(p, ranks, target, draft, optimizer, objective, conversations, None, steps, "random")
        train(training, lambda *_: None, lambda: False)
        seconds = [4 * TOKENS / record["tokens_per_second"] for record in training.history.log[WARM_UP:]]
        return {"tokens_per_second": 4 * TOKENS / statistics.median(seconds), "flops": flops(target, draft, p)}


def flops(target: Any, draft: Any, p: Any) -> float:
    """FLOP of one token, by the plan's arithmetic."""
    from draft_model.training import plan

    made = plan.make_plan(
        target.config.to_dict(), draft.config, p, plan.Cluster(1e12, 1e12, 1.0, 1e9), plan.Workload(TOKENS, SUPERVISED)
    )
    return made.flops


def peak() -> float:
    """FLOP/s of a large matrix product on one thread."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 1024**3 / statistics.median(times)


def reduce_worker(shape: str, way: str, steps: int) -> dict[str, Any]:
    """Seconds of an optimizer step of two micro-batches, the gradients summed in one of three ways."""
    import torch
    from torch import nn
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from draft_model.drafts.batch import collate
    from draft_model.ranks import start_ranks
    from draft_model.training.optimizer import Gradients

    class Loss(nn.Module):
        def __init__(self, draft: nn.Module, objective: Any) -> None:
            super().__init__()
            self.draft, self.objective = draft, objective

        def forward(self, batch: Any, states: Any) -> Any:
            return self.objective(batch, states)[0]

    with start_ranks(timedelta(minutes=10)) as ranks:
        target, draft, objective = parts(shape, 7, ranks.device)
        module: Any = Loss(draft, objective)
        rows = [Conversations(1, target.config.vocab_size)[0] for _ in range(1)]
        batch = collate([(torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.loss_mask)) for row in rows])
        states = target.states(batch)
        wrap = {"DistributedDataParallel": DistributedDataParallel, "FSDP2": fully_shard}
        module = wrap[way](module) if way in wrap else module
        optimizer, one = torch.optim.AdamW(module.parameters(), fused=True), torch.ones(())
        gradients = None if way in wrap else Gradients(module.parameters())
        times = []
        for _ in range(steps):
            ranks.any(False)
            started = time.perf_counter()
            gradients.clear() if gradients else optimizer.zero_grad()
            for last in (False, True):
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(last)
                elif way in wrap:
                    module.require_backward_grad_sync = last  # what no_sync sets
                module(batch, states).backward()
            if gradients:
                gradients.reduce(ranks)
                norm = gradients.norm(one)
                gradients.update(optimizer, one, norm, 0.5, norm.isfinite())
            else:
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
            times.append(time.perf_counter() - started)
        return {"seconds": statistics.median(times[WARM_UP:])}


def launch(world: int, *arguments: str) -> dict[str, Any]:
    """Runs this file as so many processes of one thread; gives what the first one tells."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(world):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in ranks.items()}}
        command = [sys.executable, __file__, "--worker", *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed; its message is above")
    return json.loads(said[0].splitlines()[-1])


def compare_worlds(shape: str, steps: int, repeats: int) -> None:
    """Prints the speeds of one process and of two."""
    found: dict[int, list[float]] = {1: [], 2: []}
    work = 0.0
    for _ in range(repeats):
        for world, speeds in found.items():
            told = launch(world, shape, str(steps))
            speeds.append(told["tokens_per_second"])
            work = told["flops"]
    one, two = (statistics.median(speeds) for speeds in found.values())
    reached, possible = one * work, peak()
    print(f"\n{shape}: medians of {repeats} interleaved runs of {steps - WARM_UP} steps, 4 x {TOKENS} tokens a step")
    print(f"{'processes':>10} {'tokens/s':>10}   single runs")
    for world, speeds in found.items():
        print(f"{world:>10} {statistics.median(speeds):>10.0f}   {' '.join(f'{speed:.0f}' for speed in speeds)}")
    print(f"two processes are {two / one:.2f} times as fast as one (goal: 1.80)")
    print(f"one thread: {reached / 1e9:.1f} of {possible / 1e9:.1f} GFLOP/s, {reached / possible:.0%} of its peak")


def compare_reductions(shape: str, steps: int, repeats: int) -> None:
    """Prints the step times of the three ways to sum gradients."""
    found: dict[str, list[float]] = {"one buffer": [], "DistributedDataParallel": [], "FSDP2": []}
    for _ in range(repeats):
        for way, times in found.items():
            times.append(launch(2, shape, str(steps), way)["seconds"])
    ours = statistics.median(found["one buffer"])
    print(f"\n{shape}: two processes, medians of {repeats} interleaved runs; a step is two micro-batches of {TOKENS}")
    for way, times in found.items():
        middle = statistics.median(times)
        print(f"{way:>24} {middle:.3f} s a step, {middle / ours:.2f} times the first")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reduction", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        shape, steps, *way = given.worker
        told = reduce_worker(shape, way[0], int(steps)) if way else train_worker(shape, int(steps))
        print(json.dumps(told))
    elif given.reduction:
        compare_reductions(given.shape, given.steps, given.repeats)
    else:
        compare_worlds(given.shape, given.steps, given.repeats)


if __name__ == "__main__":
    main()
