"""The pipeline's heavy stages as jobs: created, followed and ended from a coordinating process.

On a cluster the pods of a PyTorchJob or a TrainJob compute; elsewhere a training has processes on this machine, and the
other stages run in the process that asks for them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_model import storage
from draft_model.entrypoint import ERROR_FILE, raise_on_sigterm
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.parameters import Parameters, Stage
from draft_model.processes import ROOT

if TYPE_CHECKING:
    from draft_model.jobs.spec import Job
    from draft_model.training.config import TrainConfig, TrainResult

__all__ = ["coordinates_only", "lacking", "run", "run_here", "run_job", "run_stage"]

logger = logging.getLogger(__name__)

_LACKS = dict.fromkeys((-9, 137), "memory") | dict.fromkeys((-7, 135), "space on the disk or in /dev/shm")


def run(config: TrainConfig, run_id: str = "") -> TrainResult:
    """Trains a draft as a job and waits for its end; `run_id` is of the pipeline's run, where there is one."""
    from draft_model.jobs.context import wants_cluster
    from draft_model.jobs.spec import WORK, Job
    from draft_model.training.config import INDEX, TrainResult, list_checkpoints
    from draft_model.training.lease import hold, own_run_id

    p, final, of_a_pipeline = config.parameters, storage.join(config.output, "final"), bool(run_id)
    result = config.work / "result.json"
    result.unlink(missing_ok=True)
    if on_cluster := wants_cluster(p):
        # A run that Kubeflow has not started is known by its output. Whatever a queue or an operator starts again goes
        # on from this run's own checkpoints.
        run_id = run_id or f"cli-{hashlib.sha256(config.output.encode()).hexdigest()[:16]}"
        sent = replace(config, work=Path(WORK), run_id=run_id, again=True)
    else:
        sent = replace(config, run_id=run_id or own_run_id())

    def prepare(*, again: bool) -> None:
        """Keeps what an earlier run left under this output from being taken for this one's.

        What is there after KFP's Retry is this run's own, and it goes on from it; a command is a new run each time.
        """
        if again and of_a_pipeline:
            return
        storage.remove_manifest(final)
        if p.resume == "false" and (names := list_checkpoints(config.checkpoints)):
            for name in names:
                storage.remove_manifest(storage.join(config.checkpoints, name))
            storage.write_bytes(storage.join(config.checkpoints, INDEX), b"[]")

    uris = {"model": config.model, "dataset": config.dataset, "output": config.output}
    job = Job(
        stage="train",
        config=sent.to_json(),
        uris={**uris, "checkpoint_path": config.checkpoints},
        output=config.output,
        parameters=p,
        # On this machine the output may hold an earlier run's draft, which a mistake in this one must not remove.
        check=lambda: lacking(final, "train") if on_cluster or result.exists() else ["it has left no result"],
        prepare=prepare,
        nodes=p.num_nodes_draft_model_training,
        processes=p.number_of_gpu_to_use_draft_model_training,
        run_id=sent.run_id,
    )
    with (
        hold(config.output, job.run_id, outermost=True, parameter="output"),
        hold(p.checkpoint_path, job.run_id, outermost=True),
    ):
        if on_cluster:
            run_job(job, config.work)
        else:
            run_here(job, config.work)
    record = json.loads(storage.read_bytes(storage.join(final, "training.json")))
    return TrainResult.from_record(config.output, final, record)


def run_stage(
    stage: Stage, p: Parameters, uris: Mapping[str, str], output: str, run_id: str, work: Path, nodes: int = 1
) -> dict[str, Any]:
    """Runs a stage other than the training as a job on the cluster; returns what its process left as its result.

    `uris` are what the stage reads and writes; record, logs and result of the job go under `output`.
    """
    from draft_model.jobs.spec import WORK, Job

    result = storage.join(output, f"{stage}_result.json")
    sent = {"stage": stage, "run_id": run_id, "parameters": p.model_dump(), "uris": dict(uris), "result": result,
           "work": WORK}  # fmt: skip

    def check() -> list[str]:
        found = json.loads(storage.read_file(result) or b"{}")
        if found.get("run_id") != run_id:
            return [f"there is no result of this run at {result}"]
        return lacking(found["uri"], found["written_by"])

    job = Job(stage, json.dumps(sent), {**uris, "output": output}, output, p, check, nodes=nodes, run_id=run_id)
    run_job(job, work)
    return dict(json.loads(storage.read_bytes(result)))


def run_job(job: Job, work: Path) -> None:
    """Runs a job of a run on the cluster to its end; raises DraftModelError where its output is not whole."""
    from draft_model.jobs.cluster import patiently
    from draft_model.jobs.context import complete, connect
    from draft_model.jobs.coordinate import Coordinator

    logger.info("the %s job runs on the cluster; this process coordinates it", job.stage)
    raise_on_sigterm()
    cluster, retried = connect(), os.environ.get("KFP_RETRY_INDEX", "0") not in ("", "0")
    patiently(lambda: Coordinator(cluster, complete(cluster, job), work, retried=retried)).run()


def run_here(job: Job, work: Path) -> None:
    """Runs a training on this machine to its end, where nodes and GPUs are processes; raises what these reported."""
    from draft_model.jobs.torchrun import STOP_SECONDS

    if importlib.util.find_spec("torch") is None:
        raise coordinates_only("training_backend: given 'local'", "pytorchjob or trainjob")
    world = job.nodes * job.processes
    logger.info("%s job: %d process(es) on this machine (%d node(s) x %d)", job.stage, world, job.nodes, job.processes)
    work.mkdir(parents=True, exist_ok=True)
    # A file of this run's own: an orphan of an earlier one must not write into it.
    error = Path(tempfile.mkdtemp(prefix="errors-", dir=work)) / "error.json"
    environment = {**os.environ, ERROR_FILE: str(error), "DRAFT_MODEL_JOB": job.config, ROOT: str(os.getpid())}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if world > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    raise_on_sigterm()
    process = subprocess.Popen(command(world), env=environment)
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
    if code or (lacks := job.check()):
        hint = f"; {code} is most often a lack of {_LACKS[code]}" if code in _LACKS else ""
        why = f"its own messages are above{hint}" if code else "; ".join(lacks)
        raise DraftModelError(f"the training job ended with exit code {code}: {why}")


def command(world: int) -> list[str]:
    """The command of so many training processes: a plain one where it is alone, torchrun otherwise."""
    launcher = ["draft_model.jobs.torchrun", "--standalone", f"--nproc-per-node={world}", "-m"] if world > 1 else []
    return [sys.executable, "-m", *launcher, "draft_model.training"]


def coordinates_only(why: str, use: str) -> DraftModelError:
    """A stage that should run in this step, whose image has not what it needs."""
    return DraftModelError(
        f"{why}, but the image of this step only coordinates: use {use}, or compile the pipeline with `--image` naming "
        "the trainer's image for all steps"
    )


def lacking(uri: str, stage: str) -> list[str]:
    """What a stage's output lacks; empty where its manifest and all files are there."""
    try:
        whole = storage.is_whole(uri, storage.read_manifest(uri, stage=stage))
        return [] if whole else [f"{uri}: files that its manifest lists are missing"]
    except StoreUnavailable:
        raise
    except DraftModelError as error:
        return error.problems
