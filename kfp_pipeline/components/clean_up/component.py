"""After the training, however it ended: what it left on the cluster is deleted."""

from kfp import dsl

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def clean_up(run_id: str, training_backend: str = "auto") -> None:
    """Deletes the run's training job, where the training step was killed before it could.

    Args:
        run_id: of the pipeline's run, which is a label of its jobs.
        training_backend: who trained.
    """
    from draft_model import jobs
    from draft_model.doors import component

    with component("clean-up"):
        jobs.clean_up(run_id, training_backend)
