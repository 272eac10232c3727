"""Ends a run, however it went: deletes the jobs that its steps left on the cluster, and says how to go on.

Args:
    run_id: of the pipeline's run, which is a label of its jobs.
    training_backend: of the run.
    storage_uri: of the run.
    checkpoint_path: of the run.
    status: of all steps together; KFP fills it in.
    summary: how the run ended, what was deleted, and where the newest checkpoint is.
"""

from kfp import dsl
from kfp.dsl import Markdown, Output, PipelineTaskFinalStatus

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def clean_up(  # noqa: D103
    run_id: str, training_backend: str, storage_uri: str, checkpoint_path: str,
    status: PipelineTaskFinalStatus, summary: Output[Markdown],
) -> None:  # fmt: skip
    from draft_model import steps

    steps.clean_up(run_id, training_backend, storage_uri, checkpoint_path, status, summary)
