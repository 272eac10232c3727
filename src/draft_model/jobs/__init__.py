"""The training step as a job: rendered, started, followed and ended from the coordinating process.

`run` is the one door. On a cluster a PyTorchJob or a TrainJob trains and this process coordinates; elsewhere torchrun
trains on this machine.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from draft_model.training.config import TrainConfig, TrainResult

__all__ = ["clean_up", "run"]

logger = logging.getLogger(__name__)


def run(config: TrainConfig, run_id: str = "") -> TrainResult:
    """Trains a draft as a job and waits for its end.

    Args:
        config: of the job.
        run_id: of the pipeline's run; jobs are named and found again by it.

    Raises:
        DraftModelError: why there is no trained draft.
    """
    from draft_model.jobs.place import choose, connect, request_for, wants_cluster
    from draft_model.training.lease import hold, own_run_id

    place = config.parameters.checkpoint_path
    if not wants_cluster(config.parameters):
        from draft_model.jobs import local

        config = replace(config, run_id=run_id or own_run_id())
        with hold(place, config.run_id, outermost=True):
            return local.run(config)
    from draft_model.doors import raise_on_sigterm
    from draft_model.jobs.coordinate import Coordinator

    logger.info("the training job runs on the cluster; this process coordinates it")
    raise_on_sigterm()
    cluster = connect()
    backend = choose(cluster, config.parameters.training_backend)
    request = request_for(cluster, config, run_id)
    retried = os.environ.get("KFP_RETRY_INDEX", "0") not in ("", "0")
    with hold(place, request.run_id, outermost=True):
        return Coordinator(backend, request, config.work, retried).run()


def clean_up(run_id: str, training_backend: str) -> list[str]:
    """Deletes what a run's training step may have left: nothing, unless that step was killed.

    Args:
        run_id: of the pipeline's run.
        training_backend: the run's parameter.

    Returns:
        What was deleted.
    """
    from draft_model.jobs.kubernetes import delete_run
    from draft_model.jobs.place import ALL_KINDS, connect, wants_cluster
    from draft_model.parameters import Parameters

    if not wants_cluster(Parameters(training_backend=training_backend)):  # type: ignore[arg-type]
        return []
    deleted = delete_run(connect(), ALL_KINDS, run_id)
    for name in deleted:
        logger.warning("the training step left %s: deleted", name)
    return deleted
