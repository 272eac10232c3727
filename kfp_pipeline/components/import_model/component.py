"""Import: the target model, as one canonical folder at a URI."""

from kfp import dsl
from kfp.dsl import Model, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["importer"], install_kfp_package=False)
def import_model(
    model: Output[Model],
    instance_type_model_import: str = "Standard_d12_v2",
    huggingface_id: str = "",
    pytorch_model_path: str = "",
    mlflow_model_path: str = "",
    compute_model_import: str = "serverless",
    storage_uri: str = "",
) -> str:
    """Imports the target model from the Hub, from a Transformers folder or from MLflow.

    Args:
        model: the imported folder, for lineage; its files go to its URI directly and never through KFP's launcher.
        instance_type_model_import: Instance type of the import step when its compute is `serverless`.
        huggingface_id: Target model: a text-generation model of the Hugging Face Hub, `org/name` or
            `org/name@revision`.
        pytorch_model_path: Target model: a Transformers folder (config, weights, tokenizer), or a folder with
            one below it. Allowed: no backslash, no single quote.
        mlflow_model_path: Target model: an MLflow model of the `transformers` flavour. Allowed: no backslash,
            no single quote.
        compute_model_import: `serverless` uses the instance type; any other name is a named compute. Allowed:
            no backslash, no single quote.
        storage_uri: folder of the run; not given: the pipeline root.

    Returns:
        URI of the imported folder.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "storage_uri")}
    from draft_model import storage
    from draft_model.doors import component
    from draft_model.model_import import ImportConfig, run
    from draft_model.parameters import validate

    with component("import") as work:
        uri = storage.join(storage_uri, "model") if storage_uri else model.uri
        result = run(ImportConfig(output=uri, work=work, parameters=validate(given, ["import"])))
        model.uri = result.uri
        model.metadata.update(
            source=result.source,
            revision=result.revision,
            licence=result.licence,
            architecture=result.architecture,
            parameter_count=result.parameter_count,
            bytes=result.size,
        )
    return uri
