"""The end of a run, however it ended: what became of its jobs, and how to go on."""

from __future__ import annotations

import logging
import re
import time

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.jobs.backends import jobs_of_run
from draft_model.jobs.cluster import Cluster, Unavailable
from draft_model.jobs.context import connect, own_pod, owner_of, run_ended, wants_cluster
from draft_model.jobs.spec import RUNTIME
from draft_model.parameters import Parameters
from draft_model.training.config import list_checkpoints

logger = logging.getLogger(__name__)

AWAY_SECONDS = 120.0  # that the API server may be away
_SUCCEEDED = ("COMPLETE", "SUCCEEDED", "CACHED")  # of MLMD, of kfp.local
_STATES = {
    "FAILED": "a step failed: the last lines of its log say why",
    "CANCELED": "the run was terminated",
    "CANCELLED": "the run was terminated",
}
_CHECKPOINTS = re.compile(r"(|.*/)(?:checkpoints\.json|(?:epoch|step)_\d+/manifest\.json)")
_LOST = "a step was lost: its pod was killed or evicted, or could not start"
"""MLMD says RUNNING, or nothing, of a step that could not report its end."""


def run(run_id: str, training_backend: str, state: str, message: str, checkpoint_path: str, root: str) -> list[str]:
    """See `draft_model.jobs.clean_up`."""
    state, ended = state.upper(), None
    lines: list[str] = []
    if wants_cluster(Parameters.model_construct(training_backend=training_backend)):  # it may be what preflight refused
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                ended, lines = _end_jobs(connect(), run_id, succeeded=state in _SUCCEEDED)
                break
            except (Unavailable, DraftModelError) as error:
                if isinstance(error, DraftModelError) or time.monotonic() > deadline:
                    lines = [
                        f"whether a job is left is not known ({error}): look with `kubectl get pytorchjobs,trainjobs "
                        f"-l draft-model/run-id={run_id}`; it ends at its deadline at the latest"
                    ]
                    break
                time.sleep(2.0)
    if state in _SUCCEEDED:
        return ["all steps succeeded", *lines]
    what = "the run was terminated" if ended else _STATES.get(state, _LOST)
    return [f"{what}{f' ({message})' if message else ''}", *lines, *_how_to_go_on(checkpoint_path, root)]


def _end_jobs(cluster: Cluster, run_id: str, *, succeeded: bool) -> tuple[bool | None, list[str]]:
    """Deletes what is left, but a running job only where a person ended the run, or nobody can tell."""
    owner = owner_of(own_pod(cluster))
    ended = run_ended(cluster, owner) if owner else None
    found, running = jobs_of_run(cluster, run_id), []
    for kind, job in found:
        conditions = job.get("status", {}).get("conditions") or ()
        over = any(c["type"] in ("Succeeded", "Complete", "Failed") and c["status"] == "True" for c in conditions)
        if kind != RUNTIME and not over:
            running.append(f"{job['kind']} {job['metadata']['name']}")
    if running and ended is False and not succeeded:
        return ended, [
            f"{', '.join(running)} runs on: the step that followed it was lost, and nobody terminated the run. Retry "
            "in the UI follows it again; its output is whole once it has ended, and it goes with the run's Workflow"
        ]
    lines = []
    for kind, job in found:
        cluster.delete(kind, job["metadata"]["name"])
        lines.append(f"a step left {kind.plural}/{job['metadata']['name']}: deleted")
        logger.warning("%s", lines[-1])
    return ended, lines or ["no job was left"]


def _how_to_go_on(checkpoint_path: str, root: str) -> list[str]:
    """Where the newest whole checkpoint is, and what goes on from it."""
    try:
        uris = [checkpoint_path] if checkpoint_path else []
        if not uris and root:
            folders = dict.fromkeys(
                found[1] for found in map(_CHECKPOINTS.fullmatch, storage.list_files(root)) if found
            )
            uris = [storage.join(root, *filter(None, folder.split("/"))) for folder in folders]
        for uri in uris:
            for name in reversed(list_checkpoints(uri)):
                newest = storage.join(uri, name)
                if storage.exists(storage.join(newest, storage.MANIFEST)):
                    new = f"resume_from_checkpoint={newest} and resume=true"
                    return [
                        f"the newest checkpoint: {newest}",
                        f"Retry in the UI goes on from it; so does a run with {new}",
                    ]
    except DraftModelError as error:
        return [f"the object store does not say whether there is a checkpoint ({error})"]
    return ["there is no whole checkpoint; Retry in the UI starts the step that failed again"]
