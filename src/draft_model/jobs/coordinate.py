"""Coordinating a training job on a cluster: attempts, the proof of success, and leaving nothing behind.

This process trains nothing and needs little memory. Whatever ends it, the job does not outlive the run: `finally`
and SIGTERM delete it here, the pipeline's exit task deletes by the run's id, the owner reference goes with the
Workflow, and the job has a deadline of its own. One that was killed and started again takes its job over.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Forbidden, Job, Unavailable
from draft_model.jobs.failures import Failure
from draft_model.jobs.follow import Follower, Outcome
from draft_model.jobs.kubernetes import KubernetesBackend
from draft_model.jobs.logs import LogStreams
from draft_model.jobs.record import Record, load
from draft_model.jobs.request import SPEC_HASH, JobRequest
from draft_model.jobs.states import State
from draft_model.training.config import TrainConfig, TrainResult

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 2.0
_DELETE_SECONDS = 120.0  # that an API server may be away while a job is to be deleted
_GONE_SECONDS = 330.0  # a pod's grace period, and some


@dataclass
class Coordinator:
    """Brings one run's training job to its end.

    Attributes:
        backend: runs the job.
        request: the first attempt; its configuration's work folder is one in the pods.
        work: scratch folder of this process.
        retried: whether KFP starts this step again after it failed, rather than the first time.
        sleep: waits so many seconds.
    """

    backend: KubernetesBackend
    request: JobRequest
    work: Path
    retried: bool = False
    sleep: Callable[[float], None] = time.sleep

    def run(self) -> TrainResult:
        """Runs attempts until one succeeds or another makes no sense.

        Raises:
            DraftModelError: why there is no trained draft.
        """
        config = self.request.config
        digest = self.backend.render(self.request)[-1]["metadata"]["annotations"][SPEC_HASH]
        record = load(config.output, self.request.run_id, digest)
        if record and record.state is State.SUCCEEDED:
            logger.info("this run has trained already: %s", config.output)
            return result_of(config)
        if record and record.state is State.FAILED and self.retried:
            raise DraftModelError(record.problems)
        if record is None or record.state is State.FAILED:
            record = Record(self.request.run_id, digest)
            self._begin()
            record.save(config.output)
        return self._attempts(record)

    def _begin(self) -> None:
        """What an earlier run left under this output is not taken for this one's."""
        config = self.request.config
        storage.remove_manifest(storage.join(config.output, "final"))
        index = storage.join(config.checkpoints, "checkpoints.json")
        if config.parameters.resume == "false" and storage.exists(index):
            for name in json.loads(storage.read_bytes(index)):
                storage.remove_manifest(storage.join(config.checkpoints, name))
            storage.write_bytes(index, b"[]")

    def _attempts(self, record: Record) -> TrainResult:
        parameters = self.request.config.parameters
        while True:
            request = replace(self.request, attempt=len(record.attempts))
            failure = self._attempt(request, record)
            if failure is None:
                return result_of(self.request.config)
            if record.state is State.FAILED:
                raise DraftModelError(self._told(failure, record))
            logger.warning(
                "%s failed (%s): attempt %d of %d follows, from the newest checkpoint: %s",
                request.name, failure.reason, len(record.attempts) + 1, parameters.training_attempts,
                failure.problems[0].removesuffix("; its last lines:"),
            )  # fmt: skip

    def _note(self, record: Record, request: JobRequest, failure: Failure | None) -> None:
        """Writes down how an attempt ended, before its job is deleted: nobody shall repeat it."""
        if failure is None:
            record.add(request.name, State.SUCCEEDED, "", [])
        else:
            again = failure.retryable and len(record.attempts) + 1 < self.request.config.parameters.training_attempts
            state = State.RESTARTING if again else State.FAILED
            record.add(request.name, state, failure.reason, failure.problems)
        record.save(self.request.config.output)

    def _told(self, failure: Failure, record: Record) -> list[str]:
        problems = list(failure.problems)
        if failure.retryable:
            problems.append(
                f"training_attempts: this was attempt {len(record.attempts)} of as many: raise it, or look why "
                "the machines fail"
            )
        return problems

    def _attempt(self, request: JobRequest, record: Record) -> Failure | None:
        """One attempt, and its end: deleted whatever happens, its logs kept. Gives why it failed."""
        logs = None
        try:
            job = self._create(request)
            logs = LogStreams(self.backend, job, self.work / "logs" / request.name)
            outcome = Follower(self.backend, job, logs).follow()
            if outcome.state is State.SUCCEEDED:
                outcome = self._proven(job)
            self._note(record, request, outcome.failure)
            return outcome.failure
        finally:
            # First, since a terminated run leaves this process about a second.
            self._delete(request)
            if logs is not None:
                logs.finish(0)
                self._keep(logs.folder, request)

    def _create(self, request: JobRequest) -> Job:
        while True:
            try:
                job = self.backend.create_or_adopt(request)
                break
            except Unavailable as error:
                logger.warning("the API server does not answer (%s): asking again", error)
                self.sleep(_AGAIN_SECONDS)
        logger.info(
            "%s: %s %s, %d pod(s) x %d process(es)",
            job.name, "took over the" if job.adopted else "created the", self.backend.kind.kind, request.nodes,
            request.processes,
        )  # fmt: skip
        return job

    def _proven(self, job: Job) -> Outcome:
        """Success is the output, not an exit code: its manifest is there and each file it lists."""
        final = storage.join(self.request.config.output, "final")
        try:
            whole = storage.is_whole(final, storage.read_manifest(final, stage="train"))
            problems = [] if whole else [f"{final}: files that its manifest lists are missing"]
        except DraftModelError as error:
            problems = error.problems
        if not problems:
            return Outcome(State.SUCCEEDED)
        told = [f"{job.name} ended with success, but without its output: {problem}" for problem in problems]
        return Outcome(State.FAILED, Failure("NoOutput", False, told))

    def _delete(self, request: JobRequest) -> None:
        """Deletes the job and waits until its pods are gone: their GPUs are free, and nobody writes any more."""
        deadline = time.monotonic() + _DELETE_SECONDS
        while True:
            try:
                self.backend.delete(request)
                break
            except (Unavailable, Forbidden) as error:
                if time.monotonic() > deadline:
                    logger.warning("%s could not be deleted (%s): its deadline will end it", request.name, error)
                    return
                self.sleep(_AGAIN_SECONDS)
        deadline = time.monotonic() + _GONE_SECONDS
        while time.monotonic() < deadline:
            with suppress(Unavailable, Forbidden):
                if not self.backend.pods(Job(request, "")):
                    return
            self.sleep(0.5)
        logger.warning("%s is deleted, but its pods are still there", request.name)

    def _keep(self, folder: Path, request: JobRequest) -> None:
        """Puts the whole logs beside the output; that they cannot be is no reason to fail."""
        if not folder.is_dir():
            return
        uri = storage.join(self.request.config.output, "logs", request.name)
        try:
            storage.publish(folder, uri, stage="logs", properties={"job": request.name})
            logger.info("the whole logs: %s", uri)
        except DraftModelError as error:
            logger.warning("the logs could not be kept: %s", error)


def result_of(config: TrainConfig) -> TrainResult:
    """What a finished training says of itself in its output."""
    final = storage.join(config.output, "final")
    record = json.loads(storage.read_bytes(storage.join(final, "training.json")))
    log, validation = record["log"], record["validation"]
    measured = validation or log
    return TrainResult(
        output=config.output,
        final=final,
        steps=record["steps"],
        loss=log[-1]["loss"][0] if log else 0.0,
        acceptance_length=float(measured[-1]["acceptance_length"]) if measured else 1.0,
    )
