"""Real processes of a training job, several after one another in the same ones, started in tenths of a second.

They are forked from a server that has imported the libraries once and runs nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import nullcontext
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

from draft_model.training.config import TrainConfig, TrainResult
from training.case import Trained, when_logged

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "transformers.models.llama.modeling_llama", "torch.distributed.tensor", "draft_model.training.job",
    "draft_model.storage.s3", "draft_model.preflight", "draft_model.evaluation", "draft_model.jobs",
    "kfp.dsl.executor_main",
]  # fmt: skip


def _preload(names: list[str]) -> None:
    forkserver._forkserver.set_forkserver_preload([*_PRELOADED, *names])


# There is one server in a process: the product's workers, which may start it first, get what is needed here as well.
forkserver.set_forkserver_preload = _preload
_preload([])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(function, *arguments, log: Path, rank: int = 0, world: int = 1, port: int = 0):
    """Starts one process that calls a function; its standard error goes to the end of a file."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY"))}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {name: str(value) for name, value in ranks.items()}
    process = _CONTEXT.Process(target=_begin, args=(environment, log, function, *arguments))
    process.start()
    return process


def _begin(environment, log, function, *arguments):
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(function(*arguments))


def run_world(world: int, function, *arguments, log: Path) -> list[int]:
    """Runs a function in so many processes; gives their exit codes, -9 where a signal ended one."""
    port = free_port()
    processes = [start(function, *arguments, log=log, rank=rank, world=world, port=port) for rank in range(world)]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def train_all(configs: list[str], ports: list[int], stop_at: str = "", small: tuple[int, ...] = ()) -> int:
    """Trainings after one another; the last is asked to stop when its first process logs a text.

    Those of the numbers in `small` see devices whose memory holds no copy of the target beside the draft.
    """
    from draft_model.target import parallel
    from draft_model.training import job

    job._OTHERS_FIRST = 0.0
    for number, (config, port) in enumerate(zip(configs, ports, strict=True)):
        parallel.memory_of = lambda device, number=number: 1e9 if number in small else None
        os.environ |= {"DRAFT_MODEL_JOB": config, "MASTER_PORT": str(port)}
        asked = bool(stop_at) and number == len(configs) - 1
        with when_logged(stop_at, partial(os.kill, os.getpid(), signal.SIGTERM)) if asked else nullcontext():
            if code := job.main():
                return code
    return 0


def train_in(world: int, *configs: TrainConfig, log: Path, stop_at: str = "", small: tuple[int, ...] = ()) -> list[int]:
    """Trains in so many processes; see `train_all`."""
    texts = [config.to_json() for config in configs]
    ports = [free_port() for _ in configs]
    return run_world(world, train_all, texts, ports, stop_at, small, log=log)


def train_killed_in(config: str, place: str, name: str, number: int = signal.SIGKILL) -> int:
    """A training that sends itself a signal when a method (`module:Class.method`) first handles a path of this end."""
    from importlib import import_module

    module, _, path = place.partition(":")
    owner, _, method = path.partition(".")
    found = getattr(import_module(module), owner)
    original = getattr(found, method)

    def dying(self, *arguments, **options):
        path = [getattr(self, "uri", self), *(argument for argument in arguments[:1] if isinstance(argument, str))]
        if "/".join(map(str, path)).endswith(name):
            setattr(found, method, original)
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    setattr(found, method, dying)
    return train_all([config], [0])


def outcome(config: TrainConfig) -> Trained:
    """What a training in other processes left."""
    return Trained(TrainResult(**json.loads((config.work / "result.json").read_text())))
