"""A target in parts: each process of a tensor-parallel group holds its share of every decoder layer.

transformers shards a model by the plan of its family and reads only a process's own part of each file. Two things
differ from serving. Every process trains on conversations of its own, so embedding and head stay whole: 4 V H bytes
in bfloat16 buy logits without a message. And the groups of a job hold copies of one another, for which transformers
has no option, so the mesh is given to it from here. Copies that are too big are spread by FSDP2, which gathers a layer
when it runs; then all processes run the target equally often.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draft_model.drafts.batch import collate
from draft_model.drafts.kernels import memory_of
from draft_model.errors import DraftModelError
from draft_model.ranks import Ranks, is_a_peers
from draft_model.target.model import Target, check_structure, load_model, load_target

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

_ATTENTION = {**{f"self_attn.{name}_proj": "colwise" for name in "qkv"}, "self_attn.o_proj": "rowwise"}
_SINKS = {"self_attn": "local_params", "self_attn.sinks": "colwise"}
_MLP = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}


class ShardedTarget(Target):
    """A target whose layers are spread over processes; all of them call the same methods in the same order."""

    def __init__(self, model: Any, aux_layers: tuple[int, ...], spread: bool) -> None:
        super().__init__(model, aux_layers)
        self.spread = spread

    @property
    def last_layer(self) -> dict[str, Tensor]:
        """As of a whole target; without experts, which no draft has."""
        kept = {name: tensor for name, tensor in super().last_layer.items() if tensor.dim() < 3}
        return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in kept.items()}


def load_share(
    folder: Path, aux_layers: tuple[int, ...], dtype: torch.dtype, ranks: Ranks, beside: Callable[[float], float]
) -> Target:
    """Loads this process's part of the target: all of it, or its share of every layer where tp_size says so.

    Where copies would not fit beside the draft, their layers are spread over the data-parallel processes as well.
    `beside` gives the bytes that training needs of a GPU (of so many bytes) besides the target.

    Raises:
        DraftModelError: where the model cannot be loaded, or its heads cannot be shared out.
    """
    memory = memory_of(ranks.device)
    if ranks.tp == 1 and memory is None:
        return load_target(folder, aux_layers, dtype, ranks.device)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_heads(config.get_text_config(), ranks.tp)
    with torch.device("meta"):
        skeleton = check_structure(AutoModelForCausalLM.from_config(config, dtype=dtype), aux_layers)
    spread = memory is not None and must_spread(skeleton, ranks.tp, ranks.dp, memory, beside(memory))
    if ranks.tp == 1 and not spread:
        return load_target(folder, aux_layers, dtype, ranks.device)
    if spread:
        check_experts(skeleton, ranks.tp, ranks.dp)
    model = _load_in_parts(folder, dtype, ranks, skeleton, spread)
    target = ShardedTarget(model, aux_layers, spread)
    try:
        target.states(collate([(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))]))
    except RuntimeError as error:
        if is_a_peers(error):
            raise
        # Blocks that reshape by the model's number of heads, and not by what is there.
        raise DraftModelError(f"tp_size: {type(skeleton).__name__} cannot run in parts ({error}): use 1") from error
    return target


def _load_in_parts(folder: Path, dtype: torch.dtype, ranks: Ranks, skeleton: Any, spread: bool) -> Any:
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging as transformers_logging

    cut = {"tp_plan": plan_for(skeleton)} if ranks.tp > 1 else {}
    experts = {"ep_size": ranks.tp, "ep_implementation": "all_reduce"} if _has_experts_apart(skeleton) else {}
    transformers_logging.set_verbosity_error()  # it would name every norm as "not sharded"
    settings = DistributedConfig(tp_size=ranks.tp, **cut, **experts)
    model = load_model(folder, dtype, _on_mesh(type(skeleton), ranks, spread), distributed_config=settings)
    held, whole = (sum(map(_bytes, each.parameters())) for each in (model, skeleton))
    logger.info(
        "target: %.2f of %.2f GB in each of %d processes%s", held / 1e9, whole / 1e9, ranks.tp,
        f"; copies would not fit beside the draft, so their layers are spread over {ranks.dp} (FSDP)" if spread else "",
    )  # fmt: skip
    return model


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # to import DTensor takes seconds
    return local.numel() * local.element_size()


def check_heads(config: Any, tp: int) -> list[int]:
    """The values of tp_size that cut no attention head of a text configuration in two; refuses one that does."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    fits = [size for size in range(1, kv_heads + 1) if kv_heads % size == 0 and heads % size == 0]
    if tp not in fits:
        raise DraftModelError(
            f"tp_size: given {tp}; the target has {heads} attention heads and {kv_heads} key-value heads, which "
            f"tp_size must divide: allowed: {', '.join(map(str, fits))}"
        )
    return fits


def must_spread(model: Any, tp: int, dp: int, memory: float, beside: float) -> bool:
    """Whether copies of a target are too big, so that their layers are to be spread over the dp processes as well.

    The model is on the meta device in the compute type; `memory` is a GPU's, `beside` what training needs of it besides
    the target, bytes.

    Raises:
        DraftModelError: where a GPU could not hold its part in either way; names the smallest tp_size that would do.
    """
    layers = [sum(map(_bytes, layer.parameters())) for layer in model.get_decoder().layers]
    rest = sum(map(_bytes, model.parameters())) - sum(layers)
    copy = rest + sum(layers) / tp
    # Of the spread layers, the one that runs and the next one are gathered.
    least = rest + (sum(layers) / dp + 2 * max(layers)) / tp
    if copy + beside <= memory or (dp == 1 and copy <= memory):
        return False
    if dp > 1 and least <= memory:
        return True
    sizes = check_heads(model.config.get_text_config(), 1)
    fits = [size for size in sizes if rest + sum(layers) / size <= memory]
    none = "no tp_size that divides its heads is enough: use larger or more GPUs"
    advice = f"use {fits[0]} or more" if fits else none
    raise DraftModelError(
        f"tp_size: given {tp}; each GPU would hold {min(copy, least) / 1e9:.1f} GB of the target and has "
        f"{memory / 1e9:.1f} GB: {advice}; `draft-model plan` works it out"
    )


def check_experts(model: Any, tp: int, dp: int) -> None:
    """Refuses to spread a target over dp processes where one would hold none of its experts: it cannot be loaded."""
    apart = tp if _has_experts_apart(model) else 1
    counts = {len(tensor) // apart for tensor in model.get_decoder().layers.parameters() if tensor.dim() == 3}
    for count in counts:
        if -(-count // dp) * (dp - 1) >= count:
            raise DraftModelError(
                f"tp_size: given {tp}; copies of the target do not fit beside the draft, and its {count} experts "
                f"cannot be spread over {dp} data-parallel processes: raise tp_size, or use larger GPUs"
            )


def plan_for(model: Any) -> dict[str, str]:
    """The rules to add to the family's plan: embedding and head whole, and ours where the family has none.

    Raises:
        DraftModelError: where the family has no plan and its blocks have not Llama's names.
    """
    names = {module: name for name, module in model.named_modules()}
    whole = {names[model.get_input_embeddings()]: "replicate", names[model.get_output_embeddings()]: "replicate"}
    decoder = model.get_decoder()
    if _speaks_of_layers(model.tp_plan):
        return whole
    block = decoder.layers[0]
    ours = _ATTENTION | (_SINKS if hasattr(block.self_attn, "sinks") else {})
    ours |= {} if _has_experts_apart(model) else _MLP
    known = {name for names in (block.named_modules(), block.named_parameters()) for name, _ in names}
    if missing := sorted(ours.keys() - known):
        raise DraftModelError(
            f"tp_size: transformers has no tensor-parallel plan for {type(model).__name__}, and its blocks have no "
            f"{', '.join(missing)}: use 1"
        )
    logger.info("%s has no tensor-parallel plan in transformers: its blocks are cut as Llama's", type(model).__name__)
    return whole | {f"{names[decoder]}.layers.*.{rule}": style for rule, style in ours.items()}


def _speaks_of_layers(plan: dict[str, str] | None) -> bool:
    return any(".layers." in f".{rule}" for rule in plan or {})


def _has_experts_apart(model: Any) -> bool:
    """Whether the family has a plan for its experts and none for the rest (gpt-oss)."""
    return _speaks_of_layers(model.ep_plan) and not _speaks_of_layers(model.tp_plan)


def _on_mesh(model_class: Any, ranks: Ranks, spread: bool) -> Any:
    """The model's class, which loads itself onto the processes' mesh, before any weight is read."""
    assert ranks.mesh is not None
    mesh = ranks.mesh

    class Meshes:
        def get_mesh(self, dims: object) -> DeviceMesh:
            return mesh["tp"]

    def prepare(cls: Any, distributed_config: Any, device_map: Any = None) -> tuple[Any, Any, Meshes]:
        return distributed_config, ranks.device, Meshes()

    def distribute(cls: Any, model: Any, distributed_config: Any, mesh_manager: Meshes) -> Any:
        model = model_class.maybe_distribute_model.__func__(cls, model, distributed_config, mesh_manager)
        return _spread(model, mesh["dp"]) if spread else model

    methods = {"prepare_distribute_model": classmethod(prepare), "maybe_distribute_model": classmethod(distribute)}
    return type(model_class.__name__, (model_class,), methods)


def _spread(model: Any, mesh: DeviceMesh) -> Any:
    """Spreads the layers over the copies; embedding and head stay whole, for each process reads its own logits."""
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    of_layers = set(decoder.layers.parameters())
    fully_shard(decoder, mesh=mesh, ignored_params=set(model.parameters()) - of_layers)
    return model
