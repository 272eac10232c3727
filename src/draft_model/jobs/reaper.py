"""Deletes the training jobs that nothing else has deleted: the last of the layers of cleaning up (docs/kubernetes.md).

The CronJob of manifests/components/reaper runs it. It deletes what was made by this pipeline, by the run-id label, and
- belongs to a Workflow that has ended or is gone, or to a pod that is gone: their coordinator cannot come back;
- has run for longer than its own deadline, which its operator should have seen to;
- is a TrainingRuntime without its TrainJob.
A job that belongs to nothing, as one started by hand, has its deadline only. One that waits in a queue holds nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Container
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from draft_model.doors import exit_code
from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Unavailable
from draft_model.jobs.place import ALL_KINDS, connect
from draft_model.jobs.request import RUN_ID, Kind, Manifest
from draft_model.jobs.trainjob import RUNTIME, TRAINJOB

if TYPE_CHECKING:
    from draft_model.jobs.cluster import Cluster

logger = logging.getLogger(__name__)

_WORKFLOW = Kind("argoproj.io", "v1alpha1", "workflows", "Workflow")
_ENDED = ("Succeeded", "Failed", "Error")
_LEEWAY = timedelta(minutes=10)
"""What operators and coordinators get to do it themselves."""


def reap(cluster: Cluster, now: datetime) -> list[str]:
    """Deletes what is left over in a namespace.

    Args:
        cluster: with the namespace.
        now: the time, with its zone.

    Returns:
        What was deleted, as `kind/name`.

    Raises:
        DraftModelError: with all that could not be looked at or deleted; the rest is done.
        Unavailable: when the API server does not answer.
    """
    deleted, problems = [], []
    there = {kind: cluster.objects(kind, RUN_ID) for kind in ALL_KINDS if cluster.has(kind)}
    trained = {job["metadata"]["name"] for job in there.get(TRAINJOB, ())}
    for kind, found in there.items():
        for job in found:
            name = job["metadata"]["name"]
            try:
                why = _left_over(cluster, job, now) or (_without_job(job, trained, now) if kind == RUNTIME else "")
                if why:
                    cluster.delete(kind, name)
                    deleted.append(f"{kind.plural}/{name}")
                    logger.warning("%s/%s deleted: %s", kind.plural, name, why)
            except DraftModelError as error:
                problems += error.problems
    if problems:
        raise DraftModelError(problems)
    return deleted


def _left_over(cluster: Cluster, job: Manifest, now: datetime) -> str:
    """Why nobody will end a job any more; empty where somebody may."""
    for owner in job["metadata"].get("ownerReferences", ()):
        if owner["kind"] not in ("Workflow", "Pod"):
            continue
        found = cluster.pod(owner["name"]) if owner["kind"] == "Pod" else cluster.get(_WORKFLOW, owner["name"])
        if found is None or found["metadata"]["uid"] != owner["uid"]:
            return f"its {owner['kind']} {owner['name']} is gone"
        # A pod that has ended may be followed by another one, which takes the job over; a Workflow is the whole run.
        phase = found.get("status", {}).get("phase")
        if owner["kind"] == "Workflow" and phase in _ENDED:
            return f"its run has ended ({owner['name']}: {phase})"
    limit = job["spec"].get("runPolicy", job["spec"]).get("activeDeadlineSeconds")
    started = _started(job)
    if limit is None or started is None or started + timedelta(seconds=limit) + _LEEWAY > now:
        return ""
    return f"it began at {started.isoformat()}, and its deadline of {limit} s is over"


def _without_job(runtime: Manifest, trained: Container[str], now: datetime) -> str:
    if runtime["metadata"]["name"] in trained or _time(runtime["metadata"]["creationTimestamp"]) + _LEEWAY > now:
        return ""  # a runtime is made just before its job
    return "its TrainJob is gone"


def _started(job: Manifest) -> datetime | None:
    """When a job was let go the last time; None where it waits."""
    status = job.get("status", {})
    if job["spec"].get("runPolicy", job["spec"]).get("suspend"):
        return None
    if text := status.get("startTime"):  # a PyTorchJob has it, a TrainJob tells when it was resumed
        return _time(text)
    for condition in status.get("conditions") or ():
        if condition["type"] == "Suspended" and condition["status"] == "False":
            return _time(condition["lastTransitionTime"])
    return _time(job["metadata"]["creationTimestamp"])


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def main() -> None:
    """Looks once, as the account that this process has."""
    try:
        reap(connect(), datetime.now(UTC))
    except Unavailable as error:
        raise DraftModelError(f"the API server does not answer ({error}): the reaper's next turn looks again") from None


if __name__ == "__main__":
    sys.exit(exit_code(main))
