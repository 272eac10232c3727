"""Imports the target model from the Hub, from a Transformers folder or from MLflow, as one canonical folder.

A folder of the same content that an earlier run has imported is used again.

Args:
    parameters: of the import, by name.
    run_id: of the pipeline's run.
    model: the imported folder, for lineage; its `uri` in the metadata says where the files are.
    summary: what was imported, and what was done to it.
    metrics: number of weights, and bytes.

Returns:
    Output: URI of the imported folder.
"""

from typing import Any

from kfp import dsl
from kfp.dsl import Markdown, Metrics, Model, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def import_model(  # noqa: D103
    parameters: dict[str, Any], run_id: str, model: Output[Model], summary: Output[Markdown], metrics: Output[Metrics],
) -> str:  # fmt: skip
    from draft_model import steps

    return steps.import_model(parameters, run_id, model, summary, metrics)
