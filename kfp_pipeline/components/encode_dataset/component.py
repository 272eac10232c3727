"""Dataset, one part of it: pieces of the input to tokens and loss masks."""

from typing import Any

from kfp import dsl
from kfp.dsl import Markdown, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["dataset"], install_kfp_package=False)
def encode_dataset(
    part: dict[str, Any],
    summary: Output[Markdown],
    dataset_train_split: str = "",
    dataset_validation_split: str = "",
    draft_model_config: str = "",
    max_length: int = 2048,
    chat_template: str = "llama3",
    build_dataset_num_proc: int = 96,
    max_rejected_fraction: float = 0.01,
    mlflow_tracking_uri: str = "",
) -> str:
    """Builds one of several parts of the data set, beside the pods that build the others.

    Args:
        part: one of what plan_dataset gives; a loop hands its body nothing but the item, where kfp.local runs it.
        summary: which pieces of which files these were.
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

    Returns:
        URI of the data set's folder, which is not whole yet.
    """
    given = {name: value for name, value in locals().items() if name not in ("part", "summary")}
    from pathlib import Path

    from draft_model.dataset import DatasetConfig, run_part
    from draft_model.doors import component
    from draft_model.parameters.rules import validate
    from draft_model.shown import table

    with component("dataset") as work:
        parameters = validate(given, ["dataset"])
        config = DatasetConfig(model=part["model_uri"], output=part["uri"], parameters=parameters, work=work)
        pieces = run_part(config, int(part["number"]), int(part["parts"]))
        Path(summary.path).write_text(table(pieces, ("file", "pieces")), encoding="utf-8")
    return str(part["uri"])
