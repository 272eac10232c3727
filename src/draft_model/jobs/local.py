"""The local back end: the job's processes are torchrun's, beside the coordinating one."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator

from draft_model.doors import ERROR_FILE, raise_on_sigterm
from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Job, Pod
from draft_model.jobs.request import JobRequest, Manifest
from draft_model.jobs.states import State, Status
from draft_model.jobs.torchrun import STOP_SECONDS
from draft_model.training.config import TrainConfig, TrainResult

logger = logging.getLogger(__name__)


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


class LocalBackend:
    """Jobs whose one pod is this machine; they end with this process, so there is none to adopt."""

    name = "local"

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def render(self, request: JobRequest) -> list[Manifest]:
        """The command, and the variables that its environment has besides this process's own."""
        world = request.nodes * request.processes
        environment = {
            ERROR_FILE: str(request.config.work / "error.json"),
            "DRAFT_MODEL_JOB": request.config.to_json(),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if world > 1:
            threads = str(max(1, (os.cpu_count() or 1) // world))
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
        return [{"command": command(world), "environment": environment}]

    def create_or_adopt(self, request: JobRequest) -> Job:
        """Starts the processes."""
        request.config.work.mkdir(parents=True, exist_ok=True)
        (rendered,) = self.render(request)
        process = subprocess.Popen(rendered["command"], env={**os.environ, **rendered["environment"]})
        self._processes[request.name] = process
        return Job(request, str(process.pid))

    def wait(self, job: Job) -> int:
        """Waits for the processes' end; gives their exit code."""
        # With a time-out it looks every 50 ms; without one, a signal just before the wait would not end it.
        return self._processes[job.name].wait(timeout=math.inf)

    def state(self, job: Job) -> Status:
        """Where the job is now."""
        if job.name not in self._processes:
            return Status(State.DELETED)
        code = self._processes[job.name].poll()
        if code is None:
            return Status(State.RUNNING)
        return Status(State.FAILED, f"exit code {code}") if code else Status(State.SUCCEEDED)

    def pods(self, job: Job) -> list[Pod]:
        """This machine, while the job is there."""
        if job.name not in self._processes:
            return []
        code = self._processes[job.name].poll()
        return [Pod("this machine", 0, uid=job.uid, started=True, ended=code is not None, exit_code=code)]

    def logs(self, job: Job, pod: Pod, since: str) -> Iterator[tuple[str, str]]:
        """Nothing to read: the processes write to this process's own output."""
        return iter(())

    def delete(self, request: JobRequest) -> None:
        """Ends the processes; they finish their step and save."""
        if process := self._processes.pop(request.name, None):
            _stop(process)


def run(config: TrainConfig) -> TrainResult:
    """Runs a training job on this machine and waits for its end.

    Nodes and GPUs become processes here; the compute parameters have no other meaning without a cluster.

    Args:
        config: of the job.

    Raises:
        DraftModelError: what the job's processes named as the user's to put right, or that they died; or that the
            image this runs in is the coordinator's.
    """
    p = config.parameters
    if importlib.util.find_spec("torch") is None:
        raise DraftModelError(
            "training_backend: given 'local', but the image of this step only coordinates: use pytorchjob or trainjob, "
            "or compile the pipeline with `--image` naming the trainer's image for all steps"
        )
    error, result = config.work / "error.json", config.work / "result.json"
    error.unlink(missing_ok=True)
    result.unlink(missing_ok=True)
    logger.info(
        "training job: %d process(es) on this machine (%d node(s) x %d)",
        p.world_size, p.num_nodes_draft_model_training, p.number_of_gpu_to_use_draft_model_training,
    )  # fmt: skip
    raise_on_sigterm()
    backend, request = LocalBackend(), JobRequest(run_id="local", attempt=0, config=config)
    try:
        code = backend.wait(backend.create_or_adopt(request))
    finally:
        backend.delete(request)
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
