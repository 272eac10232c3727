"""Coordinating a job on a cluster: attempts, the proof of success, and leaving nothing behind.

This process computes nothing and needs little memory. A job whose end is known is deleted here. One whose coordinator
is lost runs on: the step that KFP starts again adopts it; where none is, the exit task decides (`clean_up`), the owner
reference ends it with the Workflow, and Kubernetes at its deadline.

<output>/<stage>_job.json       attempts, their ends and reasons
<output>/logs/<job>/<pod>.log   the whole logs
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.jobs.backends import Backend, choose
from draft_model.jobs.cluster import Cluster, Forbidden, Unavailable, patiently
from draft_model.jobs.context import run_ended
from draft_model.jobs.follow import Follower, LogStreams
from draft_model.jobs.spec import GRACE_SECONDS, SPEC_HASH, Job, pytorchjob
from draft_model.jobs.states import Failure, State

logger = logging.getLogger(__name__)

_DELETE_SECONDS = 120.0  # that an API server may be away while a job is to be deleted
_GONE_SECONDS = GRACE_SECONDS + 30.0


@dataclass
class Record:
    """What is kept of a run's job beside its output, so that nothing is computed twice."""

    run_id: str
    spec_sha256: str  # of the first attempt, so that other settings are not taken for the same job
    state: State = State.QUEUED  # before the first attempt has ended; RESTARTING where another one follows; the end
    attempts: list[dict[str, Any]] = field(default_factory=list)  # name, state, reason, problems of those that ended


class Coordinator:
    """Brings one run's job to its end; `retried` where KFP starts its step again after it failed."""

    def __init__(self, cluster: Cluster, job: Job, work: Path, *, retried: bool = False) -> None:
        self._cluster, self._job, self._work, self._retried = cluster, job, work, retried
        self._file = storage.join(job.output, f"{job.stage}_job.json")
        self._wanted: str = job.parameters.training_backend
        self._backend = choose(cluster, self._wanted, job.run_id)

    def run(self) -> None:
        """Runs attempts until one succeeds or another makes no sense."""
        # Of the PyTorchJob whatever the back end: `auto` may choose another one in a later attempt.
        digest = pytorchjob(self._job)[0]["metadata"]["annotations"][SPEC_HASH]
        record = patiently(lambda: self._load(digest))
        if record and record.state is State.SUCCEEDED:
            logger.info("the %s job of this run has succeeded already: %s", self._job.stage, self._job.output)
        if record is None or (record.state is State.FAILED and not self._retried):
            again = record is not None
            patiently(lambda: self._job.prepare(again=again))
            record = Record(self._job.run_id, digest)
            self._save(record)
        while record.state not in (State.SUCCEEDED, State.FAILED):
            self._attempt(replace(self._job, attempt=len(record.attempts)), record)
        if record.state is State.FAILED:
            raise DraftModelError(record.attempts[-1]["problems"])

    def _load(self, digest: str) -> Record | None:
        """The record of this run under these settings; a damaged one is no reason not to begin."""
        try:
            values = json.loads(storage.read_bytes(self._file))
            record = Record(**{**values, "state": State(values["state"])})
        except StoreUnavailable:
            raise
        except (DraftModelError, ValueError, TypeError, KeyError):
            return None
        return record if (record.run_id, record.spec_sha256) == (self._job.run_id, digest) else None

    def _save(self, record: Record) -> None:
        data = json.dumps(asdict(record), indent=1).encode()
        patiently(lambda: storage.write_bytes(self._file, data))

    def _attempt(self, job: Job, record: Record) -> None:
        """One attempt and its end, which it records. A job whose end is not known is not deleted."""
        backend, created, ended = self._backend, None, False
        logs = LogStreams(backend, self._work / "logs" / job.name)
        try:
            created = patiently(lambda: backend.create_or_adopt(job))
            begun = "took over the" if created.adopted else "created the"
            pods = f"{job.nodes} pod(s) x {job.processes} process(es)"
            logger.info("%s: %s %s, %s", job.name, begun, backend.kind.kind, pods)
            failure = Follower(backend, created, logs).follow()
            ended = True
            if failure is None and (lacks := patiently(job.check)):
                problems = [f"{job.name} ended with success, but without its output: {each}" for each in lacks]
                failure = Failure("NoOutput", False, problems)
            self._note(record, job, failure)
        except BaseException as error:
            # Terminated by a person, or lost: evicted, drained, or refused by an API server that has lost its Roles.
            ended = ended or isinstance(error, KeyboardInterrupt) or bool(run_ended(self._cluster, job.owner))
            raise
        finally:
            if created and ended:
                _delete(backend, job)  # first, since a terminated run leaves this process about a second
            elif created:
                logger.warning("%s runs on without this step, which adopts it when it is started again", job.name)
            logs.finish(0)
            if logs.folder.is_dir():
                uri = storage.join(job.output, "logs", job.name)
                try:
                    storage.publish(logs.folder, uri, stage="logs", properties={"job": job.name})
                    logger.info("the whole logs: %s", uri)
                except DraftModelError as error:
                    logger.warning("the logs could not be kept: %s", error)

    def _note(self, record: Record, job: Job, failure: Failure | None) -> None:
        """Records how an attempt ended before its job is deleted, so that it is not repeated."""
        if failure and failure.reason == "NoOperator":
            with suppress(DraftModelError):  # `auto` takes the other one, where the cluster has it
                self._backend = patiently(lambda: choose(self._cluster, self._wanted, without=self._backend.name))
                self._wanted = self._backend.name
                logger.warning("%s", failure.problems[0])
                return
        number, limit = len(record.attempts) + 1, job.parameters.training_attempts
        reason, problems, record.state = "", list[str](), State.SUCCEEDED
        if failure:
            reason, problems, record.state = failure.reason, failure.problems, State.FAILED
        if failure and failure.retryable and number < limit:
            record.state = State.RESTARTING
            begins = ", from the newest checkpoint" if job.stage == "train" else ""
            logger.warning(
                "%s failed (%s): attempt %d of %d follows%s: %s", job.name, reason, number + 1, limit, begins,
                problems[0].removesuffix("; its last lines:"),
            )  # fmt: skip
        elif failure and failure.retryable:
            tried = f"training_attempts: this was attempt {number} of as many: raise it, or look why the machines fail"
            problems = [*problems, tried]
        record.attempts.append({"name": job.name, "state": record.state, "reason": reason, "problems": problems})
        self._save(record)


def _delete(backend: Backend, job: Job) -> None:
    """Deletes the job and waits until its pods are gone: their GPUs are free, and nothing writes any more."""
    try:
        patiently(lambda: backend.delete(job), _DELETE_SECONDS, _DELETE_SECONDS)
    except DraftModelError as error:
        logger.warning("%s could not be deleted (%s): its deadline will end it", job.name, error)
        return
    started, told = time.monotonic(), False
    while (waited := time.monotonic() - started) < _GONE_SECONDS:
        with suppress(Unavailable, Forbidden):
            if not (pods := [pod["metadata"]["name"] for pod in backend.pods_of_run(job)]):
                return
            if waited > 5 and not told:
                logger.info("%s is deleted; waiting for its pods, which still hold their GPUs: %s; they have %d s to "
                            "save what they can", job.name, ", ".join(pods), GRACE_SECONDS)  # fmt: skip
                told = True
        time.sleep(0.5)
    logger.warning("%s is deleted, but its pods still exist", job.name)
