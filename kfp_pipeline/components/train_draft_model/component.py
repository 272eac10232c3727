"""Training: coordinates the job whose processes train the draft."""

from kfp import dsl
from kfp.dsl import Metrics, Model, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def train_draft_model(
    model_uri: str,
    dataset_uri: str,
    output_model_path: Output[Model],
    metrics: Output[Metrics],
    run_id: str,
    instance_type_draft_model_training: str = "Standard_nc24rs_v3",
    num_nodes_draft_model_training: int = 1,
    number_of_gpu_to_use_draft_model_training: int = 1,
    draft_model_config: str = "",
    num_epochs: int = 2,
    training_batch_size: int = 2,
    learning_rate: float = 0.0001,
    warmup_ratio: float = 0.015,
    max_grad_norm: float = 0.5,
    ttt_length: int = 7,
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
    compute_draft_model_training: str = "serverless",
    compute_dtype: str = "bfloat16",
    num_speculative_tokens: int = 3,
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
    storage_uri: str = "",
) -> str:
    """Trains the EAGLE-3 draft model. This step coordinates; the job's processes read and write object storage.

    Args:
        model_uri: URI of the imported target.
        dataset_uri: URI of the data set.
        output_model_path: the trained checkpoints: `final/`, ready to serve, and one per save_interval.
        run_id: of the pipeline's run, which names its training job.
        metrics: final loss, simulated acceptance length, steps.
        instance_type_draft_model_training: Instance type of the training job's pods when its compute is
            `serverless`.
        num_nodes_draft_model_training: Nodes (pods) of the training job. Allowed: >= 1.
        number_of_gpu_to_use_draft_model_training: GPUs, and so processes, per node; on a machine without
            GPUs: processes on its CPU. Allowed: >= 1.
        draft_model_config: Draft configuration, JSON; what it leaves out is generated from the target's.
        num_epochs: Passes over the training conversations. Allowed: >= 1.
        training_batch_size: Per process and forward pass through the target; changes speed and memory, not
            results. Unit: conversations. Allowed: >= 1.
        learning_rate: Peak learning rate. Allowed: > 0.
        warmup_ratio: Warm-up's share of the total steps. Allowed: 0..1.
        max_grad_norm: Gradients are clipped to this global norm. Allowed: > 0.
        ttt_length: Training-time-test unroll: draft steps that are trained through. Unit: steps. Allowed: >=
            1.
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
        compute_draft_model_training: `serverless` uses the instance type; any other name is a named compute.
            Allowed: no backslash, no single quote.
        compute_dtype: Type that training computes in; master weights and reductions are float32 always.
            Allowed: bfloat16, float32.
        num_speculative_tokens: Tokens the draft proposes per step of the target. Unit: tokens. Allowed:
            1..16.
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
        keep_checkpoints: Newest checkpoints that stay in the output; 0: all. Unit: checkpoints. Allowed: >= 0.
        final_checkpoint: Which checkpoint becomes `final`; best: of the highest simulated acceptance length on
            the validation split, which then stays. Allowed: last, best.
        checkpoint_path: Folder (s3:// or a path) that several runs share, one at a time: checkpoints go there, and
            resume=true looks there; not given: the run's own output.
        mlflow_tracking_uri: MLflow server on which the stages are tracked, and that keeps a target named models:/;
            not given: MLFLOW_TRACKING_URI, which KFP's MLflow plugin sets. Allowed: no name or password in it.
        storage_uri: folder of the run; not given: the pipeline root.

    Returns:
        URI of the checkpoint that is ready to serve.
    """
    outside = ("model_uri", "dataset_uri", "output_model_path", "metrics", "run_id", "storage_uri")
    given = {name: value for name, value in locals().items() if name not in (*outside, "outside")}
    from draft_model import jobs, storage
    from draft_model.doors import component
    from draft_model.handed import check_handed
    from draft_model.parameters.rules import validate
    from draft_model.training import TrainConfig

    with component("train") as work:
        check_handed({"import": model_uri, "dataset": dataset_uri})
        uri = storage.join(storage_uri, "output_model_path") if storage_uri else output_model_path.uri
        parameters = validate(given, ["train"])
        config = TrainConfig(model=model_uri, dataset=dataset_uri, output=uri, work=work, parameters=parameters)
        result = jobs.run(config, run_id)
        storage.read_manifest(result.final, stage="train")
        output_model_path.uri = result.output
        output_model_path.metadata.update(
            final=result.final, checkpoints=config.checkpoints, format="EAGLE-3, for vLLM and SGLang"
        )
        metrics.log_metric("steps", result.steps)
        metrics.log_metric("final_loss", result.loss)
        metrics.log_metric("simulated_acceptance_length", result.acceptance_length)
    return result.final
