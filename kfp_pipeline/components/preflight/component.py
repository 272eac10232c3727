"""First step: everything that can be known to be wrong, before any heavy step starts."""

from kfp import dsl
from kfp.dsl import Markdown, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["dataset"], install_kfp_package=False)
def preflight(
    summary: Output[Markdown],
    instance_type_model_import: str = "Standard_d12_v2",
    instance_type_draft_model_training: str = "Standard_nc24rs_v3",
    num_nodes_draft_model_training: int = 1,
    number_of_gpu_to_use_draft_model_training: int = 1,
    huggingface_id: str = "",
    pytorch_model_path: str = "",
    mlflow_model_path: str = "",
    dataset_train_split: str = "",
    dataset_validation_split: str = "",
    draft_model_config: str = "",
    num_epochs: int = 2,
    training_batch_size: int = 2,
    learning_rate: float = 0.0001,
    max_length: int = 2048,
    warmup_ratio: float = 0.015,
    max_grad_norm: float = 0.5,
    ttt_length: int = 7,
    chat_template: str = "llama3",
    attention_backend: str = "flex_attention",
    tp_size: int = 1,
    dp_size: int = 1,
    draft_global_batch_size: int = 8,
    draft_micro_batch_size: int = 1,
    draft_accumulation_steps: int = 1,
    log_steps: int = 50,
    eval_interval: int = 1,
    save_interval: int = 1,
    seed: int = 0,
    total_steps: int = 0,
    dist_timeout: int = 20,
    resume: str = "false",
    resume_from_checkpoint: str = "",
    build_dataset_num_proc: int = 96,
    compute_model_import: str = "serverless",
    compute_draft_model_training: str = "serverless",
    storage_uri: str = "",
    max_rejected_fraction: float = 0.01,
    compute_dtype: str = "bfloat16",
    num_speculative_tokens: int = 3,
    evaluation_conversations: int = 40,
    evaluation_max_new_tokens: int = 128,
    evaluation_prompts: str = "",
    evaluation_tree: str = "",
    evaluation_temperature: float = 0.0,
    register_model_name: str = "",
    dataset_pods: int = 1,
    training_backend: str = "auto",
    training_attempts: int = 3,
    queue_limit: int = 1440,
    start_limit: int = 60,
    run_limit: int = 2880,
    compute_map: str = "",
    object_store_secret: str = "mlpipeline-minio-artifact",
    keep_checkpoints: int = 0,
    final_checkpoint: str = "last",
    checkpoint_path: str = "",
    mlflow_tracking_uri: str = "",
) -> list[str]:
    """Validates the run's parameters and looks for the inputs that they name; reports all problems at once.

    It succeeds, whatever it finds: KFP shows nothing that a failing step has written. The next step fails instead.

    Args:
        summary: the problems, or the run in a table.
        instance_type_model_import: Instance type of the import step when its compute is `serverless`.
        instance_type_draft_model_training: Instance type of the training job's pods when its compute is
            `serverless`.
        num_nodes_draft_model_training: Nodes (pods) of the training job. Allowed: >= 1.
        number_of_gpu_to_use_draft_model_training: GPUs, and so processes, per node; on a machine without
            GPUs: processes on its CPU. Allowed: >= 1.
        huggingface_id: Target model: a text-generation model of the Hugging Face Hub, `org/name` or
            `org/name@revision`.
        pytorch_model_path: Target model: a Transformers folder (config, weights, tokenizer), or a folder with
            one below it. Allowed: no backslash, no single quote.
        mlflow_model_path: Target model: an MLflow model of the `transformers` flavour. Allowed: no backslash,
            no single quote.
        dataset_train_split: Training conversations, JSONL, plain, gzip or zstd: a file, folder or glob.
        dataset_validation_split: Validation conversations, as the training ones; not given: no validation, no
            evaluation.
        draft_model_config: Draft configuration, JSON; what it leaves out is generated from the target's.
        num_epochs: Passes over the training conversations. Allowed: >= 1.
        training_batch_size: Per process and forward pass through the target; changes speed and memory, not
            results. Unit: conversations. Allowed: >= 1.
        learning_rate: Peak learning rate. Allowed: > 0.
        max_length: Longer conversations are cut at the end, and counted in the report. Unit: tokens. Allowed:
            >= 16.
        warmup_ratio: Warm-up's share of the total steps. Allowed: 0..1.
        max_grad_norm: Gradients are clipped to this global norm. Allowed: > 0.
        ttt_length: Training-time-test unroll: draft steps that are trained through. Unit: steps. Allowed: >=
            1.
        chat_template: Whose turn markers the target's chat template writes; says which tokens are the
            assistant's. Allowed: llama3, qwen, gpt-oss, deepseek-r1-distill.
        attention_backend: Attention of the draft; on CPU flex_attention runs as sdpa (same values). Allowed:
            flex_attention, sdpa.
        tp_size: Tensor parallelism of the target model. Allowed: >= 1.
        dp_size: Data parallelism; 1: derived from nodes, GPUs and tp_size. Allowed: >= 1.
        draft_global_batch_size: Conversations per optimizer step, over all processes. Unit: conversations.
            Allowed: >= 1.
        draft_micro_batch_size: Conversations per process in one forward pass of the draft. Unit:
            conversations. Allowed: >= 1.
        draft_accumulation_steps: Forward passes per optimizer step; 1: derived from the other batch
            parameters. Allowed: >= 1.
        log_steps: Steps between two log lines. Unit: steps. Allowed: >= 1.
        eval_interval: Epochs between two validations. Unit: epochs. Allowed: >= 1.
        save_interval: Epochs between two checkpoints; the last is always saved. Unit: epochs. Allowed: >= 1.
        seed: Same seed, data and world size: same losses.
        total_steps: Training stops there, and the schedule decays over it; 0: what num_epochs comes to. Unit:
            steps. Allowed: >= 1, or 0 for not given.
        dist_timeout: Time-out of collective communication. Unit: minutes. Allowed: >= 1.
        resume: Continue from the last complete checkpoint of this output. Allowed: true, false.
        resume_from_checkpoint: With resume=true and no checkpoint in the output: resume from here. With
            resume=false: start from its weights.
        build_dataset_num_proc: Processes that build the data set; lowered to the cores there are. Allowed: >=
            1.
        compute_model_import: `serverless` uses the instance type; any other name is a named compute. Allowed:
            no backslash, no single quote.
        compute_draft_model_training: `serverless` uses the instance type; any other name is a named compute.
            Allowed: no backslash, no single quote.
        storage_uri: Folder (s3:// or a path) under which the stages of this run write; not given: KFP's
            pipeline root.
        max_rejected_fraction: More unusable lines than this share of a data file stop the run. Allowed: 0..1.
        compute_dtype: Type that training computes in; master weights and reductions are float32 always.
            Allowed: bfloat16, float32.
        num_speculative_tokens: Tokens the draft proposes per step of the target. Unit: tokens. Allowed:
            1..16.
        evaluation_conversations: Validation conversations that the evaluation decodes; 0: all. Unit:
            conversations. Allowed: >= 0.
        evaluation_max_new_tokens: Longest reply that the evaluation decodes. Unit: tokens. Allowed: >= 1.
        evaluation_prompts: Prompts to decode: a JSONL file, or benchmarks of mt-bench, gsm8k, humaneval,
            alpaca, cnn-dm with commas between; not given: those of the validation split.
        evaluation_tree: Decode also with a tree: children of each proposal at each depth, as 4,2,1; not
            given: chains alone.
        evaluation_temperature: Decode also by sampling at this temperature; 0: greedy alone. Allowed: >= 0.
        register_model_name: Name under which the draft is registered in MLflow, where tracking is set up; not
            given: it is not.
        dataset_pods: Pods that encode the data set side by side. Unit: pods. Allowed: >= 1.
        training_backend: Who runs the training processes; auto: on a cluster PyTorchJob where it is
            installed, else TrainJob; elsewhere this machine. Allowed: auto, pytorchjob, trainjob, local.
        training_attempts: Times that a training job is started when machines fail it; each goes on from the
            newest checkpoint. Allowed: >= 1.
        queue_limit: Longest wait of the training job in a queue. Unit: minutes. Allowed: >= 1.
        start_limit: Longest time from there until all pods of the training job run. Unit: minutes. Allowed:
            >= 1.
        run_limit: Longest time that the training job may run. Unit: minutes. Allowed: >= 1.
        compute_map: ConfigMap, or JSON file, of instance types and named computes; not given: the built-in
            map.
        object_store_secret: Secret with the object store's keys (accesskey, secretkey); where it is absent,
            the pods' own role counts.
        keep_checkpoints: Newest checkpoints that stay in the output; 0: all. Unit: checkpoints. Allowed: >=
            0.
        final_checkpoint: Which checkpoint becomes `final`; best: of the highest simulated acceptance length
            on the validation split, which then stays. Allowed: last, best.
        checkpoint_path: Folder (s3:// or a path) that several runs share, one at a time: checkpoints go there,
            and resume=true looks there; not given: the run's own output.
        mlflow_tracking_uri: MLflow server on which the stages are tracked, and that keeps a target named models:/;
            not given: MLFLOW_TRACKING_URI, which KFP's MLflow plugin sets. Allowed: no name or password in it.

    Returns:
        What is wrong, a sentence each; empty where the run can start.
    """
    given = {name: value for name, value in locals().items() if name != "summary"}
    from pathlib import Path

    from draft_model.doors import component
    from draft_model.preflight import look

    with component("preflight") as work:
        found = look(given, summary.uri.rpartition("/")[0], work)
        Path(summary.path).write_text(found.markdown(), encoding="utf-8")
    return found.problems
