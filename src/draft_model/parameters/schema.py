"""The pipeline's contract, once: names, types, defaults, allowed values, units and help.

Everything that shows or checks a parameter derives from the class `Parameters`: the options of `draft-model`, the
inputs of the KFP pipeline with their drop-downs, the checks of rules.py and the table in the README. Names, types,
defaults and allowed values of the 35 contract parameters never change; parameters of our own come after them, each
with a default that keeps the contract's behaviour. "Not given" is the empty string, or 0 for `total_steps`, because
the KFP run form refuses a parameter without a default.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Stage = Literal["import", "regenerate", "dataset", "train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
LARGEST_SEED = 2**53 - 1
"""KFP passes numbers as doubles, which hold every integer up to here."""


def _one_line(value: str) -> str:
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value):
        raise ValueError("has a line break or control character inside: write it on one line, without")
    return value


def _no_quoting(value: str) -> str:
    if bad := sorted({character for character in value if character in "\\'"}):
        raise ValueError(f"has the character {' and '.join(bad)}, which a path or name here may not have")
    return value


def _tracking_server(value: str) -> str:
    if "@" in urlsplit(value).netloc:
        raise ValueError("has a name or password in it: leave both to MLflow's own environment variables")
    if value and "://" not in value and not value.startswith(("/", "~", ".", "file:", "databricks")):
        raise ValueError("has no scheme: put http:// or https:// before it, or ./ for a folder")
    return value


def _secret_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", value):
        raise ValueError(
            "must be the name of a Secret, which KFP refuses to be empty: where the pods' own role gives access, name "
            "one that does not exist, such as `none`"
        )
    return value


def _batch_sizes(value: str) -> str:
    sizes = [each.strip() for each in value.split(",")] if value else []
    if not all(re.fullmatch("[1-9][0-9]{0,3}", size) for size in sizes):
        raise ValueError("must be whole numbers from 1 to 9999 with commas between, such as 1,4,16")
    return value


Text = Annotated[str, AfterValidator(_one_line)]
NoQuoting = Annotated[Text, AfterValidator(_no_quoting)]
TrackingServer = Annotated[Text, AfterValidator(_tracking_server)]
SecretName = Annotated[Text, AfterValidator(_secret_name)]
BatchSizes = Annotated[Text, AfterValidator(_batch_sizes)]
_ALLOWED: dict[Callable[..., str], str] = {
    _no_quoting: "no backslash, no single quote",
    _tracking_server: "a URI or path without name or password",
    _secret_name: "a name, not empty",
    _batch_sizes: "whole numbers with commas between",
}


def _p(default: Any, help: str, *stages: Stage, unit: str = "", kind: str = "", **limits: float) -> Any:
    """A field of `Parameters`; `kind` is the hosted contract's name of a type that is more than a string."""
    if isinstance(default, float | int):
        limits["allow_inf_nan"] = False
    extra: dict[str, Any] = {"stages": list(stages), "unit": unit, "kind": kind}
    return Field(default, description=help, json_schema_extra=extra, **limits)  # type: ignore[call-overload]


class Parameters(BaseModel):
    """One run's parameters. The first 35 fields are the contract, in its order; the rest are additions of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    # fmt: off
    instance_type_model_import: Text = _p(
        "Standard_d12_v2", "Instance type of the import's and the data set's job when their compute is `serverless`.",
        "import")
    instance_type_draft_model_training: Text = _p(
        "Standard_nc24rs_v3", "Instance type of the training job's pods when its compute is `serverless`.", "train")
    num_nodes_draft_model_training: int = _p(
        1, "Nodes (pods) of the training job, and of a regeneration.", "regenerate", "train", ge=1)
    number_of_gpu_to_use_draft_model_training: int = _p(
        1, "GPUs, and so processes, per node; on a machine without GPUs: processes on its CPU.",
        "regenerate", "train", "evaluate", ge=1)
    huggingface_id: Text = _p(
        "", "Target model: a text-generation model of the Hugging Face Hub, `org/name` or `org/name@revision`.",
        "import")
    pytorch_model_path: NoQuoting = _p(
        "", "Target model: a Transformers folder (config, weights, tokenizer), or a folder with one below it.",
        "import", kind="custom_model")
    mlflow_model_path: NoQuoting = _p(
        "", "Target model: an MLflow model of the `transformers` flavour.", "import", kind="mlflow_model")
    dataset_train_split: Text = _p(
        "", "Training conversations, JSONL, plain, gzip or zstd: a file, folder or glob.",
        "regenerate", "dataset", kind="uri_file")
    dataset_validation_split: Text = _p(
        "", "Validation conversations, as the training ones; not given: no validation, no evaluation.",
        "regenerate", "dataset", kind="uri_file")
    draft_model_config: Text = _p(
        "", "Draft configuration, JSON; what it leaves out is generated from the target's.",
        "dataset", "train", kind="uri_file")
    num_epochs: int = _p(2, "Passes over the training conversations.", "train", ge=1)
    training_batch_size: int = _p(
        2, "Per process and forward pass through the target; changes speed and memory, not results.",
        "train", unit="conversations", ge=1)
    learning_rate: float = _p(0.0001, "Peak learning rate.", "train", gt=0)
    max_length: int = _p(
        2048, "Longer conversations are cut at the end, and counted in the report.",
        "regenerate", "dataset", unit="tokens", ge=16)
    warmup_ratio: float = _p(0.015, "Warm-up's share of the total steps.", "train", ge=0, le=1)
    max_grad_norm: float = _p(0.5, "Gradients are clipped to this global norm.", "train", gt=0)
    ttt_length: int = _p(
        7, "Training-time-test unroll: draft steps that are trained through.", "train", unit="steps", ge=1)
    chat_template: Literal["llama3", "qwen", "gpt-oss", "deepseek-r1-distill"] = _p(
        "llama3", "Whose turn markers the target's chat template writes; says which tokens are the assistant's.",
        "regenerate", "dataset")
    attention_backend: Literal["flex_attention", "sdpa"] = _p(
        "flex_attention", "Attention of the draft; on CPU flex_attention runs as sdpa (same values).", "train")
    tp_size: int = _p(1, "Tensor parallelism of the target model.", "regenerate", "train", ge=1)
    dp_size: int = _p(1, "Data parallelism; 1: derived from nodes, GPUs and tp_size.", "train", ge=1)
    draft_global_batch_size: int = _p(
        8, "Conversations per optimizer step, over all processes.", "train", unit="conversations", ge=1)
    draft_micro_batch_size: int = _p(
        1, "Conversations per process in one forward pass of the draft.", "train", unit="conversations", ge=1)
    draft_accumulation_steps: int = _p(
        1, "Forward passes per optimizer step; 1: derived from the other batch parameters.", "train", ge=1)
    log_steps: int = _p(50, "Steps between two log lines.", "train", unit="steps", ge=1)
    eval_interval: int = _p(1, "Epochs between two validations.", "train", unit="epochs", ge=1)
    save_interval: int = _p(
        1, "Epochs between two checkpoints; the last is always saved.", "train", unit="epochs", ge=1)
    seed: int = _p(
        0, "Same seed, data and world size: same losses.", "regenerate", "train", "evaluate", ge=0, le=LARGEST_SEED)
    total_steps: int = _p(
        0, "Training stops there, and the schedule decays over it; 0: what num_epochs comes to.",
        "train", unit="steps", ge=0)
    dist_timeout: int = _p(20, "Time-out of collective communication.", "train", unit="minutes", ge=1)
    resume: Literal["true", "false"] = _p(
        "false", "Continue from the last complete checkpoint of this output.", "train")
    resume_from_checkpoint: Text = _p(
        "", "With resume=true and no checkpoint in the output: resume from here. With resume=false: start from its "
        "weights.", "train", kind="uri_folder")
    build_dataset_num_proc: int = _p(
        96, "Processes that build the data set; lowered to the cores there are.", "dataset", ge=1)
    compute_model_import: NoQuoting = _p(
        "serverless", "`serverless` uses the instance type; any other name is a named compute.", "import")
    compute_draft_model_training: NoQuoting = _p(
        "serverless", "`serverless` uses the instance type; any other name is a named compute.", "train")

    # Additions of ours.
    storage_uri: Text = _p(
        "", "Folder (s3:// or a path) under which the stages of this run write; not given: KFP's pipeline root.",
        kind="uri_folder")
    max_rejected_fraction: float = _p(
        0.01, "More unusable lines than this share of a data file stop the run.", "regenerate", "dataset",
        ge=0, le=1)
    compute_dtype: Literal["bfloat16", "float32"] = _p(
        "bfloat16", "Type that training computes in; master weights and reductions are float32 always.", "train")
    num_speculative_tokens: int = _p(
        3, "Tokens the draft proposes per step of the target.", "train", "evaluate", unit="tokens", ge=1, le=16)
    evaluation_conversations: int = _p(
        40, "Validation conversations that the evaluation decodes; 0: all.", "evaluate", unit="conversations", ge=0)
    evaluation_max_new_tokens: int = _p(
        128, "Longest reply that the evaluation decodes.", "evaluate", unit="tokens", ge=1)
    evaluation_prompts: Text = _p(
        "", "Prompts to decode: a JSONL file, or benchmarks of mt-bench, gsm8k, humaneval, alpaca, cnn-dm with commas "
        "between; not given: those of the validation split.", "evaluate")
    evaluation_temperature: float = _p(
        0.0, "Decode also by sampling at this temperature; 0: greedy alone.", "evaluate", ge=0)
    register_model_name: Text = _p(
        "", "Name under which the draft is registered in MLflow, where tracking is set up; not given: it is not.",
        "evaluate")
    training_backend: Literal["auto", "pytorchjob", "trainjob", "local"] = _p(
        "auto", "What runs the stages: PyTorchJobs, TrainJobs, or the steps themselves (local); auto: on a cluster "
        "PyTorchJobs where that kind is installed, else TrainJobs; elsewhere local.", "train")
    training_attempts: int = _p(
        3, "Times that each stage's job is started when machines fail it; a training goes on from its newest "
        "checkpoint.", "train", ge=1)
    queue_limit: int = _p(1440, "Longest wait of each stage's job in a queue.", "train", unit="minutes", ge=1)
    start_limit: int = _p(
        60, "Longest time from there until all pods of the job run.", "train", unit="minutes", ge=1)
    run_limit: int = _p(2880, "Longest time that each stage's job may run.", "train", unit="minutes", ge=1)
    compute_map: Text = _p(
        "", "ConfigMap, or JSON file, of instance types and named computes of all jobs; not given: the built-in map.",
        "train")
    object_store_secret: SecretName = _p(
        "mlpipeline-minio-artifact", "Secret with the object store's keys (accesskey, secretkey); where no Secret has "
        "that name, the pods' own role counts.", "train")
    keep_checkpoints: int = _p(
        0, "Newest checkpoints that stay in the output; 0: all.", "train", unit="checkpoints", ge=0)
    final_checkpoint: Literal["last", "best"] = _p(
        "last", "Which checkpoint becomes `final`; best: of the highest simulated acceptance length on the validation "
        "split, which then stays.", "train")
    checkpoint_path: Text = _p(
        "", "Folder (s3:// or a path) that several runs share, one at a time: checkpoints go there, and resume=true "
        "looks there; not given: the run's own output.", "train", kind="uri_folder")
    mlflow_tracking_uri: TrackingServer = _p(
        "", "MLflow server on which the stages are tracked, and that keeps a target named models:/; not given: "
        "MLFLOW_TRACKING_URI, which KFP's MLflow plugin sets.", *STAGES)
    evaluation_engine: Literal["auto", "vllm", "sglang", "transformers"] = _p(
        "auto", "What the evaluation decodes with; auto: vLLM where it can be imported, else our own decoder on "
        "transformers.", "evaluate")
    evaluation_batch_sizes: BatchSizes = _p(
        "1,4,16,64", "Requests at once at which an engine's throughput is timed, with commas between; not given: it is "
        "not timed.", "evaluate")
    compute_evaluation: NoQuoting = _p(
        "", "Compute of the evaluation, as compute_draft_model_training; not given: the training's.", "evaluate")
    instance_type_evaluation: Text = _p(
        "", "Instance type of the evaluation, as instance_type_draft_model_training; not given: the training's.",
        "evaluate")
    number_of_gpu_to_use_evaluation: int = _p(
        0, "GPUs of the evaluation, over which the target is split; 0: as many as a node of the training.", "evaluate",
        ge=0)
    draft_architecture: Literal["eagle3", "eagle3.1", "dflash", "dspark"] = _p(
        "eagle3", "Family of the draft: which one when is in docs/drafts.md.", "dataset", "train")
    draft_loss: Literal["default", "kl", "lk", "tv"] = _p(
        "default", "Loss per position: divergence from the target (kl; default of EAGLE-3), the rejection itself (lk), "
        "total variation (tv; default of DFlash and DSpark).", "train")
    draft_optimizer: Literal["adamw", "muon"] = _p(
        "adamw", "Optimizer; muon: Muon for the matrices of the draft's layers, AdamW for head and norms: more "
        "accepted tokens from the same data, at more time per step.", "train")
    learning_rate_floor: float = _p(
        0.0, "Share of the peak rate that the cosine ends at.", "train", ge=0, le=1)
    momentum: float = _p(
        0.9, "Muon's momentum and AdamW's first beta; 0.5 gives more accepted tokens in trainings of some hundred "
        "steps.", "train", ge=0, le=0.999)
    regenerate_answers: Literal["off", "train", "all"] = _p(
        "off", "Replace the assistants' turns of the training data, or of the validation data too, by the target's own "
        "answers.", "regenerate")
    regenerate_temperature: float = _p(
        -1.0, "Sampling temperature of regenerated answers; 0: greedy; -1: the target's generation_config.",
        "regenerate", ge=-1)
    regenerate_max_new_tokens: int = _p(
        1024, "Longest regenerated answer.", "regenerate", unit="tokens", ge=1)
    regenerate_samples_per_prompt: int = _p(
        1, "Regenerated conversations per conversation.", "regenerate", ge=1)
    regenerate_limit: int = _p(
        0, "Regenerate only so many conversations of a split, the first ones; 0: all.", "regenerate",
        unit="conversations", ge=0)
    # fmt: on

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Blocks of YAML end in a line break, which is no part of a URI; and its `true` is the contract's word."""
        values = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
        return {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}

    def of_stage(self, stage: Stage) -> dict[str, Any]:
        """The values of the parameters that one stage reads, by name."""
        return {parameter.name: getattr(self, parameter.name) for parameter in parameters_of(stage)}

    @property
    def world_size(self) -> int:
        """Processes of the training job, over all nodes."""
        return self.num_nodes_draft_model_training * self.number_of_gpu_to_use_draft_model_training

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per process and optimizer step."""
        return self.draft_global_batch_size // (self.world_size * self.draft_micro_batch_size)


CONTRACT_SIZE = 35
REMOVED = {
    "dataset_pods": "one pod builds the data set now, with build_dataset_num_proc processes",
    "evaluation_tree": "the evaluation decodes chains, as vLLM and SGLang serve them",
}
"""Parameters of earlier versions, and why they are gone."""


@dataclass(frozen=True)
class Parameter:
    """What is known of one parameter, for a form, an option or a table."""

    name: str
    type: type  # str, int or float
    kind: str  # the hosted contract's name of the type (uri_file, custom_model, ...), else the plain one
    default: Any
    choices: tuple[str, ...]  # the only allowed words; empty where any value of the type is allowed
    allowed: str  # values in words; empty where there is no limit
    unit: str  # what an integer counts
    help: str  # one sentence
    stages: tuple[Stage, ...]  # that read it
    addition: bool  # whether it is ours, beyond the contract

    @property
    def description(self) -> str:
        """The sentence with unit and allowed values."""
        unit = f" Unit: {self.unit}." if self.unit else ""
        return f"{self.help}{unit}{f' Allowed: {self.allowed}.' if self.allowed else ''}"


def _record(index: int, name: str) -> Parameter:
    field = Parameters.model_fields[name]
    extra: dict[str, Any] = dict(field.json_schema_extra)  # type: ignore[arg-type]
    annotation = field.annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    python_type: type = annotation if annotation in (int, float) else str  # type: ignore[assignment]
    limits = {key: getattr(limit, key) for limit in field.metadata for key in ("ge", "gt", "le") if hasattr(limit, key)}
    checks = [item.func for item in field.metadata if isinstance(item, AfterValidator)]
    allowed = ", ".join(choices or [_ALLOWED[check] for check in checks if check in _ALLOWED])
    if "ge" in limits and "le" in limits:
        allowed = f"{limits['ge']}..{limits['le']}"
    elif name == "total_steps":
        allowed = ">= 1, or 0 for not given"
    elif limits:
        allowed = " ".join(f"{'>=' if key == 'ge' else '>'} {limit}" for key, limit in limits.items())
    kind = extra["kind"] or {str: "string", int: "integer", float: "number"}[python_type]
    return Parameter(
        name, python_type, kind, field.default, choices, allowed, extra["unit"], field.description or "",
        tuple(extra["stages"]), index >= CONTRACT_SIZE,
    )  # fmt: skip


PARAMETERS: tuple[Parameter, ...] = tuple(_record(i, name) for i, name in enumerate(Parameters.model_fields))


def parameters_of(stage: Stage) -> tuple[Parameter, ...]:
    """The parameters that one stage reads, in the contract's order."""
    return tuple(parameter for parameter in PARAMETERS if stage in parameter.stages)
