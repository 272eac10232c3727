"""Measures how many tokens the draft saves, proves that it changes none, and adds report and model card to it.

Args:
    parameters: of the evaluation, by name.
    run_id: of the pipeline's run, which names its job.
    model_uri: URI of the imported target.
    dataset_uri: URI of the data set.
    draft_uri: URI of the trained draft.
    report: the report, one HTML page.
    card: the model card, with commands to serve the draft.
    metrics: acceptance length, trained and untrained, and tokens that were compared.
"""

from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Markdown, Metrics, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def evaluate_draft_model(  # noqa: D103
    parameters: dict[str, Any], run_id: str, model_uri: str, dataset_uri: str, draft_uri: str,
    report: Output[HTML], card: Output[Markdown], metrics: Output[Metrics],
) -> None:  # fmt: skip
    from draft_model import steps

    steps.evaluate_draft_model(parameters, run_id, model_uri, dataset_uri, draft_uri, report, card, metrics)
