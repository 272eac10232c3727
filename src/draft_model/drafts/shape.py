"""Sizes and rotary settings of a draft's layers: the target's, changed by the user's or a checkpoint's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from draft_model.drafts.base import Shape
from draft_model.errors import DraftModelError

USER = "draft_model_config"
DEFAULT_DRAFT_VOCAB_SIZE = 32_000
# What engines and trainers write and no engine's Llama layer reads, and what is looked at elsewhere.
_IGNORED = {
    "_name_or_path", "attention_dropout", "auto_map", "bos_token_id", "decoder_sparse_step", "dtype",
    "eagle_aux_hidden_state_layer_ids", "eagle_config",
    "embd_pdrop", "eos_token_id", "initializer_range", "max_window_layers", "mlp_only_layers", "model_type",
    "moe_intermediate_size", "n_routed_experts", "norm_topk_prob", "num_aux_hidden_states",
    "num_experts", "num_experts_per_tok", "num_local_experts", "original_max_position_embeddings",
    "output_router_logits", "pad_token_id", "pretraining_tp", "resid_pdrop", "rope_parameters", "rope_scaling",
    "rope_theta", "router_aux_loss_coef", "shared_expert_intermediate_size", "sliding_window", "target_model_type",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_SIZES = (
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "draft_vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# The draft is trained with its own rotary embedding, so it can do without what engines' Llama layer has no code for:
# sections for images, and Gemma's rotation of a part of the head.
_ROPE_ALIASES = {"su": "longrope", "mrope": "default", "proportional": "default"}
_ROPE_OF_TARGETS = ("mrope_section", "mrope_interleaved", "partial_rotary_factor", "type")
_WIDEST = 16  # times the hidden size: published ones are at most 8 times as wide

Rule = tuple[str, Callable[[Any], bool]]
"""Of a setting: what is allowed, in words, and whether a value is."""
FLAG: Rule = ("true, false", lambda given: type(given) is bool)
POSITIVE: Rule = ("a number > 0", lambda given: type(given) in (int, float) and given > 0)


def only(value: Any, why: str = "") -> Rule:
    """One value."""
    return f"{value!r}{why}", lambda given: given == value


def whole(least: int, most: float = math.inf, why: str = "") -> Rule:
    """A whole number."""
    allowed = f"a whole number >= {least}" + (f", at most {most}" if most < math.inf else "")
    return allowed + why, lambda given: type(given) is int and least <= given <= most


def among(*names: str) -> Rule:
    """A list of nothing but these names."""
    return " or ".join(names), lambda given: isinstance(given, list) and all(name in names for name in given)


@dataclass(frozen=True, kw_only=True)
class LayerShape(Shape):
    """The shape of a draft's decoder layers."""

    intermediate_size: int  # of the SwiGLU
    num_attention_heads: int  # query heads
    num_key_value_heads: int  # key and value heads; divides num_attention_heads
    head_dim: int  # size of a head; need not be H / heads
    rms_norm_eps: float  # of every norm
    rope_parameters: dict[str, Any]  # as transformers 5 writes them (`rope_type`, `rope_theta`, ...), over whole heads
    target_model_type: str  # the target's family; it decides how SGLang counts layers

    def layer_json(self) -> dict[str, Any]:
        """These settings in config.json, the rotary ones also as transformers 4 named them."""
        config = {field.name: getattr(self, field.name) for field in fields(LayerShape) if field.name != "aux_layers"}
        config |= {"attention_bias": False, "dtype": "bfloat16", "hidden_act": "silu", "tie_word_embeddings": False}
        config["rope_theta"] = self.rope_parameters["rope_theta"]
        if self.rope_parameters.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        return config


def _rope_parameters(text: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """A configuration's rotary settings in today's style, for whole heads and for the engines' Llama layer.

    Raises:
        DraftModelError: for a rope type that is not known.
    """
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if rope and all(isinstance(value, Mapping | None) for value in rope.values()):  # one set for each kind of layer
        rope = dict(rope.get("full_attention") or next(filter(None, rope.values()), {}))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = rope["rope_type"] = _ROPE_ALIASES.get(kind, kind)
    if kind not in _ROPE_TYPES:
        raise DraftModelError(f"the rope_type {kind!r} is not known; allowed: {', '.join(_ROPE_TYPES)}")
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = text.get("rope_theta") or 10_000.0
    if kind == "longrope":  # Phi's configuration keeps it outside
        rope.setdefault("original_max_position_embeddings", text.get("original_max_position_embeddings"))
        for name in ("short_factor", "long_factor"):
            # A factor for each frequency of a whole head, from those of a target that rotates a part of each head.
            if (count := len(rope.get(name, ()))) not in (0, head_dim // 2):
                import numpy as np

                places = np.linspace(0, count - 1, head_dim // 2)
                rope[name] = np.interp(places, range(count), rope[name]).tolist()
    return {key: value for key, value in rope.items() if value is not None and key not in _ROPE_OF_TARGETS}


def target_layers(target: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `LayerShape` whose layers are like the target's, all but its features.

    Raises:
        DraftModelError: when the target is no decoder of the known structure; names what its config.json lacks.
    """
    text: Mapping[str, Any] = target.get("text_config") or target
    needed = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
    if isinstance(text, Mapping):
        needed += [key for key in ("num_key_value_heads", "head_dim", "max_position_embeddings") if text.get(key)]
        needed = [key for key in needed if type(text.get(key)) is not int or text[key] < 1]
    if needed:
        raise DraftModelError(
            f"the target model (model_type {target.get('model_type')!r}) cannot be used: its config.json has no "
            f"{', '.join(needed)}; allowed: a decoder-only text-generation model of Llama's structure"
        )
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    try:
        rope = _rope_parameters(text, head_dim)
    except (DraftModelError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = error if isinstance(error, DraftModelError) else f"its rotary settings cannot be read: {error}"
        raise DraftModelError(f"the target model (model_type {text.get('model_type')!r}): {said}") from None
    return {
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rms_norm_eps": text.get("rms_norm_eps") or 1e-6,
        "vocab_size": text["vocab_size"],
        "draft_vocab_size": min(DEFAULT_DRAFT_VOCAB_SIZE, text["vocab_size"]),
        "max_position_embeddings": text.get("max_position_embeddings") or 2048,
        "rope_parameters": rope,
        "target_model_type": str(text.get("model_type", "")),
    }


def adapt_layers(
    default: LayerShape, given: Mapping[str, Any], source: str, rules: Mapping[str, Rule], problems: Iterable[str] = ()
) -> dict[str, Any]:
    """Sizes and rotary settings as the user's draft_model_config, or a checkpoint's config.json, changes the default's.

    What is null counts as not given, except that `rope_scaling: null` means none. Of a checkpoint (`source` is not
    USER), settings that no engine reads are ignored. `rules` are the family's, `problems` what it has found besides.

    Raises:
        DraftModelError: with everything that no draft of this target can have; names the source.
    """
    hidden, values = default.hidden_size, {key: value for key, value in given.items() if value is not None}
    rules = {
        **dict.fromkeys(("hidden_size", "target_hidden_size"), only(hidden, ", the target's")),
        "vocab_size": only(default.vocab_size, ", the target's"),
        "draft_vocab_size": whole(1, default.vocab_size, ", the target's vocabulary"),
        "intermediate_size": whole(1, _WIDEST * hidden), "num_attention_heads": whole(1),
        "num_key_value_heads": whole(1), "max_position_embeddings": whole(1), "rms_norm_eps": POSITIVE,
        "head_dim": ("an even whole number >= 2", lambda size: type(size) is int and size > 0 and size % 2 == 0),
        "partial_rotary_factor": only(1), "logit_scale": only(1),
        "layer_types": among("full_attention"), "use_sliding_window": only(False), "attention_bias": only(False),
        "mlp_bias": only(False), "hidden_act": only("silu"), **rules,
    }  # fmt: skip
    bad = [key for key, (_, allows) in rules.items() if key in values and not allows(values[key])]
    found = [f"`{key}` is {values[key]!r}; allowed: {rules[key][0]}" for key in bad]
    sizes = {key: getattr(default, key) if key in bad else values.get(key, getattr(default, key)) for key in _SIZES}
    # What is switched off changes nothing; published drafts have many such settings.
    unknown = sorted(key for key in values.keys() - rules.keys() - _IGNORED if values[key] is not False)
    if source != USER:  # its tensors are ours to the last name, and engines read no other settings than those checked
        unknown = [key for key in unknown if key.startswith(("norm_", "fc_norm", "quant"))]
    found += [*_head_problems(hidden, sizes, values), *_rope_problems(values), *problems]
    found += [f"`{key}` is not a setting of the draft" for key in unknown]
    if found:
        raise DraftModelError([f"{source}: {problem}" for problem in found])
    theta = values.get("rope_theta") or default.rope_parameters["rope_theta"]
    rope = {**default.rope_parameters, "rope_theta": theta}
    if "rope_parameters" in values or "rope_scaling" in given:
        rope = {"rope_theta": theta, **values.get("rope_parameters", values.get("rope_scaling", {}))}
    text = {"rope_parameters": rope, "original_max_position_embeddings": given.get("original_max_position_embeddings")}
    return {**sizes, "rope_parameters": _rope_parameters(text, sizes["head_dim"])}


def _head_problems(hidden: int, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    wide = heads * sizes["head_dim"]
    wrong = {
        f"`num_attention_heads` x `head_dim` is {wide}; allowed: at most {_WIDEST * hidden}":
            wide > _WIDEST * hidden and not given.keys().isdisjoint({"num_attention_heads", "head_dim"}),
        f"`num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {kv_heads}": heads % kv_heads,
        f"`num_attention_heads` is {heads}; engines load a Llama configuration, whose hidden size (the target's, "
        f"{hidden}) is a multiple of it": given.get("num_attention_heads") == heads and hidden % heads,
    }  # fmt: skip
    return [sentence for sentence, is_so in wrong.items() if is_so]


def is_ascending(ids: Any) -> bool:
    """Whether a setting is a list of layer numbers, each higher than the one before."""
    whole = isinstance(ids, list | tuple) and bool(ids) and all(type(number) is int for number in ids)
    return whole and list(ids) == sorted(set(ids))


def _rope_problems(given: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = given.get(key, {})
        if not isinstance(rope, Mapping):
            problems.append(f"`{key}` is {rope!r}; allowed: a JSON object")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_TYPES and kind not in _ROPE_ALIASES:
            problems.append(f"`{key}` has the rope_type {kind!r}; allowed: {', '.join(_ROPE_TYPES)}")
        if (part := rope.get("partial_rotary_factor", 1)) != 1:
            problems.append(f"`{key}` has the partial_rotary_factor {part!r}; the draft rotates whole heads")
    if not problems and "rope_theta" in given:
        theta = given.get("rope_parameters", {}).get("rope_theta", given["rope_theta"])
        if theta != given["rope_theta"]:
            problems.append(f"`rope_theta` is {given['rope_theta']!r}, but `rope_parameters` says {theta!r}: give one")
    return problems
