"""The end of a run, however it ended: what became of its jobs, and how to go on."""

from __future__ import annotations

import logging
import re

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.jobs.backends import jobs_of_run
from draft_model.jobs.cluster import Cluster, patiently
from draft_model.jobs.context import connect, on_cluster, own_pod, owner_of, run_ended, wants_cluster
from draft_model.jobs.spec import RUNTIME
from draft_model.parameters import Parameters
from draft_model.training.config import list_checkpoints

logger = logging.getLogger(__name__)

AWAY_SECONDS = 120.0  # that the API server may be away
_SUCCEEDED = ("COMPLETE", "SUCCEEDED", "CACHED")  # of MLMD, of kfp.local
_TERMINATED = "the run was terminated"
_STATES = {"FAILED": "a step failed: the last lines of its log say why", "CANCELED": _TERMINATED,
           "CANCELLED": _TERMINATED}  # fmt: skip
_LOST = "a step was lost: its pod was killed or evicted, or could not start"
"""MLMD says RUNNING, or nothing, of a step that could not report its end."""
_CHECKPOINTS = re.compile(r"(|.*/)(?:checkpoints\.json|(?:epoch|step)_\d+/manifest\.json)")


def clean_up(
    run_id: str, training_backend: str, *, state: str = "", message: str = "", checkpoint_path: str = "", root: str = ""
) -> list[str]:
    """Ends what a run left on the cluster, and says what a person should know after it, a sentence each.

    `state` is how the steps ended, in MLMD's words (COMPLETE, FAILED, RUNNING, empty) or kfp.local's; `root` the URI
    that the run's own outputs are below. `training_backend` may be what preflight refused.
    """
    succeeded, ended, lines = state.upper() in _SUCCEEDED, None, list[str]()
    has_jobs = wants_cluster(Parameters.model_construct(training_backend=training_backend))

    def look() -> tuple[bool | None, list[str]]:
        cluster = connect()
        ended = run_ended(cluster, owner) if (owner := owner_of(own_pod(cluster))) else None
        return ended, _end_jobs(cluster, run_id, keep=ended is False and not succeeded) if has_jobs else []

    if has_jobs or (on_cluster() and not succeeded):
        try:
            ended, lines = patiently(look, AWAY_SECONDS)
        except DraftModelError as error:
            if has_jobs:
                lines = [
                    f"whether a job is left is not known ({error}): look with `kubectl get pytorchjobs,trainjobs "
                    f"-l draft-model/run-id={run_id}`; it ends at its deadline at the latest"
                ]
    if succeeded:
        return ["all steps succeeded", *lines]
    what = _TERMINATED if ended else _STATES.get(state.upper(), _LOST)
    return [f"{what}{f' ({message})' if message else ''}", *lines, *_how_to_go_on(checkpoint_path, root)]


def _end_jobs(cluster: Cluster, run_id: str, *, keep: bool) -> list[str]:
    """Deletes the run's jobs, but none while one still runs that is to be kept."""
    found, running = jobs_of_run(cluster, run_id), []
    for kind, job in found:
        conditions = job.get("status", {}).get("conditions") or ()
        over = any(c["type"] in ("Succeeded", "Complete", "Failed") and c["status"] == "True" for c in conditions)
        if kind != RUNTIME and not over:
            running.append(f"{job['kind']} {job['metadata']['name']}")
    if running and keep:
        return [
            f"{', '.join(running)} runs on: the step that followed it was lost, and nobody terminated the run. Retry "
            "in the UI follows it again; its output is whole once it has ended, and it goes with the run's Workflow"
        ]
    lines = []
    for kind, job in found:
        cluster.delete(kind, job["metadata"]["name"])
        lines.append(f"a step left {kind.plural}/{job['metadata']['name']}: deleted")
        logger.warning("%s", lines[-1])
    return lines or ["no job was left"]


def _how_to_go_on(checkpoint_path: str, root: str) -> list[str]:
    """Where the newest whole checkpoint is, and what goes on from it."""
    try:
        uris = [checkpoint_path] if checkpoint_path else []
        if not uris and root:
            found = filter(None, map(_CHECKPOINTS.fullmatch, storage.list_files(root)))
            folders = dict.fromkeys(each[1] for each in found)
            uris = [storage.join(root, *filter(None, folder.split("/"))) for folder in folders]
        for newest in (storage.join(uri, name) for uri in uris for name in reversed(list_checkpoints(uri))):
            if storage.exists(storage.join(newest, storage.MANIFEST)):
                return [
                    f"the newest checkpoint: {newest}",
                    "Retry in the UI goes on from it; so does a run with "
                    f"resume_from_checkpoint={newest} and resume=true",
                ]
    except DraftModelError as error:
        return [f"the object store does not say whether there is a checkpoint ({error})"]
    return ["there is no whole checkpoint; Retry in the UI starts the step that failed again"]
