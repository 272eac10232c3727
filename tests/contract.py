"""The 35 contract parameters, copied by hand from the specification: what the code is held against.

Each is (name, type, default, allowed): a tuple of words, a comparison such as ">= 1", "quoting" where neither a
backslash nor a quotation mark is allowed, or None. The empty string, and 0 for total_steps, mean "not given".
"""

CHAT_TEMPLATES = ("llama3", "qwen", "gpt-oss", "deepseek-r1-distill")
CONTRACT = [
    ("instance_type_model_import", str, "Standard_d12_v2", None),
    ("instance_type_draft_model_training", str, "Standard_nc24rs_v3", None),
    ("num_nodes_draft_model_training", int, 1, ">= 1"),
    ("number_of_gpu_to_use_draft_model_training", int, 1, ">= 1"),
    ("huggingface_id", str, "", None),
    ("pytorch_model_path", str, "", "quoting"),
    ("mlflow_model_path", str, "", "quoting"),
    ("dataset_train_split", str, "", None),
    ("dataset_validation_split", str, "", None),
    ("draft_model_config", str, "", None),
    ("num_epochs", int, 2, ">= 1"),
    ("training_batch_size", int, 2, ">= 1"),
    ("learning_rate", float, 0.0001, "> 0"),
    ("max_length", int, 2048, ">= 16"),
    ("warmup_ratio", float, 0.015, "0..1"),
    ("max_grad_norm", float, 0.5, "> 0"),
    ("ttt_length", int, 7, ">= 1"),
    ("chat_template", str, "llama3", CHAT_TEMPLATES),
    ("attention_backend", str, "flex_attention", ("flex_attention", "sdpa")),
    ("tp_size", int, 1, ">= 1"),
    ("dp_size", int, 1, ">= 1"),
    ("draft_global_batch_size", int, 8, ">= 1"),
    ("draft_micro_batch_size", int, 1, ">= 1"),
    ("draft_accumulation_steps", int, 1, ">= 1"),
    ("log_steps", int, 50, ">= 1"),
    ("eval_interval", int, 1, ">= 1"),
    ("save_interval", int, 1, ">= 1"),
    ("seed", int, 0, None),
    ("total_steps", int, 0, ">= 1"),
    ("dist_timeout", int, 20, ">= 1"),
    ("resume", str, "false", ("true", "false")),
    ("resume_from_checkpoint", str, "", None),
    ("build_dataset_num_proc", int, 96, ">= 1"),
    ("compute_model_import", str, "serverless", "quoting"),
    ("compute_draft_model_training", str, "serverless", "quoting"),
]
KINDS = {
    "pytorch_model_path": "custom_model",
    "mlflow_model_path": "mlflow_model",
    "dataset_train_split": "uri_file",
    "dataset_validation_split": "uri_file",
    "draft_model_config": "uri_file",
    "resume_from_checkpoint": "uri_folder",
}
"""The contract's names of types that are more than a string."""
