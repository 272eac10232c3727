"""Dataset, before it is built: where it goes, and in which parts pods encode it."""

from typing import Any

from kfp import dsl
from kfp.dsl import Markdown, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["dataset"], install_kfp_package=False)
def plan_dataset(
    model_uri: str,
    summary: Output[Markdown],
    model_version: str = "",
    dataset_train_split: str = "",
    dataset_validation_split: str = "",
    draft_model_config: str = "",
    max_length: int = 2048,
    chat_template: str = "llama3",
    build_dataset_num_proc: int = 96,
    max_rejected_fraction: float = 0.01,
    mlflow_tracking_uri: str = "",
    dataset_pods: int = 1,
    storage_uri: str = "",
) -> list[dict[str, Any]]:
    """Looks at the data files, and says what each pod is to encode.

    Args:
        model_uri: URI of the imported model, or of its tokenizer alone.
        summary: the data files, and how many pods share them.
        model_version: changes with the model, where its URI does not.
        dataset_train_split: Training conversations, JSONL, plain, gzip or zstd: a file, folder or glob.
        dataset_validation_split: Validation conversations, as the training ones; not given: no validation, no
            evaluation.
        draft_model_config: Draft configuration, JSON; what it leaves out is generated from the target's.
        max_length: Longer conversations are cut at the end, and counted in the report. Unit: tokens. Allowed:
            >= 16.
        chat_template: Whose turn markers the target's chat template writes; says which tokens are the
            assistant's. Allowed: llama3, qwen, gpt-oss, deepseek-r1-distill.
        build_dataset_num_proc: Processes that build the data set; lowered to the cores there are. Allowed: >=
            1.
        max_rejected_fraction: More unusable lines than this share of a data file stop the run. Allowed: 0..1.
        mlflow_tracking_uri: MLflow server on which the stages are tracked, and that keeps a target named models:/;
            not given: MLFLOW_TRACKING_URI, which KFP's MLflow plugin sets. Allowed: no name or password in it.
        dataset_pods: Pods that encode the data set side by side. Unit: pods. Allowed: >= 1.
        storage_uri: folder of the run; not given: beside the model.

    Returns:
        For each pod the number of its part, how many there are, the URIs of model and data set, and what changes with
        the model and the content of the data files: so a cached result is never of older ones.
    """
    outside = ("model_uri", "summary", "model_version", "storage_uri")
    given = {name: value for name, value in locals().items() if name not in (*outside, "outside")}
    from pathlib import Path

    from draft_model.dataset import data_files, data_version, place
    from draft_model.doors import component
    from draft_model.parameters.rules import validate
    from draft_model.shown import table

    with component("dataset"):
        parameters = validate(given, ["dataset"])
        version = data_version(parameters)
        common = {
            "parts": parameters.dataset_pods,
            "model_uri": model_uri,
            "uri": place(parameters, model_uri, version, storage_uri),
            "data_version": version,
            "model_version": model_version,
        }
        rows = [(split, name, f"{size / 1e6:,.1f} MB") for split, name, size in data_files(parameters)]
        total = (f"{len(rows)} files, for {parameters.dataset_pods} pods", "", "")
        shown = table([*rows[:100], total], ("split", "file", "size"))
        Path(summary.path).write_text(shown, encoding="utf-8")
    return [{"number": number, **common} for number in range(parameters.dataset_pods)]
