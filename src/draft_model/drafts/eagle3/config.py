"""The draft's configuration: derived from the target's, changed by the user's, written for vLLM and SGLang."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from draft_model.drafts.base import Shape
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

ARCHITECTURE = "LlamaForCausalLMEagle3"
ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "Eagle3DraftModel", "Eagle3Speculator")
"""Ours and SpecForge's; vLLM's other name for the same class; speculators'."""
DEFAULT_DRAFT_VOCAB_SIZE = 32_000
MIN_TARGET_LAYERS = 4
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
USER = "draft_model_config"
SWITCHES = ("fc_norm", "norm_before_fc", "norm_output")
"""Of EAGLE-3.1; all off is EAGLE-3."""

# Settings with one possible value: the draft is one Llama layer with its own head and no biases.
_FIXED: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
# What engines' Llama layer reads, with the values that change nothing.
_NEUTRAL: dict[str, Any] = {"partial_rotary_factor": 1, "logit_scale": 1, "layer_types": ["full_attention"]}
# What engines and trainers write and no engine's Llama layer reads.
_IGNORED = {
    "_name_or_path", "attention_dropout", "auto_map", "bos_token_id", "decoder_sparse_step", "dtype", "eagle_config",
    "embd_pdrop", "eos_token_id", "initializer_range", "max_window_layers",
    "mlp_only_layers", "moe_intermediate_size", "n_routed_experts", "norm_topk_prob", "num_aux_hidden_states",
    "num_experts", "num_experts_per_tok", "num_local_experts", "original_max_position_embeddings",
    "output_router_logits", "pad_token_id", "pretraining_tp", "resid_pdrop", "rope_scaling", "rope_theta",
    "router_aux_loss_coef", "shared_expert_intermediate_size", "sliding_window", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_SIZES = (
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "draft_vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# The draft is trained with its own rotary embedding, so it can do without what engines' Llama layer has no code for:
# sections for images, and Gemma's rotation of a part of the head.
_ROPE_ALIASES = {"su": "longrope", "mrope": "default", "proportional": "default"}
_ROPE_OF_TARGETS = ("mrope_section", "mrope_interleaved", "partial_rotary_factor", "type")
_FACTOR_LISTS = ("short_factor", "long_factor")
_SGLANG_DEEPSEEK = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_k25",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DraftConfig(Shape):
    """The shape of an EAGLE-3 draft: one Llama layer.

    Attributes:
        intermediate_size: of the SwiGLU.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides num_attention_heads.
        head_dim: size of a head; need not be H / heads.
        rms_norm_eps: of every norm.
        rope_parameters: as transformers 5 writes them (`rope_type`, `rope_theta`, ...), over whole heads.
        target_model_type: the target's family; it decides how SGLang counts layers.
        fc_norm: EAGLE-3.1: an RMSNorm of each feature before fc.
        norm_before_fc: an RMSNorm of all features together before fc, and before those of fc_norm.
        norm_output: EAGLE-3.1: the next step reads the state after the final norm.
    """

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    target_model_type: str
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

    @property
    def family(self) -> str:
        """Name of the family."""
        return "eagle3.1" if any(getattr(self, switch) for switch in SWITCHES) else "eagle3"

    def to_json(self) -> dict[str, Any]:
        """config.json of the checkpoint, with the keys of vLLM and of SGLang and without nulls."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "aux_layers"}
        values = {name: value for name, value in values.items() if name not in SWITCHES or value}
        if len(self.aux_layers) != 3:
            values["num_aux_hidden_states"] = len(self.aux_layers)
        config = {
            **_FIXED,
            **values,
            "target_hidden_size": self.hidden_size,
            "rope_theta": self.rope_parameters["rope_theta"],
            LAYER_IDS: list(self.aux_layers),
            "eagle_config": {
                "use_aux_hidden_state": True,
                LAYER_IDS: to_sglang(self.aux_layers, self.target_model_type),
            },
            "dtype": "bfloat16",
        }
        if self.rope_parameters.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        return config

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> DraftConfig:
        """Reads the config.json that `to_json` wrote."""
        names = {field.name for field in fields(cls)} - {"aux_layers", *SWITCHES}
        switches = {name: config.get(name, False) for name in SWITCHES}
        return cls(**{name: config[name] for name in names}, **switches, aux_layers=tuple(config[LAYER_IDS]))


def to_sglang(layers: tuple[int, ...], target_model_type: str) -> list[int]:
    """The ids from which SGLang captures the features after these layers.

    `set_eagle3_layers_to_capture` of SGLang 0.5.23 adds 1 to each id. The one of DeepSeek adds it only where the first
    id is 1. gpt-oss's does not where the highest is the number of layers, which is no feature layer.
    """
    if target_model_type in _SGLANG_DEEPSEEK and layers[0] != 2:
        return list(layers)
    return [layer - 1 for layer in layers]


def from_sglang(ids: list[int], target_model_type: str) -> list[int]:
    """The inverse of `to_sglang`: after how many layers SGLang captures features for these ids."""
    if target_model_type in _SGLANG_DEEPSEEK and ids[0] != 1:
        return list(ids)
    return [layer + 1 for layer in ids]


def layers_of(config: Mapping[str, Any], target_model_type: str = "") -> list[int] | None:
    """The feature layers that a config.json names, as vLLM counts them: after how many layers.

    Args:
        config: a draft's; ours, SpecForge's or speculators'.
        target_model_type: of its target; not given: what config says.

    Returns:
        None where it names none; engines and trainers then take 2, L // 2 and L - 3.
    """
    if config.get(LAYER_IDS) is not None:
        return list(config[LAYER_IDS])
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
    return nested and from_sglang(list(nested), target_model_type or str(config.get("target_model_type", "")))


def choose_aux_layers(layers: int) -> tuple[int, ...]:
    """Which residual streams feed the draft: after 2, L//2 and L-3 layers; three spread ones for a shallow target.

    Args:
        layers: L, the target's number of layers.

    Raises:
        DraftModelError: for fewer than four layers.
    """
    if layers < MIN_TARGET_LAYERS:
        raise DraftModelError(
            f"the target model has {layers} layers; EAGLE-3 takes features after three different layers "
            f"below the last: use a target of at least {MIN_TARGET_LAYERS} layers"
        )
    return (2, layers // 2, layers - 3) if layers >= 7 else (1, layers // 2, layers - 1)


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
        rope |= {name: _resample(rope[name], head_dim // 2) for name in _FACTOR_LISTS if name in rope}
    return {key: value for key, value in rope.items() if value is not None and key not in _ROPE_OF_TARGETS}


def _resample(factors: list[float], size: int) -> list[float]:
    """A factor for each frequency of a whole head, from those of a target that rotates only a part of each head."""
    if len(factors) == size or size < 2 or len(factors) < 2:
        return list(factors)
    last = len(factors) - 1
    places = [index * last / (size - 1) for index in range(size)]
    lower = [min(int(place), last - 1) for place in places]
    return [
        factors[low] + (place - low) * (factors[low + 1] - factors[low])
        for place, low in zip(places, lower, strict=True)
    ]


def draft_config_for(target: Mapping[str, Any]) -> DraftConfig:
    """The default draft of a target.

    Args:
        target: the target's config.json; of a multi-modal one, its text_config is taken.

    Raises:
        DraftModelError: when the target is no decoder of the known structure; names what is missing.
    """
    text: Mapping[str, Any] = target.get("text_config") or target
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if missing := [key for key in needed if not isinstance(text.get(key), int)]:
        raise DraftModelError(
            f"the target model (model_type {target.get('model_type')!r}) cannot be used: its config.json has no "
            f"{', '.join(missing)}; allowed: a decoder-only text-generation model of Llama's structure"
        )
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    try:
        rope = _rope_parameters(text, head_dim)
    except DraftModelError as error:
        raise DraftModelError(f"the target model (model_type {text.get('model_type')!r}): {error}") from None
    return DraftConfig(
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_norm_eps=text.get("rms_norm_eps") or 1e-6,
        vocab_size=text["vocab_size"],
        draft_vocab_size=min(DEFAULT_DRAFT_VOCAB_SIZE, text["vocab_size"]),
        max_position_embeddings=text.get("max_position_embeddings") or 2048,
        rope_parameters=rope,
        aux_layers=choose_aux_layers(text["num_hidden_layers"]),
        target_model_type=str(text.get("model_type", "")),
    )


def _size_problems(default: DraftConfig, given: Mapping[str, Any]) -> list[str]:
    bad = [key for key in _SIZES if key in given and (type(given[key]) is not int or given[key] < 1)]
    problems = [f"`{key}` is {given[key]!r}; allowed: a whole number >= 1" for key in bad]
    if not {"num_attention_heads", "num_key_value_heads"} & set(bad):
        heads, kv_heads = (
            given.get(key, getattr(default, key)) for key in ("num_attention_heads", "num_key_value_heads")
        )
        if heads % kv_heads:
            problems.append(f"`num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {kv_heads}")
        if "num_attention_heads" in given and default.hidden_size % heads:
            problems.append(
                f"`num_attention_heads` is {heads}; engines load a Llama configuration, whose hidden size "
                f"(the target's, {default.hidden_size}) is a multiple of it"
            )
    if "head_dim" not in bad and given.get("head_dim", 2) % 2:
        problems.append(f"`head_dim` is {given['head_dim']}; rotary embedding needs an even one")
    if "draft_vocab_size" not in bad and given.get("draft_vocab_size", 1) > default.vocab_size:
        problems.append(
            f"`draft_vocab_size` is {given['draft_vocab_size']}; the target's vocabulary has {default.vocab_size}"
        )
    problems += [
        f"`{key}` is {given[key]!r}; allowed: true, false"
        for key in SWITCHES
        if type(given.get(key, False)) is not bool
    ]
    eps = given.get("rms_norm_eps", default.rms_norm_eps)
    if type(eps) not in (int, float) or not eps > 0:
        problems.append(f"`rms_norm_eps` is {eps!r}; allowed: a number > 0")
    return problems


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


def _choose_layers(default: DraftConfig, given: Mapping[str, Any]) -> tuple[tuple[int, ...], list[str]]:
    """The feature layers that are asked for, in vLLM's or SGLang's key, and what is wrong with them."""
    nested = (given.get("eagle_config") or {}).get(LAYER_IDS)
    wanted = [ids for ids in (given.get(LAYER_IDS), nested) if ids is not None]
    for ids in wanted:
        whole = isinstance(ids, list | tuple) and ids and all(type(layer) is int for layer in ids)
        if not (whole and list(ids) == sorted(set(ids))):
            return (), [f"`{LAYER_IDS}` is {ids!r}; allowed: ascending layer numbers, such as three or five"]
    if nested is not None:
        wanted[-1] = from_sglang(nested, default.target_model_type)
    # Ours names the target's type; versions that wrote another nested value for SGLang trained on vLLM's.
    if len(wanted) == 2 and list(wanted[0]) != wanted[1] and not given.get("target_model_type"):
        return (), [
            f"`{LAYER_IDS}` is {wanted[0]!r}, but the one in `eagle_config` means {wanted[1]!r} to SGLang: give one"
        ]
    layers = tuple(wanted[0]) if wanted else default.aux_layers
    if (count := given.get("num_aux_hidden_states", len(layers))) != len(layers):
        return (), [f"`num_aux_hidden_states` is {count!r}, but there are {len(layers)} in `{LAYER_IDS}`"]
    if layers[0] < 1:
        return (), [f"`{LAYER_IDS}` is {list(layers)!r}; the lowest is 1, after the target's first layer"]
    if wanted and from_sglang(to_sglang(layers, default.target_model_type), default.target_model_type) != list(layers):
        return (), [f"`{LAYER_IDS}` is {list(layers)!r}; SGLang cannot capture it from {default.target_model_type}"]
    return layers, []


def _problems(default: DraftConfig, given: Mapping[str, Any], foreign: bool) -> list[str]:
    known = {field.name for field in fields(DraftConfig)} - {"aux_layers"} | {LAYER_IDS, "target_hidden_size"}
    fixed = _FIXED | _NEUTRAL
    problems = [
        f"`{key}` is {value!r}; allowed: {fixed[key]!r}"
        for key, value in given.items()
        if key in fixed and key != "model_type" and value != fixed[key]
    ]
    sizes = {"hidden_size": default.hidden_size, "target_hidden_size": default.hidden_size}
    problems += [
        f"`{key}` is {given[key]!r}; the target has {value}"
        for key, value in (sizes | {"vocab_size": default.vocab_size}).items()
        if key in given and given[key] != value
    ]
    problems += _size_problems(default, given) + _rope_problems(given) + _choose_layers(default, given)[1]
    # What is switched off changes nothing: `use_sliding_window: false` stands in many published drafts.
    known |= fixed.keys() | _IGNORED
    unknown = sorted(key for key in set(given) - known if given[key] is not False)
    if foreign:  # its tensors are ours to the last name, and engines read no other settings than the ones checked
        unknown = [key for key in unknown if key.startswith(("use_sliding", "norm_", "fc_norm", "quant"))]
    return problems + [f"`{key}` is not a setting of the draft" for key in unknown]


def with_overrides(default: DraftConfig, given: Mapping[str, Any], source: str = USER) -> DraftConfig:
    """Applies the user's draft_model_config, or a checkpoint's config.json, to the default of the target.

    Args:
        default: of `draft_config_for`.
        given: the JSON object, whole or partial; what is null counts as not given, except that `rope_scaling: null`
            means none.
        source: where it comes from; settings of a checkpoint that no engine reads are ignored.

    Raises:
        DraftModelError: with everything in it that does not fit the target or the one architecture.
    """
    unscaled = "rope_scaling" in given and given["rope_scaling"] is None
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("architectures") == ["Eagle3LlamaForCausalLM"]:  # vLLM's other name for the same class
        given["architectures"] = [ARCHITECTURE]
    if isinstance(given.get("layer_types"), list):  # one for each of the target's layers
        given["layer_types"] = sorted(set(given["layer_types"]))
    if problems := _problems(default, given, source != USER):
        raise DraftModelError([f"{source}: {problem}" for problem in problems])
    if ignored := sorted(key for key in ("model_type", "sliding_window") if given.get(key) not in (None, "llama")):
        logger.info("%s: ignored, for the draft is one Llama layer: %s", source, ", ".join(ignored))
    free = {field.name for field in fields(DraftConfig)} - {
        "hidden_size", "vocab_size", "aux_layers", "rope_parameters", "target_model_type"
    }  # fmt: skip
    values = {key: value for key, value in given.items() if key in free}
    if source != USER:  # in a checkpoint, what is not there is off
        values |= {key: given.get(key, False) for key in SWITCHES}
    theta = given.get("rope_theta", default.rope_parameters["rope_theta"])
    rope = {**default.rope_parameters, "rope_theta": theta}
    if "rope_parameters" in given:
        rope = {"rope_theta": theta, **given["rope_parameters"]}
    elif unscaled or "rope_scaling" in given:
        rope = {"rope_theta": theta, **given.get("rope_scaling", {})}
    outside = {key: given[key] for key in ("original_max_position_embeddings",) if key in given}
    values["rope_parameters"] = _rope_parameters(
        {"rope_parameters": rope, **outside}, values.get("head_dim", default.head_dim)
    )
    return replace(default, **values, aux_layers=_choose_layers(default, given)[0])
