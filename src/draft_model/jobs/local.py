"""The local back end: the job's processes are torchrun's, beside the coordinating one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

from draft_model.doors import ERROR_FILE, raise_on_sigterm
from draft_model.errors import DraftModelError
from draft_model.training.config import TrainConfig, TrainResult

logger = logging.getLogger(__name__)

STOP_SECONDS = 60  # a process that was asked to stop finishes its step and saves


def command(world: int) -> list[str]:
    """The command of the job: a plain process when it is alone, torchrun otherwise."""
    module = ["-m", "draft_model.training"]
    if world == 1:
        return [sys.executable, *module]
    return [
        sys.executable,
        "-m",
        "draft_model.jobs.torchrun",
        "--standalone",
        f"--nproc-per-node={world}",
        *module,
    ]


def run(config: TrainConfig) -> TrainResult:
    """Runs a training job on this machine and waits for its end.

    Nodes and GPUs become processes here; the compute parameters have no other meaning without a cluster.

    Args:
        config: of the job.

    Raises:
        DraftModelError: what the job's processes named as the user's to put right, or that they died.
    """
    p = config.parameters
    config.work.mkdir(parents=True, exist_ok=True)
    error, result = config.work / "error.json", config.work / "result.json"
    error.unlink(missing_ok=True)
    result.unlink(missing_ok=True)
    logger.info(
        "training job: %d process(es) on this machine (%d node(s) x %d)",
        p.world_size, p.num_nodes_draft_model_training, p.number_of_gpu_to_use_draft_model_training,
    )  # fmt: skip
    environment = {
        **os.environ,
        ERROR_FILE: str(error),
        "DRAFT_MODEL_JOB": config.to_json(),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if p.world_size > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // p.world_size)))
    raise_on_sigterm()
    process = subprocess.Popen(command(p.world_size), env=environment)
    try:
        code = process.wait()
    finally:
        _stop(process)
    if error.exists():
        raise DraftModelError(json.loads(error.read_text(encoding="utf-8")))
    if code or not result.exists():
        raise DraftModelError(
            f"the training job ended with exit code {code}: its own messages are above"
            + ("; -9 or 137 is most often a lack of memory" if code in (-9, 137) else "")
        )
    return TrainResult(**json.loads(result.read_text(encoding="utf-8")))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
