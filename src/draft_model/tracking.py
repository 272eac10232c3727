"""Experiment tracking by MLflow, where a server is named; it never stops or slows what it tracks.

A daemon thread sends what a stage reports; what a server that is away misses is in the stage's output. MLflow's own
asynchronous logging is not used because its exit handler waits for every queued batch, also of a server that is gone.

Kubeflow Pipelines 2.17 makes a run for each task and sets MLFLOW_RUN_ID; that run is written to, and KFP ends it.
Elsewhere each stage makes a run of its own, below a parent that all stages of one DRAFT_MODEL_RUN share.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from queue import SimpleQueue
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from draft_model.errors import without_credentials
from draft_model.parameters import Stage

logger = logging.getLogger(__name__)

RUN = "DRAFT_MODEL_RUN"  # what the stages of one pipeline run have in common
LOGIN = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")  # with a secret in them
_FORWARDED = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME",
              "MLFLOW_WORKSPACE", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_INSECURE_TLS", RUN)  # fmt: skip
_DEFAULTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
             "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}  # fmt: skip
_PARENT = "mlflow.parentRunId"
_LONGEST_VALUE = 6000
END_SECONDS, FAILED_SECONDS = 120.0, 10.0
"""How long the end of a stage waits for the server; a pod that failed or was asked to stop has half a minute."""
PAUSE = 60.0  # seconds after a failure in which records are dropped
Stagelike = TypeVar("Stagelike", bound=Callable[..., Any])


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that a job's pods need of their step's; a URI with a password stays behind, as pods are readable."""
    found = {name: environment[name] for name in _FORWARDED if environment.get(name)}
    return {} if "@" in urlsplit(found.get("MLFLOW_TRACKING_URI", "")).netloc else found


class Tracker:
    """Reports a stage to the server or store at a URI, if any. Its methods return at once and raise nothing."""

    def __init__(self, stage: str = "", uri: str = "") -> None:
        self._stage, self._uri, self.active = stage, uri, bool(uri)
        self._queue: SimpleQueue[tuple[Callable[[], Any], bool]] = SimpleQueue()  # requests, and which is the last
        self._client: Any = None
        self._parent, self._lost, self._failed_at = "", 0, -math.inf
        # Ids in the environment are those of the environment's server.
        here = os.environ if uri == os.environ.get("MLFLOW_TRACKING_URI") else {}
        self._run, self._experiment = here.get("MLFLOW_RUN_ID", ""), here.get("MLFLOW_EXPERIMENT_ID", "")
        self._ends_run = not self._run

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Tracks numbers of an optimizer step; a list becomes `name_1`, ...; None and NaN are left out."""
        flat = []
        for name, value in values.items():
            items = enumerate(value, 1) if isinstance(value, list | tuple) else [(0, value)]
            flat += [(f"{name}_{index}" if index else name, x) for index, x in items if x is not None]
        now = time.time_ns() // 1_000_000
        self._log("metrics", "Metric", [(name, float(x), now, step) for name, x in flat if math.isfinite(x)])

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Tracks parameters; those that are empty are left out."""
        self._log("params", "Param", [(name, str(x)[:_LONGEST_VALUE]) for name, x in values.items() if x != ""])

    def references(self, values: Mapping[str, str]) -> None:
        """Tracks where artifacts are, by name; nothing is copied."""
        self._log("tags", "RunTag", [(f"artifact.{name}", uri[:_LONGEST_VALUE]) for name, uri in values.items()])

    def inputs(self, values: Mapping[str, tuple[str, str]]) -> None:
        """Tracks what went in: URI and digest, by name (`target`, `dataset`)."""

        def send() -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            for name, (uri, digest) in values.items():
                data = Dataset(name, digest[:36], "draft-model", json.dumps({"uri": uri}))
                self._client.log_inputs(self._run, [DatasetInput(data, [InputTag("mlflow.data.context", name)])])

        self._send(send)

    def register(self, name: str, uri: str) -> None:
        """Registers a model version of this run."""

        def send() -> None:
            from mlflow.exceptions import MlflowException

            with suppress(MlflowException):  # there is one by this name; what else it may be, the next call meets, too
                self._client.create_registered_model(name)
            self._client.create_model_version(name, source=uri, run_id=self._run)

        self._send(send)

    def _log(self, kind: str, entity: str, values: list[Any]) -> None:
        def send() -> None:
            from mlflow import entities

            self._client.log_batch(self._run, **{kind: [getattr(entities, entity)(*one) for one in values]})

        self._send(send)

    def _send(self, request: Callable[[], Any]) -> None:
        if self.active:
            self._queue.put((request, False))

    def work(self) -> None:
        """Sends what is reported, until the end; runs in a thread of its own."""
        last = False
        while not last:
            request, last = self._queue.get()
            if not last and time.monotonic() < self._failed_at + PAUSE:
                self._lost += 1
                continue
            try:
                self._open()
                request()
            except Exception as error:  # MLflow has no common ancestor for what a network can do
                if not self._lost:
                    reason = str(error).partition("\n")[0][:300]
                    self._warn(f"{type(error).__name__}: {reason}; what it misses is in the stage's output")
                self._lost, self._failed_at = self._lost + 1, time.monotonic()

    def end(self, status: str, thread: threading.Thread) -> None:
        """Says how the stage ended, and waits a little for the server."""
        self._queue.put((lambda: self._end(status), True))
        thread.join(END_SECONDS if status == "FINISHED" else FAILED_SECONDS)
        if (lost := self._lost + self._queue.qsize()) or thread.is_alive():
            self._warn(f"has not taken {max(lost, 1)} records; their numbers are in the stage's output")

    def _warn(self, what: str) -> None:
        logger.warning("tracking: %s: %s", without_credentials(self._uri).partition("?")[0], without_credentials(what))

    def _open(self) -> None:
        """Finds or makes the run and the parent."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri, self._uri)
        if self._run:
            return
        client, group = self._client, os.environ.get(RUN, "")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "draft-model")
        if not self._experiment and (found := client.get_experiment_by_name(name)):
            self._experiment = found.experiment_id
        self._experiment = self._experiment or client.create_experiment(name)
        if group and not self._parent:
            parents = self._oldest_first(f"tags.`draft_model.run` = '{group}'")
            tags = {"draft_model.run": group}
            parent = parents[0] if parents else client.create_run(self._experiment, run_name="draft-model", tags=tags)
            self._parent = parent.info.run_id
        tags = {_PARENT: self._parent} if self._parent else {}
        self._run = client.create_run(self._experiment, run_name=self._stage, tags=tags).info.run_id

    def _oldest_first(self, wanted: str) -> list[Any]:
        return list(self._client.search_runs([self._experiment], wanted, order_by=["attributes.start_time ASC"]))

    def _end(self, status: str) -> None:
        """Ends the run, and the parent: failed where the newest run of some stage has, running while one is."""
        if self._ends_run:
            self._client.set_terminated(self._run, status)
        children = self._oldest_first(f"tags.`{_PARENT}` = '{self._parent}'") if self._parent else []
        newest = {child.info.run_name: child.info.status for child in children}.values()
        if newest and ("FAILED" in newest or "RUNNING" not in newest):
            self._client.set_terminated(self._parent, "FAILED" if "FAILED" in newest else "FINISHED")


@contextmanager
def track(stage: str, uri: str = "") -> Iterator[Tracker]:
    """Tracks one stage as a run on the server at a URI, or at MLFLOW_TRACKING_URI; on neither, nothing is tracked."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):  # MLflow would take it for a folder
        logger.warning("tracking: %s: nothing is tracked; put http:// or https:// before it", uri)
        uri = ""
    tracker = Tracker(stage, uri)
    if not tracker.active:
        yield tracker
        return
    os.environ.update(_DEFAULTS | os.environ)
    import mlflow.tracking  # noqa: F401  (not first in the thread: a stage may import it at the same time)

    thread, status = threading.Thread(target=tracker.work, daemon=True, name="tracking"), "FAILED"
    thread.start()
    try:
        yield tracker
        status = "FINISHED"
    finally:
        tracker.end(status, thread)


def tracked(stage: Stage, artifact: str) -> Callable[[Stagelike], Stagelike]:
    """Tracks a stage's function (config -> result): parameters, how it ended, and the result's URI as an artifact."""

    def wrap(run: Stagelike) -> Stagelike:
        @wraps(run)
        def run_tracked(config: Any) -> Any:
            with track(stage, config.parameters.mlflow_tracking_uri) as tracker:
                tracker.parameters(config.parameters.of_stage(stage))
                result = run(config)
                tracker.references({artifact: result.uri})
                return result

        return cast(Stagelike, run_tracked)

    return wrap
