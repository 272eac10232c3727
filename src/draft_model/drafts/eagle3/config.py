"""The draft's configuration: generated from the target's, changed by the user's, written for vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from draft_model.errors import DraftModelError

ARCHITECTURE = "LlamaForCausalLMEagle3"
DEFAULT_DRAFT_VOCAB_SIZE = 32_000
MIN_TARGET_LAYERS = 4

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
# Settings that engines and other trainers write and that shape nothing here.
_IGNORED = frozenset(
    [
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eagle_config",
        "eos_token_id",
        "initializer_range",
        "max_window_layers",
        "pad_token_id",
        "pretraining_tp",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
_SIZES = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "draft_vocab_size",
    "max_position_embeddings",
)
_LAYERS = "eagle_aux_hidden_state_layer_ids"
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class DraftConfig:
    """The shape of a draft. H is the target's hidden size, V its vocabulary, D the draft's.

    Attributes:
        hidden_size: H, the target's.
        intermediate_size: of the SwiGLU.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides num_attention_heads.
        head_dim: size of a head; need not be H / heads.
        rms_norm_eps: of every norm.
        vocab_size: V, the target's.
        draft_vocab_size: D, at most V.
        max_position_embeddings: the target's real one; engines clamp positions beyond it.
        rope_parameters: as transformers 5 writes them (`rope_type`, `rope_theta`, ...).
        aux_layers: features are the residual stream after so many target layers, low to high.
        target_model_type: the target's family; it decides how SGLang counts layers.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    aux_layers: tuple[int, int, int]
    target_model_type: str

    @property
    def sglang_shift(self) -> int:
        """SGLang adds 1 to the layer ids of llama and qwen targets and takes gpt-oss's as they are."""
        return 0 if self.target_model_type == "gpt_oss" else 1

    def to_json(self) -> dict[str, Any]:
        """config.json of the checkpoint, in the keys of vLLM and of SGLang, without nulls."""
        rope = self.rope_parameters
        config = {
            **_FIXED,
            "hidden_size": self.hidden_size,
            "target_hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "target_model_type": self.target_model_type,
            "eagle_aux_hidden_state_layer_ids": list(self.aux_layers),
            "eagle_config": {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": [layer - self.sglang_shift for layer in self.aux_layers],
            },
            "dtype": "bfloat16",
        }
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        return config

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> DraftConfig:
        """Reads the config.json that `to_json` wrote."""
        values = {field.name: config[field.name] for field in fields(cls) if field.name != "aux_layers"}
        return cls(**values, aux_layers=tuple(config["eagle_aux_hidden_state_layer_ids"]))


def choose_aux_layers(layers: int) -> tuple[int, int, int]:
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


def _rope_parameters(text: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if "full_attention" in rope:  # targets that mix sliding and full attention keep one set for each
        rope = dict(rope["full_attention"])
    rope.setdefault("rope_theta", text.get("rope_theta", 10_000.0))
    legacy = rope.pop("type", "default")
    rope.setdefault("rope_type", legacy)
    if rope["rope_type"] == "longrope":  # Phi's configuration keeps it outside
        rope.setdefault("original_max_position_embeddings", text.get("original_max_position_embeddings"))
    rope.pop("partial_rotary_factor", None)  # the draft rotates whole heads, as engines' Llama does
    return {key: value for key, value in rope.items() if value is not None}


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
    return DraftConfig(
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        rms_norm_eps=text.get("rms_norm_eps") or 1e-6,
        vocab_size=text["vocab_size"],
        draft_vocab_size=min(DEFAULT_DRAFT_VOCAB_SIZE, text["vocab_size"]),
        max_position_embeddings=text.get("max_position_embeddings") or 2048,
        rope_parameters=_rope_parameters(text),
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
        elif (kind := rope.get("rope_type", rope.get("type", "default"))) not in _ROPE_TYPES:
            problems.append(f"`{key}` has the rope_type {kind!r}; allowed: {', '.join(_ROPE_TYPES)}")
    if not problems and "rope_theta" in given:
        theta = given.get("rope_parameters", {}).get("rope_theta", given["rope_theta"])
        if theta != given["rope_theta"]:
            problems.append(f"`rope_theta` is {given['rope_theta']!r}, but `rope_parameters` says {theta!r}: give one")
    return problems


def _layers_of(default: DraftConfig, given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The feature layers that the user wants, in vLLM's or SGLang's place, and what is wrong with them."""
    nested = (given.get("eagle_config") or {}).get(_LAYERS)
    wanted = [ids for ids in (given.get(_LAYERS), nested) if ids is not None]
    for ids in wanted:
        whole = isinstance(ids, list | tuple) and len(ids) == 3 and all(type(layer) is int for layer in ids)
        if not (whole and list(ids) == sorted(set(ids))):
            return None, [f"`{_LAYERS}` is {ids!r}; allowed: three ascending layer numbers"]
    if nested is not None:
        wanted[-1] = [layer + default.sglang_shift for layer in nested]
    if len(wanted) == 2 and list(wanted[0]) != wanted[1]:
        return None, [
            f"`{_LAYERS}` is {wanted[0]!r}, but the one in `eagle_config` means {wanted[1]!r} (SGLang counts "
            f"from {default.sglang_shift} less): give one"
        ]
    layers = tuple(wanted[0]) if wanted else default.aux_layers
    if layers[0] < 1:
        return None, [f"`{_LAYERS}` is {list(layers)!r}; the lowest is 1, after the target's first layer"]
    return layers, []


def _override_problems(default: DraftConfig, given: Mapping[str, Any]) -> list[str]:
    known = {field.name for field in fields(DraftConfig)} - {"aux_layers"} | {_LAYERS, "target_hidden_size"}
    problems = [
        f"`{key}` is {value!r}; allowed: {_FIXED[key]!r}"
        for key, value in given.items()
        if key in _FIXED and value != _FIXED[key]
    ]
    problems += [
        f"`{key}` is {given[key]!r}; the target has {value}"
        for key, value in (
            ("hidden_size", default.hidden_size),
            ("target_hidden_size", default.hidden_size),
            ("vocab_size", default.vocab_size),
        )
        if key in given and given[key] != value
    ]
    problems += _size_problems(default, given) + _rope_problems(given) + _layers_of(default, given)[1]
    # What is switched off changes nothing: `use_sliding_window: false` stands in many published drafts.
    unknown = sorted(key for key in set(given) - known - set(_FIXED) - _IGNORED if given[key] is not False)
    return problems + [f"`{key}` is not a setting of the draft" for key in unknown]


def with_overrides(default: DraftConfig, given: Mapping[str, Any]) -> DraftConfig:
    """Applies the user's draft_model_config, whole or partial, to the default of the target.

    Args:
        default: of `draft_config_for`.
        given: the JSON object of the parameter draft_model_config; what is null counts as not given, except
            that `rope_scaling: null` means none.

    Raises:
        DraftModelError: with everything in it that does not fit the target or the one architecture.
    """
    unscaled = "rope_scaling" in given and given["rope_scaling"] is None
    given = {key: value for key, value in given.items() if value is not None}
    if problems := _override_problems(default, given):
        raise DraftModelError([f"draft_model_config: {problem}" for problem in problems])
    free = {field.name for field in fields(DraftConfig)} - {"hidden_size", "vocab_size", "aux_layers"}
    values = {key: value for key, value in given.items() if key in free}
    theta = given.get("rope_theta", default.rope_parameters["rope_theta"])
    if "rope_parameters" in given:
        values["rope_parameters"] = _rope_parameters({"rope_theta": theta, **given})
    elif unscaled or "rope_scaling" in given:
        scaling = {"rope_scaling": given.get("rope_scaling"), "rope_theta": theta}
        values["rope_parameters"] = _rope_parameters(scaling)
    else:
        values["rope_parameters"] = {**default.rope_parameters, "rope_theta": theta}
    return replace(default, **values, aux_layers=_layers_of(default, given)[0])
