"""Dataset: conversations to tokens, loss masks and the draft vocabulary."""

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Output

from kfp_pipeline.components.images import STAGE_IMAGE


@dsl.component(base_image=STAGE_IMAGE, install_kfp_package=False)
def build_dataset(
    model_uri: str,
    dataset: Output[Dataset],
    metrics: Output[Metrics],
    dataset_train_split: str = "",
    dataset_validation_split: str = "",
    draft_model_config: str = "",
    max_length: int = 2048,
    chat_template: str = "llama3",
    build_dataset_num_proc: int = 96,
    max_rejected_fraction: float = 0.01,
    storage_uri: str = "",
) -> str:
    """Builds the training and the validation data for the target's tokenizer.

    Args:
        model_uri: URI of the imported model; only its tokenizer and configuration are read.
        dataset: the data set, for lineage.
        metrics: counts of rows and tokens, and the draft vocabulary's coverage.
        dataset_train_split: Training conversations, JSONL.
        dataset_validation_split: Validation conversations, JSONL; not given: no validation, no evaluation.
        draft_model_config: Draft configuration, JSON; what it leaves out is generated from the target's.
        max_length: Longer conversations are cut at the end, and counted in the report. Unit: tokens. Allowed:
            >= 16.
        chat_template: Whose turn markers the target's chat template writes; says which tokens are the
            assistant's. Allowed: llama3, qwen, gpt-oss, deepseek-r1-distill.
        build_dataset_num_proc: Processes that build the data set; lowered to the cores there are. Allowed: >=
            1.
        max_rejected_fraction: More unusable lines than this share of a data file stop the run. Allowed: 0..1.
        storage_uri: folder of the run; not given: the pipeline root.

    Returns:
        URI of the data set.
    """
    outside = ("model_uri", "dataset", "metrics", "storage_uri")
    given = {name: value for name, value in locals().items() if name not in (*outside, "outside")}
    from draft_model import storage
    from draft_model.dataset import DatasetConfig, run
    from draft_model.doors import component
    from draft_model.parameters import validate

    with component("dataset") as work:
        uri = storage.join(storage_uri, "dataset") if storage_uri else dataset.uri
        parameters = validate(given, ["dataset"])
        result = run(DatasetConfig(model=model_uri, output=uri, parameters=parameters, work=work))
        dataset.uri = result.uri
        dataset.metadata.update(fingerprint=result.fingerprint, chat_template=parameters.chat_template)
        for name, value in result.metrics().items():
            metrics.log_metric(name, value)
    return uri
