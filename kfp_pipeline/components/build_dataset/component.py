"""Turns conversations into tokens, loss masks and the draft vocabulary, for the target's tokenizer.

Where regenerate_answers is not off, the target answers the users' turns first. Answers and data set of the same content
that an earlier run has made are used again.

Args:
    parameters: of the regeneration and of the data set, by name.
    run_id: of the pipeline's run.
    model_uri: URI of the imported target.
    dataset: the data set, for lineage; its `uri` in the metadata says where the files are.
    report: lengths, turns, coverage, rejected lines and three conversations, one HTML page.
    metrics: counts of rows, answers and tokens, and the draft vocabulary's coverage.

Returns:
    Output: URI of the data set.
"""

from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Dataset, Metrics, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def build_dataset(  # noqa: D103
    parameters: dict[str, Any], run_id: str, model_uri: str,
    dataset: Output[Dataset], report: Output[HTML], metrics: Output[Metrics],
) -> str:  # fmt: skip
    from draft_model import steps

    return steps.build_dataset(parameters, run_id, model_uri, dataset, report, metrics)
