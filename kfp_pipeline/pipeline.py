"""The pipeline `pipeline_draft_model`: import, dataset, train, evaluate.

Its inputs are the records of `draft_model.parameters`, in their order: the signature is made from them, so that a
parameter is written down once. Big things pass between the steps as URIs in object storage, with an artifact beside
each for lineage; no model ever crosses a coordinating pod.
"""

import inspect
from typing import Any, NamedTuple

from kfp import dsl

from draft_model.parameters import PARAMETERS, Stage, parameters_of
from kfp_pipeline.components.build_dataset import build_dataset
from kfp_pipeline.components.evaluate_draft_model import evaluate_draft_model
from kfp_pipeline.components.import_model import import_model
from kfp_pipeline.components.preflight import preflight
from kfp_pipeline.components.train_draft_model import train_draft_model

NAME = "pipeline-draft-model"


class Outputs(NamedTuple):
    """What the pipeline gives back."""

    output_model_path: dsl.Model


def _description() -> str:
    lines = ["Trains the EAGLE-3 draft model for speculative decoding of a target model.", ""]
    for parameter in PARAMETERS:
        unit = f" ({parameter.unit})" if parameter.unit else ""
        allowed = f" Allowed: {parameter.allowed}." if parameter.allowed else ""
        lines.append(f"{parameter.name}{unit}: {parameter.help}{allowed}")
    return "\n".join(lines)


def _pipeline(*values: Any) -> Any:
    inputs = dict(zip((parameter.name for parameter in PARAMETERS), values, strict=True))

    def of(stage: Stage) -> dict[str, Any]:
        return {parameter.name: inputs[parameter.name] for parameter in parameters_of(stage)}

    storage_uri = inputs["storage_uri"]
    checked = preflight(**inputs).set_caching_options(False)
    imported = import_model(**of("import"), storage_uri=storage_uri).after(checked)
    model_uri = imported.outputs["Output"]
    built = build_dataset(model_uri=model_uri, **of("dataset"), storage_uri=storage_uri)
    dataset_uri = built.outputs["Output"]
    trained = train_draft_model(
        model_uri=model_uri, dataset_uri=dataset_uri, **of("train"), storage_uri=storage_uri
    ).set_caching_options(False)
    evaluate_draft_model(
        model_uri=model_uri, dataset_uri=dataset_uri, draft_uri=trained.outputs["Output"], **of("evaluate")
    ).set_caching_options(False)
    return Outputs(output_model_path=trained.outputs["output_model_path"])


def _signature() -> inspect.Signature:
    parameters = [
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=parameter.default,
            annotation=parameter.type,
        )
        for parameter in PARAMETERS
    ]
    return inspect.Signature(parameters, return_annotation=Outputs)


_pipeline.__signature__ = _signature()  # type: ignore[attr-defined]
pipeline_draft_model = dsl.pipeline(name=NAME, description=_description())(_pipeline)
