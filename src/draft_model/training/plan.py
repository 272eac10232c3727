"""Memory, time and network of a training on paper, from the target's config.json and a few numbers of the cluster.

Nothing is loaded: parameters are counted on a model without storage. docs/scaling.md derives the formulas, says which
of them were measured, and shows the tables that this module makes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters

if TYPE_CHECKING:
    from draft_model.drafts.eagle3.config import DraftConfig

GIGA = 1e9
RUNTIME_BYTES = 2.0 * GIGA
"""CUDA context, libraries' workspaces and NCCL's buffers of one process; an allowance, not a measurement."""


@dataclass(frozen=True)
class Cluster:
    """What the arithmetic is told of the machines.

    Attributes:
        memory: of a GPU, bytes.
        peak: of a GPU in the compute type, FLOP/s.
        share: of the peak that a training step reaches.
        network: between two nodes, bytes/s for each GPU.
    """

    memory: float
    peak: float
    share: float
    network: float


@dataclass(frozen=True)
class Workload:
    """What the arithmetic is told of the data.

    Attributes:
        tokens: of a conversation on average.
        supervised: share of them that is the assistant's.
    """

    tokens: float
    supervised: float


@dataclass(frozen=True)
class Target:
    """Sizes of the frozen target.

    Attributes:
        layers: parameters of the decoder layers, which tp_size spreads.
        whole: of embedding and head, which every process holds.
        active: of those that a token passes, without the embedding's.
        depth: decoder layers.
        intermediate: width that a token's feed-forward has at once.
    """

    layers: int
    whole: int
    active: int
    depth: int
    intermediate: int


@dataclass(frozen=True)
class Plan:
    """A training on paper.

    Attributes:
        memory: bytes of one GPU by what takes them.
        flops: of one token, target and draft, forward and backward.
        seconds_per_million: tokens, on the whole cluster.
        step_tokens: tokens of an optimizer step.
        step_seconds: of one.
        reduction: bytes that each GPU sends per step for the gradients.
        tensor_parallel: bytes that each GPU sends per step for the target in parts.
        gathered: bytes that each GPU gets per step of a target that is spread over the copies; 0 where it is not.
        checkpoint: bytes of one in the store.
        fits: whether the memory is enough.
    """

    memory: dict[str, float]
    flops: float
    seconds_per_million: float
    step_tokens: float
    step_seconds: float
    reduction: float
    tensor_parallel: float
    gathered: float
    checkpoint: float
    fits: bool

    @property
    def target_memory(self) -> float:
        """Bytes of a GPU for the target's weights."""
        weights = ("target, layers", "target, gathered", "target, embedding")
        return sum(size for name, size in self.memory.items() if name.startswith(weights))

    @property
    def draft_memory(self) -> float:
        """Bytes of a GPU for the draft's weights, gradients and moments."""
        return sum(size for name, size in self.memory.items() if name.startswith("draft, weights"))


def sizes_of(config: Mapping[str, Any]) -> Target:
    """Counts a target's parameters, exactly and without loading one.

    Args:
        config: its config.json.

    Raises:
        DraftModelError: where transformers does not know such a model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        given = dict(config)
        known = AutoConfig.for_model(given.pop("model_type"), **given)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(known)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DraftModelError(f"config: transformers builds no text-generation model from it: {error}") from error
    text = known.get_text_config()
    layers = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    chosen = getattr(text, "num_experts_per_tok", None) or count
    wide = getattr(text, "moe_intermediate_size", None)
    return Target(
        layers=layers,
        whole=sum(ends.values()),
        active=int(layers - experts * (1 - chosen / count)),
        depth=text.num_hidden_layers,
        intermediate=wide * chosen if experts and wide else text.intermediate_size,
    )


def draft_parameters(draft: DraftConfig) -> int:
    """Parameters of a draft that are trained."""
    hidden, heads = draft.hidden_size, _heads(draft)
    layer = 2 * hidden * (heads[0] + 2 * heads[1]) + heads[0] * hidden + 3 * hidden * draft.intermediate_size
    return 3 * hidden * hidden + layer + 4 * hidden + draft.draft_vocab_size * hidden


def _heads(draft: DraftConfig) -> tuple[int, int]:
    return draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim


def make_plan(
    config: Mapping[str, Any], draft: DraftConfig, p: Parameters, cluster: Cluster, workload: Workload
) -> Plan:
    """Works a training out.

    Args:
        config: the target's config.json.
        draft: the draft's shape.
        p: of the run; tp_size, the batch sizes, max_length, ttt_length and compute_dtype count.
        cluster: the machines.
        workload: the data.
    """
    target, world, tp = sizes_of(config), p.world_size, p.tp_size
    dp, width = world // tp, _width(p)
    beside = _beside(target, draft, p, workload.supervised)
    layers = width * target.layers / tp
    whole = float(width * target.whole)
    copies = {"target, layers / tp_size": layers, "target, embedding and head": whole}
    spread = dp > 1 and sum(copies.values()) + sum(beside.values()) > cluster.memory
    if spread:
        in_parts = {"target, layers / (tp_size x dp_size)": layers / dp, "target, gathered": 2 * layers / target.depth}
        copies = {**in_parts, "target, embedding and head": whole}
    memory = {**copies, **beside}
    passes = math.ceil(p.draft_global_batch_size / dp / p.training_batch_size)
    gathered = passes * layers * (dp - 1) / dp if spread else 0.0
    flops = _flops_per_token(target, draft, p, workload)
    speed = world * cluster.peak * cluster.share / flops  # tokens/s
    step_tokens = p.draft_global_batch_size * workload.tokens
    messages = 2 * target.depth * draft.hidden_size * width * step_tokens / (world / tp)
    reduction = 2 * (world - 1) / world * 4 * draft_parameters(draft)
    return Plan(
        memory=memory,
        flops=flops,
        seconds_per_million=1e6 / speed,
        step_tokens=step_tokens,
        step_seconds=step_tokens / speed + (reduction + gathered) / cluster.network,
        reduction=reduction,
        tensor_parallel=messages * 2 * (tp - 1) / tp,
        gathered=gathered,
        checkpoint=14.0 * draft_parameters(draft),
        fits=sum(memory.values()) <= cluster.memory,
    )


def _width(p: Parameters) -> int:
    return 2 if p.compute_dtype == "bfloat16" else 4


def _beside(target: Target, draft: DraftConfig, p: Parameters, supervised: float) -> dict[str, float]:
    """Bytes of a GPU besides the target's weights."""
    width, parameters = _width(p), draft_parameters(draft)
    return {
        "target, one forward pass": float(_forward_bytes(target, draft, p, width)),
        "its states": float(p.max_length * 4 * draft.hidden_size * width)
        * (p.training_batch_size + p.draft_micro_batch_size),
        "draft, weights, gradients and moments in float32": 16.0 * parameters,
        "draft, weights in the compute type": float(width * parameters),
        "draft, activations of a micro-batch": _activation_bytes(draft, p, width, supervised),
        "draft, logits of a chunk": _logit_bytes(draft, p, width),
        "CUDA and NCCL": RUNTIME_BYTES,
    }


def beside_target(folder: Path, draft: DraftConfig, p: Parameters, longest: int) -> float:
    """What a training needs of each GPU besides the target's weights, every token supervised.

    Args:
        folder: of the target.
        draft: the draft's shape.
        p: of the run.
        longest: tokens of the longest conversation.

    Returns:
        Bytes.
    """
    target = sizes_of(read_config(str(folder)))
    return sum(_beside(target, draft, p.model_copy(update={"max_length": longest}), supervised=1.0).values())


def _forward_bytes(target: Target, draft: DraftConfig, p: Parameters, width: int) -> int:
    """Nothing is kept for a backward pass: residual stream, features, and one layer's largest tensors."""
    per_token = 8 * draft.hidden_size + (3 * target.intermediate + 2 * sum(_heads(draft))) // p.tp_size
    return int(p.training_batch_size * p.max_length * per_token * width)


def activation_numbers(draft: DraftConfig, steps: int) -> tuple[float, float]:
    """Numbers that autograd keeps: of each token, and of each supervised position over all unroll steps.

    Fitted to what autograd kept on nine small shapes; a test holds them against it.
    """
    queries, keys = _heads(draft)
    token = 5 * draft.hidden_size + 5 * queries + 3 * keys
    return token, steps * (4 * draft.hidden_size + 1.3 * queries + 2 * keys + 2 * draft.intermediate_size)


def _activation_bytes(draft: DraftConfig, p: Parameters, width: int, supervised: float) -> float:
    token, row = activation_numbers(draft, p.ttt_length)
    return p.draft_micro_batch_size * p.max_length * (token + supervised * row) * width


def _logit_bytes(draft: DraftConfig, p: Parameters, width: int) -> float:
    """The head's gradient, and logits and softmax of as many positions as the objective takes at once."""
    from draft_model.drafts.eagle3.objective import CHUNK_ROWS

    rows = CHUNK_ROWS["cuda"]
    logits = rows * (draft.vocab_size * width + draft.draft_vocab_size * (2 * width + 8))
    return 4.0 * draft.draft_vocab_size * draft.hidden_size + logits


def _flops_per_token(target: Target, draft: DraftConfig, p: Parameters, workload: Workload) -> float:
    """Two for each multiply-add; the draft's backward pass costs twice its forward pass."""
    hidden, (queries, keys) = draft.hidden_size, _heads(draft)
    attention = 2 * workload.tokens * queries  # causal: half of 4 x tokens x queries
    projections = (queries + 2 * keys) * hidden
    layer = projections + queries * hidden + 3 * hidden * draft.intermediate_size
    once = 6 * (3 * hidden * hidden + projections)
    per_row = 6 * (layer + draft.draft_vocab_size * hidden) + 3 * attention
    teacher = 2 * draft.vocab_size * hidden
    forward = 2 * target.active + target.depth * attention
    return forward + once + workload.supervised * (p.ttt_length * per_row + teacher)


def read_config(path: str) -> dict[str, Any]:
    """Reads a target's configuration.

    Args:
        path: its config.json, or the folder that it is in.

    Raises:
        DraftModelError: where there is none, or it is no JSON object.
    """
    from draft_model import storage

    uri = path if path.endswith(".json") else storage.join(path, "config.json")
    try:
        config = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise DraftModelError(f"config: {uri} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DraftModelError(f"config: {uri} holds no JSON object")
    return config


def draft_of(config: Mapping[str, Any], p: Parameters) -> DraftConfig:
    """The draft's shape, as a training would have it.

    Args:
        config: the target's.
        p: of the run; draft_model_config counts.

    Raises:
        DraftModelError: where the two do not fit.
    """
    from draft_model import storage
    from draft_model.drafts.eagle3.config import draft_config_for, with_overrides

    default = draft_config_for(config)
    if not p.draft_model_config:
        return default
    return with_overrides(default, json.loads(storage.read_bytes(p.draft_model_config)))


def rows_of(plan: Plan, p: Parameters, cluster: Cluster) -> list[tuple[str, str]]:
    """The plan in words, a line each."""
    total = sum(plan.memory.values())
    wire = plan.reduction / cluster.network
    verdict = "fits" if plan.fits else "does NOT fit: raise tp_size, or lower the batch sizes or max_length"
    return [
        *((name, f"{_bytes(size)}") for name, size in plan.memory.items()),
        ("memory of each GPU", f"{_bytes(total)} of {_bytes(cluster.memory)}: {verdict}"),
        ("layout", f"{p.world_size} processes = tp {p.tp_size} x dp {p.world_size // p.tp_size}; "
                   f"{p.draft_global_batch_size} conversations per step = {p.world_size} x micro "
                   f"{p.draft_micro_batch_size} x accumulation {p.accumulation_steps}"),
        ("work", f"{plan.flops / GIGA:.1f} GFLOP per token"),
        ("time", f"{plan.seconds_per_million:.0f} s per million tokens at {cluster.share:.0%} of "
                 f"{cluster.peak / 1e12:.0f} TFLOP/s; a step of {plan.step_tokens:,.0f} tokens: "
                 f"{plan.step_seconds:.1f} s"),
        ("gradients", f"{_bytes(plan.reduction)} from each GPU per step, {wire:.2f} s at "
                      f"{_bytes(cluster.network)}/s ({wire / plan.step_seconds:.0%} of the step)"),
        ("target in parts", f"{_bytes(plan.tensor_parallel)} from each GPU per step, inside a node"),
        *([("target's layers", f"{_bytes(plan.gathered)} to each GPU per step, for copies would not fit: FSDP")]
          if plan.gathered else []),
        ("object store", f"{_bytes(plan.checkpoint)} per checkpoint"),
    ]  # fmt: skip


def _bytes(size: float) -> str:
    return f"{size / GIGA:.1f} GB" if size >= 0.05 * GIGA else f"{size / 1e6:.1f} MB"


RECOMMENDED: tuple[tuple[str, dict[str, int]], ...] = (
    ("llama-3.1-8b", {"gpus": 1, "tp": 1, "pass": 1, "micro": 1, "batch": 8}),
    ("llama-3.1-8b", {"gpus": 8, "tp": 1, "pass": 2, "micro": 2, "batch": 64}),
    ("llama-3.1-8b", {"gpus": 8, "tp": 1, "pass": 8, "micro": 8, "batch": 64}),
    ("llama-3.3-70b", {"gpus": 8, "tp": 2, "pass": 4, "micro": 1, "batch": 64}),
    ("llama-3.3-70b", {"gpus": 8, "tp": 4, "pass": 1, "micro": 1, "batch": 64}),
    ("llama-3.3-70b", {"gpus": 8, "tp": 8, "pass": 2, "micro": 2, "batch": 64}),
    ("qwen3-235b-a22b", {"gpus": 4, "tp": 4, "pass": 1, "micro": 1, "batch": 64}),
    ("qwen3-235b-a22b", {"gpus": 8, "tp": 4, "pass": 4, "micro": 1, "batch": 64}),
    ("qwen3-235b-a22b", {"gpus": 16, "tp": 4, "pass": 8, "micro": 2, "batch": 64}),
)
"""Targets and layouts of the table in docs/scaling.md."""


def table_of(targets: Path, cluster: Cluster, workload: Workload) -> str:
    """The table in docs/scaling.md: layouts of some targets, worked out.

    Args:
        targets: folder of their configurations.
        cluster: the machines.
        workload: the data.
    """
    lines = [
        "| target | GPUs | tp_size | pass | micro-batch | conversations | target | draft | activations, states | "
        "of each GPU | 1 M tokens | gradients per step | layers gathered per step | checkpoint |",
        "|" + 14 * "---|",
    ]
    for name, layout in RECOMMENDED:
        config = read_config(str(targets / f"{name}.json"))
        p = Parameters(
            number_of_gpu_to_use_draft_model_training=layout["gpus"], tp_size=layout["tp"],
            draft_micro_batch_size=layout["micro"], training_batch_size=layout["pass"],
            draft_global_batch_size=layout["batch"],
        )  # fmt: skip
        made = make_plan(config, draft_of(config, p), p, cluster, workload)
        of_target, of_draft, total = made.target_memory, made.draft_memory, sum(made.memory.values())
        cells = [
            name,
            *layout.values(),
            _bytes(of_target) + (", spread" if made.gathered else ""),
            _bytes(of_draft),
            _bytes(total - of_target - of_draft),
            f"**{_bytes(total)}**" if made.fits else f"{_bytes(total)}, too much",
            f"{1e6 / made.step_tokens * made.step_seconds:.0f} s",
            *map(_bytes, (made.reduction, made.gathered, made.checkpoint)),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
