"""At the end of a run, however it ended: what its training left on the cluster, and how to go on."""

from kfp import dsl
from kfp.dsl import Markdown, Output, PipelineTaskFinalStatus

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def clean_up(
    run_id: str,
    summary: Output[Markdown],
    status: PipelineTaskFinalStatus,
    training_backend: str = "auto",
    checkpoint_path: str = "",
    storage_uri: str = "",
) -> None:
    """Deletes the run's training job, where it is left and nobody follows it, and says how to go on.

    Args:
        run_id: of the pipeline's run, which is a label of its jobs.
        summary: how the run ended, what was deleted, and where the newest checkpoint lies.
        status: of all steps together; KFP fills it in.
        training_backend: who trained.
        checkpoint_path: folder of checkpoints that several runs share.
        storage_uri: folder of the run; not given: the pipeline root.
    """
    from pathlib import Path

    from draft_model import jobs
    from draft_model.doors import component
    from draft_model.shown import bullets

    with component("clean-up"):
        root, found, _ = summary.uri.partition(f"/{run_id}/")
        lines = jobs.clean_up(
            run_id,
            training_backend,
            state=status.state,
            message=status.error_message or "",
            checkpoint_path=checkpoint_path,
            root=f"{storage_uri}/output_model_path" if storage_uri else f"{root}/{run_id}" if found else "",
        )
        Path(summary.path).write_text(bullets(lines), encoding="utf-8")
