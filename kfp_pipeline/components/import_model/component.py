"""Import: the target model, as one canonical folder at a URI."""

from kfp import dsl
from kfp.dsl import Markdown, Metrics, Model, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["importer"], install_kfp_package=False)
def import_model(
    model: Output[Model],
    summary: Output[Markdown],
    metrics: Output[Metrics],
    instance_type_model_import: str = "Standard_d12_v2",
    huggingface_id: str = "",
    pytorch_model_path: str = "",
    mlflow_model_path: str = "",
    compute_model_import: str = "serverless",
    mlflow_tracking_uri: str = "",
    version: str = "",
    storage_uri: str = "",
) -> str:
    """Imports the target model from the Hub, from a Transformers folder or from MLflow.

    Args:
        model: the imported folder, for lineage; its files go to its URI directly and never through KFP's launcher.
        summary: what was imported, and what was done to it.
        metrics: number of weights, and bytes.
        instance_type_model_import: Instance type of the import step when its compute is `serverless`.
        huggingface_id: Target model: a text-generation model of the Hugging Face Hub, `org/name` or
            `org/name@revision`.
        pytorch_model_path: Target model: a Transformers folder (config, weights, tokenizer), or a folder with
            one below it. Allowed: no backslash, no single quote.
        mlflow_model_path: Target model: an MLflow model of the `transformers` flavour. Allowed: no backslash,
            no single quote.
        compute_model_import: `serverless` uses the instance type; any other name is a named compute. Allowed:
            no backslash, no single quote.
        mlflow_tracking_uri: MLflow server on which the stages are tracked, and that keeps a target named models:/;
            not given: MLFLOW_TRACKING_URI, which KFP's MLflow plugin sets. Allowed: no name or password in it.
        version: of the model, as import_tokenizer has found it; no other is imported. Empty: any.
        storage_uri: folder of the run; not given: the pipeline root.

    Returns:
        URI of the imported folder.
    """
    outside = ("model", "summary", "metrics", "version", "storage_uri")
    given = {name: value for name, value in locals().items() if name not in (*outside, "outside")}
    from pathlib import Path

    from draft_model import storage
    from draft_model.doors import component
    from draft_model.model_import import ImportConfig, run
    from draft_model.parameters.rules import validate

    with component("import") as work:
        uri = storage.join(storage_uri, "model") if storage_uri else model.uri
        result = run(ImportConfig(uri, work, validate(given, ["import"]), version))
        model.uri = result.uri
        model.metadata.update(
            source=result.source,
            revision=result.revision,
            licence=result.licence,
            architecture=result.architecture,
            parameter_count=result.parameter_count,
            bytes=result.size,
        )
        Path(summary.path).write_text(result.markdown(), encoding="utf-8")
        metrics.log_metric("parameters", result.parameter_count)
        metrics.log_metric("bytes", result.size)
    return uri
