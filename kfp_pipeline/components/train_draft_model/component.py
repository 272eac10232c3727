"""Trains the draft model: coordinates the job whose processes read and write object storage themselves.

Args:
    parameters: of the training, by name.
    run_id: of the pipeline's run, which names its training job.
    model_uri: URI of the imported target.
    dataset_uri: URI of the data set.
    output_model_path: the trained checkpoints: `final/`, ready to serve, and one per save_interval.
    metrics: final loss, simulated acceptance length, steps.

Returns:
    Output: URI of the checkpoint that is ready to serve.
"""

from typing import Any

from kfp import dsl
from kfp.dsl import Metrics, Model, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def train_draft_model(  # noqa: D103
    parameters: dict[str, Any], run_id: str, model_uri: str, dataset_uri: str,
    output_model_path: Output[Model], metrics: Output[Metrics],
) -> str:  # fmt: skip
    from draft_model import steps

    return steps.train_draft_model(parameters, run_id, model_uri, dataset_uri, output_model_path, metrics)
