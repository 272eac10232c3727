"""The tracker: a log on this machine that a thread sends to MLflow at the server's pace.

What is tracked is appended to a file, and that is all that the tracked code waits for. One thread reads the file from
where it was last acknowledged, at most `BATCH` records at a time, and sends them: so the queue takes no memory, a
server that is slow only falls behind, and what a server missed while it was down is sent when it answers again, at the
end at the latest. After the end it has `END_SECONDS` for what is left; then the file is kept beside the stage's output,
and `draft-model track` sends it later.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters, Stage
from draft_model.tracking.server import Refused, Server, Settings

logger = logging.getLogger(__name__)

BATCH = 100
END_SECONDS = 120.0
FAILED_SECONDS = 10.0
"""The same where the stage failed or was asked to stop: a pod has half a minute to end."""
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0

Status = Literal["FINISHED", "FAILED"]


class StageConfig(Protocol):
    """What the configurations of all stages have."""

    @property
    def work(self) -> Path:
        """Scratch folder."""

    @property
    def output(self) -> str:
        """URI of the folder that the stage leaves."""

    @property
    def parameters(self) -> Parameters:
        """Of the run."""


class StageResult(Protocol):
    """What the results of import and dataset have."""

    @property
    def uri(self) -> str:
        """Of the folder that the stage left."""


Config = TypeVar("Config", bound=StageConfig)
Result = TypeVar("Result", bound="StageResult")


class Tracker:
    """What a stage tells of itself. Its methods return at once and raise nothing.

    Args:
        file: the local log; None where tracking is not set up, and nothing is tracked.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether tracking is set up."""
        return self._file is not None

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Tracks numbers of one step.

        Args:
            step: optimizer steps done.
            values: by name; a list becomes `name_1`, `name_2`, ..., and None is left out.
        """
        flat: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, list | tuple):
                flat.update({f"{name}_{place}": float(x) for place, x in enumerate(value, 1) if x is not None})
            elif value is not None:
                flat[name] = float(value)
        self._write("metrics", flat, step=step)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Tracks parameters; those that are empty are left out."""
        self._write("parameters", {name: str(value) for name, value in values.items() if value != ""})

    def references(self, values: Mapping[str, str]) -> None:
        """Tracks where artifacts are, by name; nothing is copied."""
        self._write("tags", {f"artifact.{name}": uri for name, uri in values.items()})

    def inputs(self, values: Mapping[str, tuple[str, str]]) -> None:
        """Tracks what went in: URI and digest, by name (`target`, `dataset`)."""
        self._write("inputs", {name: list(origin) for name, origin in values.items()})

    def register(self, name: str, uri: str) -> None:
        """Registers a model version of this run."""
        self._write("register", {"name": name, "uri": uri})

    def end(self, status: Status) -> None:
        """Says how the stage ended; nothing may follow."""
        self._write("end", {"status": status})

    def _write(self, kind: str, values: Mapping[str, Any], step: int = 0) -> None:
        if self._file is None or not values:
            return
        line = json.dumps({"kind": kind, "time": time.time_ns() // 1_000_000, "step": step, "values": dict(values)})
        try:
            with self._lock, self._file.open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        except OSError as error:
            logger.warning("tracking: %s cannot be written (%s); this record is lost", self._file, error)


class _Sender(threading.Thread):
    """Sends the log; ends with the record of kind `end`, or when the server refuses."""

    def __init__(self, file: Path, settings: Settings) -> None:
        super().__init__(daemon=True, name="tracking")
        self.file, self.settings = file, settings
        self.server = Server(settings)
        self.hurry, self.given_up = threading.Event(), threading.Event()
        self.warned, self.sent_all = False, False

    def run(self) -> None:
        offset, pause = 0, _PAUSE
        while True:
            try:
                records, following = self._next(offset)
                self.server.send(records)
                offset, pause = following, _PAUSE
                if records and records[-1]["kind"] == "end":
                    self.sent_all = True
                    return
            except Refused as refusal:
                self.warn(f"{refusal}; nothing more is sent")
                return
            except Exception as error:
                if self.given_up.is_set():
                    return
                if not self.warned:
                    self.warn(f"{type(error).__name__}: {_short(error)}; it goes on, and what is missed is sent later")
                if not self.hurry.wait(pause):
                    pause = min(2 * pause, _LONGEST_PAUSE)
                elif self.given_up.wait(_PAUSE):
                    return
                continue
            if not records:
                self.hurry.wait(_PAUSE)

    def _next(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Whole lines from an offset on, and where the next ones begin."""
        with self.file.open("rb") as log:
            log.seek(offset)
            lines = [line for _, line in zip(range(BATCH), log, strict=False) if line.endswith(b"\n")]
        return [json.loads(line) for line in lines], offset + sum(map(len, lines))

    def warn(self, what: str) -> None:
        """Tells the first trouble as a warning, and what follows from it as a note."""
        logger.log(logging.INFO if self.warned else logging.WARNING, "tracking: %s: %s", self.settings.shown_uri, what)
        self.warned = True

    def keep(self, uri: str) -> str:
        """Puts the log where it outlives this machine, with the run that it belongs to; gives its URI."""
        from draft_model import storage

        kept = storage.join(uri, self.file.name)
        header = json.dumps({"kind": "run", "values": self.server.identity})
        storage.write_bytes(kept, f"{header}\n".encode() + self.file.read_bytes())
        return kept


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


@contextmanager
def track(stage: str, folder: Path, output: str, uri: str = "", end_seconds: float = END_SECONDS) -> Iterator[Tracker]:
    """Tracks one stage as one run of MLflow, a child of the pipeline's.

    Args:
        stage: names the run.
        folder: where the local log goes.
        output: URI of the folder where the log is kept that the server has not taken.
        uri: of the server; empty: MLFLOW_TRACKING_URI.
        end_seconds: how long the end may wait for the server.

    Yields:
        The tracker; one that does nothing where no server is named.
    """
    settings = Settings.of_environment(stage, os.environ, uri)
    if settings is None:
        yield Tracker(None)
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"tracking-{stage}-{uuid.uuid4().hex[:8]}.jsonl"
    file.write_text("", encoding="utf-8")
    tracker, sender = Tracker(file), _Sender(file, settings)
    sender.start()
    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        tracker.end(status)
        sender.hurry.set()
        seconds = end_seconds if status == "FINISHED" else min(end_seconds, FAILED_SECONDS)
        sender.join(seconds)
        if not sender.sent_all:
            sender.given_up.set()
            _keep_log(sender, output)


def _keep_log(sender: _Sender, output: str) -> None:
    try:
        kept = sender.keep(output)
    except Exception as error:  # whatever a store can do; it must not hide how the stage ended
        sender.warn(f"has not taken everything, and the log cannot be kept in {output}: {_short(error)}")
        return
    sender.warn(f"has not taken everything; all of it is in {kept}, which `draft-model track {kept}` sends")


def send_log(uri: str) -> str:
    """Sends a log that a stage kept, to the run that it belongs to.

    Args:
        uri: of the log.

    Returns:
        Id of the run.

    Raises:
        DraftModelError: when it is no such log, MLFLOW_TRACKING_URI is not set, or the server does not take it.
    """
    from draft_model import storage

    try:
        header, *records = [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
        identity = header["values"]
        server = Server.of_identity(identity, os.environ)
    except (ValueError, LookupError, TypeError) as error:
        raise DraftModelError(f"{uri} is no log of a stage's tracking ({error!r})") from error
    if server is None:
        raise DraftModelError("MLFLOW_TRACKING_URI: not set; it says where the log is sent")
    try:
        for start in range(0, len(records), BATCH):
            server.send(records[start : start + BATCH])
    except Exception as error:  # MLflow has no common ancestor for what a network can do
        raise DraftModelError(
            f"MLFLOW_TRACKING_URI: {server.settings.shown_uri} does not take {uri}: {_short(error)}; it may be sent "
            "again, as often as need be"
        ) from error
    return str(server.identity["run"])


def tracked(stage: Stage, artifact: str) -> Callable[[Callable[[Config], Result]], Callable[[Config], Result]]:
    """Tracks a stage's function: its parameters, how it ended and where its result is.

    Args:
        stage: names the run.
        artifact: names the folder that it leaves.
    """

    def wrap(run: Callable[[Config], Result]) -> Callable[[Config], Result]:
        @wraps(run)
        def run_tracked(config: Config) -> Result:
            with track(stage, config.work, config.output, config.parameters.mlflow_tracking_uri) as tracker:
                tracker.parameters(config.parameters.of_stage(stage))
                result = run(config)
                tracker.references({artifact: result.uri})
                return result

        return run_tracked

    return wrap
