"""The MLflow side of tracking: which run a stage writes to, and how records become MLflow's.

Kubeflow Pipelines 2.17 makes a run for each task and injects MLFLOW_RUN_ID beside MLFLOW_TRACKING_URI; then that run is
written to, and KFP ends it. Elsewhere each stage makes a run of its own, below a parent that all stages of one
DRAFT_MODEL_RUN share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

EXPERIMENT = "draft-model"
RUN = "DRAFT_MODEL_RUN"
"""Environment variable: what the stages of one pipeline run have in common."""

_FORWARDED = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME",
              "MLFLOW_WORKSPACE", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_INSECURE_TLS", RUN)  # fmt: skip
LOGIN = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Environment variables with a secret in them."""
_PARENT = "mlflow.parentRunId"
_LONGEST_VALUE = 6000
_SETTINGS = ("run_id", "experiment_id", "experiment", "group")


class Refused(Exception):
    """The server answered, and will not take what it was sent, now or later."""


@dataclass(frozen=True)
class Settings:
    """Where a stage is tracked.

    Attributes:
        uri: of the server or store.
        stage: names the run.
        run_id: of a run that is there already; empty: one is made.
        experiment_id: of MLflow; empty: by name.
        experiment: its name.
        group: what the stages of one pipeline run share; empty where there is no parent.
    """

    uri: str
    stage: str
    run_id: str
    experiment_id: str
    experiment: str
    group: str

    @classmethod
    def of_environment(cls, stage: str, environment: Mapping[str, str], uri: str = "") -> Settings | None:
        """As MLflow's own variables say, but for a URI that is given; None where there is neither.

        Ids that the environment names are of the environment's server.
        """
        there = environment.get("MLFLOW_TRACKING_URI", "")
        if not (uri or there):
            return None
        ids = environment if uri in ("", there) else {}
        return cls(
            uri=uri or there,
            stage=stage,
            run_id=ids.get("MLFLOW_RUN_ID", ""),
            experiment_id=ids.get("MLFLOW_EXPERIMENT_ID", ""),
            experiment=environment.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT),
            group=environment.get(RUN, ""),
        )

    @property
    def shown_uri(self) -> str:
        """The URI without what may be a password."""
        parts = urlsplit(self.uri)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What the pods of a training job need of the environment of the step that starts it.

    A URI with a password in it stays behind: what a pod is told stands readable in the cluster.
    """
    found = {name: environment[name] for name in _FORWARDED if environment.get(name)}
    return {} if "@" in urlsplit(found.get("MLFLOW_TRACKING_URI", "")).netloc else found


class Server:
    """Sends records to one run; it is found or made with the first that are sent.

    Args:
        settings: where.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._client: Any = None
        self._parent, self._run = "", settings.run_id

    @property
    def identity(self) -> dict[str, str]:
        """Which run this is, as a log that is sent later must know it; `run` is empty before it is made."""
        kept = {
            name: getattr(self.settings, name) for name in ("stage", "run_id", "experiment_id", "experiment", "group")
        }
        return {**kept, "run": self._run, "parent": self._parent}

    @classmethod
    def of_identity(cls, identity: Mapping[str, str], environment: Mapping[str, str]) -> Server | None:
        """The same run again; None where there is no MLFLOW_TRACKING_URI."""
        here = Settings.of_environment(identity["stage"], environment)
        if here is None:
            return None
        server = cls(replace(here, **{name: identity[name] for name in _SETTINGS}))
        server._run, server._parent = identity["run"], identity["parent"]
        return server

    def send(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Sends records, in their order. Sending some again changes nothing.

        Raises:
            Refused: when the server will not have them.
            Exception: whatever a network can do; the same records may be sent again.
        """
        if not records:
            return
        try:
            self._open()
            self._batch(records)
            for record in records:
                if record["kind"] == "inputs":
                    self._inputs(record["values"])
                elif record["kind"] == "register":
                    self._register(**record["values"])
                elif record["kind"] == "end":
                    self._end(record["values"]["status"])
        except Exception as error:
            # 408 and 429 ask to come again; other 4xx will be the same the next time.
            code = getattr(error, "get_http_status_code", lambda: 500)()
            if 400 <= code < 500 and code not in (408, 429):
                raise Refused(f"the server refuses: {str(error).partition(chr(10))[0][:200]}") from error
            raise

    def _open(self) -> None:
        if self._client is None:
            # A server that is down or slow is tried again here, one request at a time.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where results go
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.settings.uri)
        if self._run:
            return
        experiment = self.settings.experiment_id or self._experiment()
        if self.settings.group and not self._parent:
            self._parent = self._of_group(experiment)
        tags = {_PARENT: self._parent} if self._parent else {}
        self._run = self._client.create_run(experiment, run_name=self.settings.stage, tags=tags).info.run_id

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.settings.experiment)
        made: str = found.experiment_id if found else self._client.create_experiment(self.settings.experiment)
        return made

    def _of_group(self, experiment: str) -> str:
        """The parent of all stages of one pipeline run. Of two that were made at once the older one counts."""
        wanted = f"tags.`draft_model.run` = '{self.settings.group}'"
        if not (found := self._oldest_first(experiment, wanted)):
            tags = {"draft_model.run": self.settings.group}
            made = self._client.create_run(experiment, run_name="draft-model", tags=tags).info.run_id
            found = self._oldest_first(experiment, wanted)
            if found[0].info.run_id != made:
                self._client.delete_run(made)
        return str(found[0].info.run_id)

    def _oldest_first(self, experiment: str, wanted: str) -> list[Any]:
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        return list(self._client.search_runs([experiment], wanted, order_by=order))

    def _batch(self, records: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            if record["kind"] == "metrics"
            for name, value in record["values"].items()
        ]
        parameters = [Param(name, value[:_LONGEST_VALUE]) for name, value in _values(records, "parameters")]
        tags = [RunTag(name, value[:_LONGEST_VALUE]) for name, value in _values(records, "tags")]
        # MLflow takes 1000 metrics, 100 parameters and 100 tags at once.
        for start in range(0, max(len(metrics), 10 * len(parameters), 10 * len(tags)), 1000):
            few = slice(start // 10, start // 10 + 100)
            self._client.log_batch(self._run, metrics[start : start + 1000], parameters[few], tags[few])

    def _inputs(self, values: Mapping[str, Sequence[str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        made = [
            DatasetInput(
                Dataset(name, digest[:36], "draft-model", json.dumps({"uri": uri})),
                [InputTag("mlflow.data.context", name)],
            )
            for name, (uri, digest) in values.items()
        ]
        self._client.log_inputs(self._run, made)

    def _register(self, name: str, uri: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        there = self._client.search_model_versions(f"name = '{name}'")
        if not any(version.run_id == self._run and version.source == uri for version in there):
            self._client.create_model_version(name, source=uri, run_id=self._run)

    def _end(self, status: str) -> None:
        if not self.settings.run_id:
            self._client.set_terminated(self._run, status)
        if self._parent:
            self._end_parent()

    def _end_parent(self) -> None:
        """The parent has failed where the newest run of some stage has; it goes on while one runs beside this."""
        experiment = self._client.get_run(self._parent).info.experiment_id
        children = self._oldest_first(experiment, f"tags.`{_PARENT}` = '{self._parent}'")
        newest = {child.info.run_name: child.info.status for child in children}
        if "FAILED" in newest.values():
            self._client.set_terminated(self._parent, "FAILED")
        elif "RUNNING" not in newest.values():
            self._client.set_terminated(self._parent, "FINISHED")


def _values(records: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[str, str]]:
    """Names and values of all records of a kind, the last of each name."""
    found: dict[str, str] = {}
    for record in records:
        if record["kind"] == kind:
            found.update(record["values"])
    return list(found.items())
