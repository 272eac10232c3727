"""Dataset: conversations to tokens, loss masks and the draft vocabulary."""

from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Dataset, Metrics, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["dataset"], install_kfp_package=False)
def build_dataset(
    model_uri: str,
    parts: list[dict[str, Any]],
    uris: list[str],
    dataset: Output[Dataset],
    metrics: Output[Metrics],
    report: Output[HTML],
    dataset_train_split: str = "",
    dataset_validation_split: str = "",
    draft_model_config: str = "",
    max_length: int = 2048,
    chat_template: str = "llama3",
    build_dataset_num_proc: int = 96,
    max_rejected_fraction: float = 0.01,
    mlflow_tracking_uri: str = "",
) -> str:
    """Makes one data set, for the target's tokenizer, of what other pods have encoded, and encodes what is missing.

    Args:
        model_uri: URI of the imported model, or of its tokenizer and configuration, which are all that is read.
        parts: what each pod has encoded; changes with the content of the data files.
        uris: URI of the folder, once from each pod.
        dataset: the data set, for lineage.
        metrics: counts of rows and tokens, and the draft vocabulary's coverage.
        report: lengths, turns, coverage, rejected lines and three conversations, one HTML page.
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
        URI of the data set.
    """
    outside = ("model_uri", "parts", "uris", "dataset", "metrics", "report")
    given = {name: value for name, value in locals().items() if name not in (*outside, "outside")}
    from pathlib import Path

    from draft_model import storage
    from draft_model.dataset import REPORT_PAGE, DatasetConfig, run
    from draft_model.doors import component
    from draft_model.parameters.rules import validate

    with component("dataset") as work:
        parameters = validate(given, ["dataset"])
        uri = uris[0]
        result = run(DatasetConfig(model=model_uri, output=uri, parameters=parameters, work=work))
        dataset.uri = result.uri
        dataset.metadata.update(fingerprint=result.fingerprint, chat_template=parameters.chat_template)
        for name, value in result.metrics().items():
            metrics.log_metric(name, value)
        Path(report.path).write_bytes(storage.read_bytes(storage.join(uri, REPORT_PAGE)))
    return uri
