"""Import, its light half: the target's configuration and tokenizer, for the data set, before the weights move."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Artifact, Markdown, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["importer"], install_kfp_package=False)
def import_tokenizer(
    tokenizer: Output[Artifact],
    summary: Output[Markdown],
    run_id: str,
    huggingface_id: str = "",
    pytorch_model_path: str = "",
    mlflow_model_path: str = "",
    mlflow_tracking_uri: str = "",
    storage_uri: str = "",
) -> NamedTuple("Tokenizer", [("uri", str), ("version", str)]):  # type: ignore[valid-type]
    """Looks at the target model, and publishes its configuration and tokenizer ahead of its weights.

    The data set needs no more, so it is built beside the transfer of the weights. The version that comes out pins what
    import_model brings, and makes KFP's cache of the import and of the data set miss when the model has changed.

    Args:
        tokenizer: configuration and tokenizer, for lineage.
        summary: what the model is.
        run_id: of the pipeline's run. Without storage_uri the folder lies beside those of all runs, under the version,
            so that the data set of an unchanged model and unchanged files is found in KFP's cache.
        huggingface_id: Target model: a text-generation model of the Hugging Face Hub, `org/name` or
            `org/name@revision`.
        pytorch_model_path: Target model: a Transformers folder (config, weights, tokenizer), or a folder with
            one below it. Allowed: no backslash, no single quote.
        mlflow_model_path: Target model: an MLflow model of the `transformers` flavour. Allowed: no backslash,
            no single quote.
        mlflow_tracking_uri: MLflow server on which the stages are tracked, and that keeps a target named models:/;
            not given: MLFLOW_TRACKING_URI, which KFP's MLflow plugin sets. Allowed: no name or password in it.
        storage_uri: folder of the run; not given: the pipeline root.

    Returns:
        URI of the folder, and the model's version.
    """
    outside = ("tokenizer", "summary", "run_id", "storage_uri")
    given = {name: value for name, value in locals().items() if name not in (*outside, "outside")}
    from pathlib import Path

    from draft_model import storage
    from draft_model.doors import component
    from draft_model.model_import import DescriptionConfig, describe
    from draft_model.parameters.rules import validate

    with component("import") as work:
        root, in_run, _ = tokenizer.uri.partition(f"/{run_id}/")
        shared = f"{root}/models/{{version}}/tokenizer" if in_run else tokenizer.uri
        output = storage.join(storage_uri, "tokenizer") if storage_uri else shared
        found = describe(DescriptionConfig(output, work, validate(given, ["import"])))
        tokenizer.uri = found.uri
        tokenizer.metadata.update(source=found.source, version=found.version)
        Path(summary.path).write_text(found.markdown(), encoding="utf-8")
    return (found.uri, found.version)
