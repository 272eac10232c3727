"""A training on this machine: a plain process where it is alone, torchrun otherwise."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from draft_model.entrypoint import ERROR_FILE, raise_on_sigterm
from draft_model.errors import DraftModelError
from draft_model.jobs.spec import JobSpec
from draft_model.jobs.torchrun import STOP_SECONDS
from draft_model.processes import ROOT

logger = logging.getLogger(__name__)

_LACKS = dict.fromkeys((-9, 137), "memory") | dict.fromkeys((-7, 135), "space on the disk or in /dev/shm")


def run(spec: JobSpec, work: Path) -> None:
    """Runs a job's processes and waits for their end; nodes and GPUs become processes here.

    Raises:
        DraftModelError: what the processes reported as the user's to put right, or that they died; or that the image
            of this step is the coordinator's.
    """
    if importlib.util.find_spec("torch") is None:
        raise coordinates_only("training_backend: given 'local'", "pytorchjob or trainjob")
    world = spec.nodes * spec.processes
    logger.info(
        "%s job: %d process(es) on this machine (%d node(s) x %d)", spec.stage, world, spec.nodes, spec.processes
    )
    work.mkdir(parents=True, exist_ok=True)
    # A file of this run's own: an orphan of an earlier one must not write into it.
    error = Path(tempfile.mkdtemp(prefix="errors-", dir=work)) / "error.json"
    environment = {ERROR_FILE: str(error), "DRAFT_MODEL_JOB": spec.config, "TOKENIZERS_PARALLELISM": "false"}
    environment[ROOT] = str(os.getpid())
    if world > 1:
        threads = max(1, (os.cpu_count() or 1) // world)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    raise_on_sigterm()
    process = subprocess.Popen(command(world), env={**os.environ, **environment})
    try:
        # With a time-out it looks every 50 ms; without one, a signal just before the wait would not end it.
        code = process.wait(timeout=math.inf)
    finally:
        if process.poll() is None:
            process.terminate()  # they finish their step and save
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if error.exists():
        raise DraftModelError(json.loads(error.read_text(encoding="utf-8")))
    if code or (lacks := spec.check()):
        hint = f"; {code} is most often a lack of {_LACKS[code]}" if code in _LACKS else ""
        why = f"its own messages are above{hint}" if code else "; ".join(lacks)
        raise DraftModelError(f"the training job ended with exit code {code}: {why}")


def coordinates_only(why: str, use: str) -> DraftModelError:
    """A stage that should run in this step, whose image has not what it needs."""
    return DraftModelError(
        f"{why}, but the image of this step only coordinates: use {use}, or compile the pipeline with `--image` naming "
        "the trainer's image for all steps"
    )


def command(world: int) -> list[str]:
    """The command of so many training processes."""
    launcher = ["draft_model.jobs.torchrun", "--standalone", f"--nproc-per-node={world}", "-m"] if world > 1 else []
    return [sys.executable, "-m", *launcher, "draft_model.training"]
