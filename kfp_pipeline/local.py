"""The local run: the compiled pipeline on this machine, its artifacts in an embedded object store.

kfp.local executes the very file that a cluster runs, step by step, as subprocesses of this Python. It never touches
object storage by itself, so the steps get an s3:// URI of the embedded store as `storage_uri`.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import shutil
import signal
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from draft_model import storage
from draft_model.entrypoint import ERROR_FILE, TERMINATED, WORK_FOLDER, raise_on_sigterm
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from draft_model.preflight import check
from draft_model.processes import ROOT
from draft_model.storage.embedded import EmbeddedStore
from draft_model.tracking import RUN
from kfp_pipeline.compile import COMPILED, LOADER

logger = logging.getLogger(__name__)

STOP_SECONDS = 70  # longer than a training job needs to finish its step and save


def run_local(values: Mapping[str, Any], folder: Path) -> Path:
    """Runs the compiled pipeline here, in a folder that a second run may use again.

    Without storage_uri among the parameters the stages write to an embedded store in the folder.

    Returns:
        The local folder of the draft that is ready to serve, with its report.

    Raises:
        DraftModelError: for what the user can put right, with all problems of the first step that found any.
    """
    parameters = check(values)
    if parameters.training_backend == "auto":  # a notebook's pod on a cluster is "this machine" too
        parameters = parameters.model_copy(update={"training_backend": "local"})
        logger.info(
            "compute_model_import, compute_draft_model_training and the instance types choose nodes of a cluster: on "
            "this machine they are checked and not used"
        )
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    raise_on_sigterm()
    error = folder / f"error-{uuid.uuid4().hex}.json"  # an orphan of an earlier run must not write into it
    steps = {ERROR_FILE: str(error.resolve()), WORK_FOLDER: str(work.resolve()), ROOT: str(os.getpid())}
    try:
        with _alone(folder), _environment(steps | {RUN: uuid.uuid4().hex}), _store(parameters, folder) as uri:
            try:
                with _no_orphans():
                    _execute({**parameters.model_dump(), "storage_uri": uri}, folder)
            except RuntimeError as failure:
                if error.exists():
                    raise DraftModelError(json.loads(error.read_text(encoding="utf-8"))) from failure
                why = f"the local run failed: {failure}; the step's own messages are above"
                raise DraftModelError(why) from failure
            shutil.rmtree(folder / "output", ignore_errors=True)  # what an earlier run left is not this one's
            return storage.fetch(storage.join(uri, "output_model_path", "final"), folder / "output" / "final")
    finally:
        error.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder, whose results would be taken for this one's."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DraftModelError(
                f"--folder: given {str(folder)!r}, where another run is at work: give another"
            ) from None
        yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _store(parameters: Parameters, folder: Path) -> Iterator[str]:
    """URI that the stages write under: the user's, or a bucket of an embedded store that ends with the run."""
    if parameters.storage_uri:
        yield parameters.storage_uri
        return
    with EmbeddedStore(folder / "store") as store, _environment(store.environment):
        yield f"s3://{store.bucket}/pipeline_draft_model"


def _execute(values: Mapping[str, Any], folder: Path) -> None:
    from kfp import components, local

    pipeline, *platforms = yaml.load_all(COMPILED.read_text(encoding="utf-8"), Loader=LOADER)
    # Without what is for a cluster's pods: the jobs' images, and retries after an eviction.
    for executor in pipeline["deploymentSpec"]["executors"].values():
        executor["container"].pop("env", None)
    for component in pipeline["components"].values():
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    warnings.filterwarnings("ignore", module="kfp")
    root = str((folder / "kfp").resolve())
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=root, raise_on_error=True)
    with (folder / "run.log").open("w", encoding="utf-8") as log, redirect_stdout(_Screen(log)):
        components.load_component_from_text(yaml.safe_dump_all([pipeline, *platforms]))(**values)


class _Screen(io.TextIOBase):
    """Standard output of the steps: all of it to a file, and to the screen without the executor's own chatter."""

    def __init__(self, log: TextIO) -> None:
        self._log, self._screen = log, sys.stdout
        self._dump, self._open = False, False

    def write(self, text: str) -> int:
        self._log.write(text)
        executor = text.lstrip().startswith("[KFP Executor")
        if executor or self._dump:
            # The executor prints its input as indented JSON after a line of its own.
            self._dump = "Got executor_input" in text or (self._dump and text.rstrip() != "}" and not executor)
        elif text.strip() or self._open:
            self._screen.write(text)
            self._open = not text.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        self._screen.flush()


@contextmanager
def _no_orphans() -> Iterator[None]:
    """Ends the steps that still run when the run ends early, before the store goes.

    A signal ends them from its handler: kfp lets no exception through before the step has ended by itself, and
    meanwhile nobody reads what the step prints.
    """
    import psutil

    me = psutil.Process()
    before = set(me.children())

    def end_steps() -> None:
        started = set(me.children()) - before
        steps = [process for step in started for process in (step, *step.children(recursive=True))]
        for process in steps:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(steps, timeout=STOP_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(number: int, _: object) -> None:
        end_steps()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        end_steps()
