"""Checks the run's parameters and everything that they name, before any heavy step starts.

A run that cannot start ends here: the problems are the last lines of this step's log. No later step validates again,
each gets those of the parameters that it reads that are not the defaults, as one value.

Args:
    run_id: of the pipeline's run.
    summary: the run in a table, with notes; or the problems.

Returns:
    model_import: parameters of the import.
    dataset: parameters of the regeneration and of the data set.
    train: parameters of the training.
    evaluate: parameters of the evaluation.
"""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Markdown, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["dataset"], install_kfp_package=False)
def preflight(  # noqa: D103
    run_id: str, summary: Output[Markdown],
    instance_type_model_import: str, instance_type_draft_model_training: str, num_nodes_draft_model_training: int,
    number_of_gpu_to_use_draft_model_training: int, huggingface_id: str, pytorch_model_path: str,
    mlflow_model_path: str, dataset_train_split: str, dataset_validation_split: str, draft_model_config: str,
    num_epochs: int, training_batch_size: int, learning_rate: float, max_length: int, warmup_ratio: float,
    max_grad_norm: float, ttt_length: int, chat_template: str, attention_backend: str, tp_size: int, dp_size: int,
    draft_global_batch_size: int, draft_micro_batch_size: int, draft_accumulation_steps: int, log_steps: int,
    eval_interval: int, save_interval: int, seed: int, total_steps: int, dist_timeout: int, resume: str,
    resume_from_checkpoint: str, build_dataset_num_proc: int, compute_model_import: str,
    compute_draft_model_training: str, storage_uri: str, max_rejected_fraction: float, compute_dtype: str,
    num_speculative_tokens: int, evaluation_conversations: int, evaluation_max_new_tokens: int,
    evaluation_prompts: str, evaluation_temperature: float, register_model_name: str, training_backend: str,
    training_attempts: int, queue_limit: int, start_limit: int, run_limit: int, compute_map: str,
    object_store_secret: str, keep_checkpoints: int, final_checkpoint: str, checkpoint_path: str,
    mlflow_tracking_uri: str, evaluation_engine: str, evaluation_batch_sizes: str, compute_evaluation: str,
    instance_type_evaluation: str, number_of_gpu_to_use_evaluation: int, draft_architecture: str, draft_loss: str,
    draft_optimizer: str, learning_rate_floor: float, momentum: float, regenerate_answers: str,
    regenerate_temperature: float, regenerate_max_new_tokens: int, regenerate_samples_per_prompt: int,
    regenerate_limit: int,
) -> NamedTuple(  # type: ignore[valid-type]
    "Plan", [("model_import", dict), ("dataset", dict), ("train", dict), ("evaluate", dict)]
):  # fmt: skip
    values = {**locals()}
    from draft_model import steps

    return steps.preflight(values, run_id, summary)
