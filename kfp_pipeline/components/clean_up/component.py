"""At the end of a run, however it ended: what its training left on the cluster is deleted."""

from kfp import dsl
from kfp.dsl import Markdown, Output, PipelineTaskFinalStatus

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def clean_up(
    run_id: str, summary: Output[Markdown], status: PipelineTaskFinalStatus, training_backend: str = "auto"
) -> None:
    """Deletes the run's training job, where the training step was killed before it could.

    Args:
        run_id: of the pipeline's run, which is a label of its jobs.
        summary: how the run ended, and what was deleted.
        status: of all steps together; KFP fills it in.
        training_backend: who trained.
    """
    from pathlib import Path

    from draft_model import jobs
    from draft_model.doors import component
    from draft_model.shown import bullets

    with component("clean-up"):
        deleted = jobs.clean_up(run_id, training_backend)
        lines = [f"the steps ended: {status.state}", *filter(None, [status.error_message])]
        lines += [f"the training step left {name}: deleted" for name in deleted] or ["no training job was left"]
        Path(summary.path).write_text(bullets(lines), encoding="utf-8")
