"""A training on paper: memory, time, network, and the acceptance length to expect.

Nothing is loaded: parameters are counted on a model without storage, and the draft's family says what a draft costs.
docs/scaling.md derives the formulas and says which of them were measured.

Acceptance: the chance p that the next proposal is kept grows with the logarithm of the supervised tokens, epochs
counted, and 1 + p + p^2 + ... + p^K is the acceptance length of K proposals. Up to 0.4 million tokens the points were
measured with the demo's target (benchmarks/recipe.py); beyond, they are published ones of 8B to 20B targets: 1.89 after
5,000 conversations of the target's own answers (1.45 to 1.49 on others' answers), and 2.26 to 2.60 on MT-bench after
some 500,000.
"""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_model import drafts
from draft_model.errors import DraftModelError

if TYPE_CHECKING:
    from draft_model.drafts.base import Costs, Shape
    from draft_model.parameters import Parameters

GIGA = 1e9
RUNTIME_BYTES = 2.0 * GIGA
"""CUDA context, libraries' workspaces and NCCL's buffers of one process; an allowance, not a measurement."""
STATE_BYTES = 14.0
"""Of a checkpoint for each of the draft's parameters: float32 weights, two moments, weights to serve in bfloat16."""

POINTS = ((1e4, 0.17), (4e4, 0.32), (1e5, 0.44), (2e5, 0.49), (4e5, 0.52), (2.5e6, 0.56), (2.5e8, 0.68))
"""Supervised tokens and p."""
SPREAD = 0.08  # of p, between recipes, targets and kinds of conversation
FOREIGN = 0.20  # what p loses where the answers are not the target's own


@dataclass(frozen=True)
class Cluster:
    """The machines."""

    memory: float  # of a GPU, bytes
    peak: float  # of a GPU in the compute type, FLOP/s
    share: float  # of the peak that a training step reaches
    network: float  # between two nodes, bytes/s for each GPU


@dataclass(frozen=True)
class Workload:
    """The data."""

    tokens: float  # of a conversation on average
    supervised: float  # share of them that is the assistant's


@dataclass(frozen=True)
class TargetSizes:
    """Sizes of the frozen target; the first three count parameters."""

    layers: int  # of the decoder layers, which tp_size spreads
    whole: int  # of embedding and head, which every process holds
    active: int  # of those that a token passes, without the embedding's
    depth: int  # decoder layers
    intermediate: int  # width that a token's feed-forward has at once
    hidden: int  # width of the residual stream
    queries: int  # width of all query heads
    keys: int  # width of all key heads


@dataclass(frozen=True)
class Plan:
    """A training on paper."""

    memory: dict[str, float]  # bytes of one GPU by what takes them
    flops: float  # of one token, target and draft, forward and backward
    seconds_per_million: float  # tokens, on the whole cluster
    step_tokens: float  # of an optimizer step
    step_seconds: float
    reduction: float  # bytes that each GPU sends per step for the gradients
    tensor_parallel: float  # bytes that each GPU sends per step for the target in parts
    gathered: float  # bytes that each GPU gets per step of a target that is spread over the copies; 0 where it is not
    checkpoint: float  # bytes of one in the store
    fits: bool  # whether the memory is enough


def sizes_of(config: Mapping[str, Any]) -> TargetSizes:
    """Counts the parameters of a target, given its config.json, exactly and without loading one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        given = dict(config)
        known = AutoConfig.for_model(given.pop("model_type"), **given)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(known)
    except Exception as error:  # a configuration may make transformers raise anything
        raise DraftModelError(f"config: transformers builds no text-generation model from it: {error}") from error
    text = known.get_text_config()
    layers = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    named = (getattr(text, name, None) for name in ("num_experts", "num_local_experts"))
    count = next((each for each in named if type(each) is int and each > 0), 1)
    chosen = getattr(text, "num_experts_per_tok", None) or count
    wide = getattr(text, "moe_intermediate_size", None)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return TargetSizes(
        layers=layers,
        whole=sum(ends.values()),
        active=int(layers - experts * (1 - chosen / count)),
        depth=text.num_hidden_layers,
        intermediate=wide * chosen if experts and wide else text.intermediate_size,
        hidden=text.hidden_size,
        queries=heads * head_dim,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
    )


def make_plan(config: Mapping[str, Any], shape: Shape, p: Parameters, cluster: Cluster, workload: Workload) -> Plan:
    """Works a training out, from the target's config.json, the draft's shape and the run's parameters."""
    target, costs = sizes_of(config), drafts.family(shape.family).costs(shape, p.ttt_length)
    world, tp, width = p.world_size, p.tp_size, _WIDTHS[p.compute_dtype]
    dp = world // tp
    beside = _beside(target, shape, costs, p, workload.supervised, cluster.memory)
    layers = width * target.layers / tp
    whole = {"target, embedding and head": float(width * target.whole)}
    copies = {"target, layers / tp_size": layers, **whole}
    spread = dp > 1 and sum(copies.values()) + sum(beside.values()) > cluster.memory
    if spread:
        gathering = 2 * layers / target.depth
        copies = {"target, layers / (tp_size x dp_size)": layers / dp, "target, gathered": gathering, **whole}
    memory = {**copies, **beside}
    passes = math.ceil(p.draft_global_batch_size / dp / p.training_batch_size)
    gathered = passes * layers * (dp - 1) / dp if spread else 0.0
    # Two FLOP for each multiply-add; attention is causal: half of 4 x tokens x queries.
    forward = 2 * target.active + target.depth * 2 * workload.tokens * target.queries
    teacher = 2 * shape.vocab_size * shape.hidden_size
    flops = forward + costs.token_flops + workload.supervised * (costs.row_flops(workload.tokens) + teacher)
    speed = world * cluster.peak * cluster.share / flops  # tokens/s
    step_tokens = p.draft_global_batch_size * workload.tokens
    messages = 2 * target.depth * target.hidden * width * step_tokens / dp
    reduction = 2 * (world - 1) / world * 4 * costs.parameters
    return Plan(
        memory=memory,
        flops=flops,
        seconds_per_million=1e6 / speed,
        step_tokens=step_tokens,
        step_seconds=step_tokens / speed + (reduction + gathered) / cluster.network,
        reduction=reduction,
        tensor_parallel=messages * 2 * (tp - 1) / tp,
        gathered=gathered,
        checkpoint=STATE_BYTES * costs.parameters,
        fits=sum(memory.values()) <= cluster.memory,
    )


_WIDTHS = {"bfloat16": 2, "float32": 4}  # bytes of a number by compute_dtype


def _beside(
    target: TargetSizes, shape: Shape, costs: Costs, p: Parameters, supervised: float, memory: float
) -> dict[str, float]:  # fmt: skip
    """Bytes besides the target's weights, of a GPU that has `memory`."""
    width, micro = _WIDTHS[p.compute_dtype], p.draft_micro_batch_size
    states = (len(shape.aux_layers) + 1) * shape.hidden_size
    # Nothing is kept for a backward pass: residual stream, features, and one layer's largest tensors.
    per_token = 8 * target.hidden + (3 * target.intermediate + 2 * (target.queries + target.keys)) // p.tp_size
    number = micro * p.max_length * supervised * width
    activations = costs.token_numbers + supervised * costs.row_numbers(number, memory)
    return {
        "target, one forward pass": float(p.training_batch_size * p.max_length * per_token * width),
        "its states": float(p.max_length * states * width) * (p.training_batch_size + micro),
        "draft, weights, gradients and moments in float32": 16.0 * costs.parameters,
        "draft, weights in the compute type": float(width * costs.parameters),
        "draft, activations of a micro-batch": micro * p.max_length * activations * width,
        "draft, logits of a chunk": costs.chunk_bytes(width),
        "CUDA and NCCL": RUNTIME_BYTES,
    }


def beside_target(folder: Path, shape: Shape, p: Parameters, longest: int, memory: float) -> float:
    """Bytes that a training needs of each GPU (of `memory` bytes) besides the target's weights.

    Every token of its longest conversation is taken as supervised.
    """
    costs = drafts.family(shape.family).costs(shape, p.ttt_length)
    p = p.model_copy(update={"max_length": longest})
    return sum(_beside(sizes_of(read_config(str(folder))), shape, costs, p, 1.0, memory).values())


def read_config(path: str, parameter: str = "config") -> dict[str, Any]:
    """Reads a JSON file, or for a target (`config`) the config.json of a folder; errors name the parameter."""
    from draft_model import storage

    uri = path if path.endswith(".json") or parameter != "config" else storage.join(path, "config.json")
    try:
        config = json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise DraftModelError(f"{parameter}: {uri} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DraftModelError(f"{parameter}: {uri} holds no JSON object")
    return config


def draft_of(config: Mapping[str, Any], p: Parameters) -> Shape:
    """The draft's shape: the default for the target's configuration, with draft_model_config over it."""
    family = drafts.family(p.draft_architecture)
    shape: Shape = family.default_shape(config, p.num_speculative_tokens)
    if p.draft_model_config:
        shape = family.adapt(shape, read_config(p.draft_model_config, "draft_model_config"))
    return shape


def context_problem(config: Mapping[str, Any], max_length: int) -> str:
    """One sentence where the target cannot read conversations of max_length tokens; empty where it can."""
    limit = (config.get("text_config") or config).get("max_position_embeddings") or max_length
    if max_length <= limit:
        return ""
    return (
        f"max_length: given {max_length}, but the target's max_position_embeddings is {limit}: beyond it the target "
        f"predicts badly and engines serve nothing; use at most {limit}"
    )


def rows_of(plan: Plan, p: Parameters, cluster: Cluster) -> list[tuple[str, str]]:
    """The plan in words, a line each."""
    total = sum(plan.memory.values())
    wire = plan.reduction / cluster.network
    verdict = "fits" if plan.fits else "does NOT fit: raise tp_size, or lower the batch sizes or max_length"
    return [
        *((name, f"{bytes_in_words(size)}") for name, size in plan.memory.items()),
        ("memory of each GPU", f"{bytes_in_words(total)} of {bytes_in_words(cluster.memory)}: {verdict}"),
        ("layout", f"{p.world_size} processes = tp {p.tp_size} x dp {p.world_size // p.tp_size}; "
                   f"{p.draft_global_batch_size} conversations per step = {p.world_size} x micro "
                   f"{p.draft_micro_batch_size} x accumulation {p.accumulation_steps}"),
        ("work", f"{plan.flops / GIGA:.1f} GFLOP per token"),
        ("time", f"{plan.seconds_per_million:.0f} s per million tokens at {cluster.share:.0%} of "
                 f"{cluster.peak / 1e12:.0f} TFLOP/s; a step of {plan.step_tokens:,.0f} tokens: "
                 f"{plan.step_seconds:.1f} s"),
        ("gradients", f"{bytes_in_words(plan.reduction)} from each GPU per step, {wire:.2f} s at "
                      f"{bytes_in_words(cluster.network)}/s ({wire / plan.step_seconds:.0%} of the step)"),
        ("target in parts", f"{bytes_in_words(plan.tensor_parallel)} from each GPU per step, inside a node"),
        *([("target's layers", f"{bytes_in_words(plan.gathered)} to each GPU per step, because copies would not fit: "
                               "FSDP")] if plan.gathered else []),
        ("object store", f"{bytes_in_words(plan.checkpoint)} per checkpoint"),
    ]  # fmt: skip


def bytes_in_words(size: float) -> str:
    """Gigabytes, or megabytes where there are few."""
    return f"{size / GIGA:.1f} GB" if size >= 0.05 * GIGA else f"{size / 1e6:.1f} MB"


def expected_acceptance_length(tokens: float, proposals: int, own_answers: bool = True) -> tuple[float, float]:
    """The range in which the acceptance length on held-out conversations of the same kind should lie.

    It goes by the supervised tokens that the training sees, and by whether the target wrote the answers itself.
    """
    xs, ps = [math.log(x) for x, _ in POINTS], [p for _, p in POINTS]
    at = min(max(math.log(max(tokens, 1)), xs[0]), xs[-1])
    after = min(max(bisect(xs, at), 1), len(xs) - 1)
    share = (at - xs[after - 1]) / (xs[after] - xs[after - 1])
    middle = ps[after - 1] + share * (ps[after] - ps[after - 1]) - (0 if own_answers else FOREIGN)
    low, high = (sum(max(p, 0) ** k for k in range(proposals + 1)) for p in (middle - SPREAD, middle + SPREAD))
    return low, high


def expectation(tokens: float, proposals: int, family: str) -> str:
    """The same in words, for the target's own answers and for others'; what is known is EAGLE-3's."""
    kind = drafts.family(family)
    own, others = (expected_acceptance_length(tokens, proposals, mine) for mine in (True, False))
    millions = f"{float(f'{tokens / 1e6:.2g}'):,g} M"
    return (
        f"{own[0]:.1f} to {own[1]:.1f} with {proposals} proposals after {millions} supervised tokens of the target's "
        f"own answers; {others[0]:.1f} to {others[1]:.1f} where others wrote them"
        + (f" (EAGLE-3's; {kind.title} starts lower)" if "ttt_length" in kind.unused else "")  # proposes a block
    )


def advice(p: Parameters) -> str:
    """Settings that give more accepted tokens for the same data than the contract's defaults; see docs/training.md."""
    wanted = {"draft_optimizer": "muon", "ttt_length": p.num_speculative_tokens}
    unused = drafts.family(p.draft_architecture).unused
    changes = [f"{name}={value}" for name, value in wanted.items() if getattr(p, name) != value and name not in unused]
    shorter = (
        "below a million tokens 1 or 2 conversations per step and learning_rate 0.001; where the time ends before the "
        "conversations do, their first tokens alone (max_length=192)"
    )
    return ", ".join([*changes, "momentum=0.5 in trainings of some hundred steps", shorter])
