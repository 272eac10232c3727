"""The draft's configuration: derived from the target's, changed by the user's, written for vLLM and SGLang."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from draft_model.drafts.base import Costs, Family, later
from draft_model.drafts.shape import (
    FLAG,
    USER,
    LayerShape,
    Rule,
    adapt_layers,
    among,
    is_ascending,
    only,
    target_layers,
)
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

ARCHITECTURE = "LlamaForCausalLMEagle3"
ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "Eagle3DraftModel", "Eagle3Speculator")
"""Ours and SpecForge's; vLLM's other name for the same class; speculators'."""
MIN_TARGET_LAYERS = 4
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
SWITCHES = ("fc_norm", "norm_before_fc", "norm_output")  # of EAGLE-3.1; all off is EAGLE-3

# The draft is one Llama layer with its own head.
_RULES: dict[str, Rule] = {
    "architectures": among(ARCHITECTURE, "Eagle3LlamaForCausalLM"), "num_hidden_layers": only(1),
    "tie_word_embeddings": only(False), **dict.fromkeys(SWITCHES, FLAG),
}  # fmt: skip
SGLANG_DEEPSEEK = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_k25",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DraftConfig(LayerShape):
    """The shape of an EAGLE-3 draft: one Llama layer."""

    fc_norm: bool = False  # EAGLE-3.1: an RMSNorm of each feature before fc
    norm_before_fc: bool = False  # an RMSNorm of all features together before fc, and before those of fc_norm
    norm_output: bool = False  # EAGLE-3.1: the next step reads the state after the final norm

    @property
    def family(self) -> str:
        """Name of the family."""
        return "eagle3.1" if any(getattr(self, switch) for switch in SWITCHES) else "eagle3"

    def to_json(self) -> dict[str, Any]:
        """config.json of the checkpoint, with the keys of vLLM and of SGLang and without nulls."""
        config = {
            **self.layer_json(),
            "architectures": [ARCHITECTURE],
            "num_hidden_layers": 1,
            "mlp_bias": False,
            **{switch: True for switch in SWITCHES if getattr(self, switch)},
            "model_type": "llama",
            "target_hidden_size": self.hidden_size,
            LAYER_IDS: list(self.aux_layers),
            "eagle_config": {
                "use_aux_hidden_state": True,
                LAYER_IDS: to_sglang(self.aux_layers, self.target_model_type),
            },
        }
        return config if len(self.aux_layers) == 3 else config | {"num_aux_hidden_states": len(self.aux_layers)}


def to_sglang(layers: tuple[int, ...], target_model_type: str) -> list[int]:
    """The ids from which SGLang captures the features after these layers.

    `set_eagle3_layers_to_capture` of SGLang 0.5.23 adds 1 to each id. The one of DeepSeek adds it only where the first
    id is 1. gpt-oss's does not where the highest is the number of layers, which is no feature layer.
    """
    if target_model_type in SGLANG_DEEPSEEK and layers[0] != 2:
        return list(layers)
    return [layer - 1 for layer in layers]


def from_sglang(ids: list[int], target_model_type: str) -> list[int]:
    """The inverse of `to_sglang`: after how many layers SGLang captures features for these ids."""
    if target_model_type in SGLANG_DEEPSEEK and ids[0] != 1:
        return list(ids)
    return [layer + 1 for layer in ids]


def layers_of(config: Mapping[str, Any], target_model_type: str = "") -> list[int] | None:
    """The feature layers that a config.json names, as vLLM counts them: after how many layers.

    Args:
        config: a draft's; ours, SpecForge's or speculators'.
        target_model_type: of its target; not given: what config says, in SpecForge's for Kimi K2 as model_type.

    Returns:
        None where it names none; engines and trainers then take 2, L // 2 and L - 3.
    """
    if config.get(LAYER_IDS) is not None:
        return list(config[LAYER_IDS])
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
    named = target_model_type or config.get("target_model_type") or config.get("model_type", "")
    return nested and from_sglang(list(nested), str(named))


def choose_aux_layers(layers: int) -> tuple[int, ...]:
    """Which residual streams feed the draft: after 2, L//2 and L-3 layers; three spread ones for a shallow target.

    Raises:
        DraftModelError: for fewer than four layers.
    """
    if layers < MIN_TARGET_LAYERS:
        raise DraftModelError(
            f"the target model has {layers} layers; EAGLE-3 takes features after three different layers "
            f"below the last: use a target of at least {MIN_TARGET_LAYERS} layers"
        )
    return (2, layers // 2, layers - 3) if layers >= 7 else (1, layers // 2, layers - 1)


def draft_config_for(target: Mapping[str, Any], _proposals: int = 0) -> DraftConfig:
    """The default draft of a target, by its config.json.

    Raises:
        DraftModelError: when the target is no decoder of the known structure, or too shallow.
    """
    sizes = target_layers(target)
    depth = (target.get("text_config") or target)["num_hidden_layers"]
    return DraftConfig(**sizes, aux_layers=choose_aux_layers(depth))


def _choose_layers(default: DraftConfig, given: Mapping[str, Any]) -> tuple[tuple[int, ...], list[str]]:
    """The feature layers that are asked for, in vLLM's or SGLang's key, and what is wrong with them."""
    nested = (given.get("eagle_config") or {}).get(LAYER_IDS)
    wanted = [ids for ids in (given.get(LAYER_IDS), nested) if ids is not None]
    for ids in wanted:
        if not is_ascending(ids):
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


def with_overrides(default: DraftConfig, given: Mapping[str, Any], source: str = USER) -> DraftConfig:
    """Applies the user's draft_model_config, or a checkpoint's config.json, to the default; see `adapt_layers`."""
    values = {key: value for key, value in given.items() if value is not None}
    size = values.get("draft_vocab_size", default.draft_vocab_size)
    ignored = [key for key in ("model_type", "sliding_window") if values.get(key) not in (None, "llama")]
    # A copy of the target's setting: a head of fewer tokens cannot be the embedding.
    if values.get("tie_word_embeddings") is True and type(size) is int and size < default.vocab_size:
        ignored.append("tie_word_embeddings")
    layers, problems = _choose_layers(default, values)
    left = {key: value for key, value in given.items() if key not in ignored}
    sizes = adapt_layers(default, left, source, _RULES, problems)
    if ignored:
        logger.info("%s: ignored, for the draft is one Llama layer: %s", source, ", ".join(ignored))
    # In a checkpoint, what is not there is off.
    switches = {key: values.get(key, False) for key in SWITCHES if key in values or source != USER}
    return replace(default, **sizes, **switches, aux_layers=layers)


def costs(shape: DraftConfig, steps: int) -> Costs:
    """What a draft costs; activations are fitted to what is kept on small shapes, as a test holds."""
    from draft_model.drafts.eagle3.objective import CHUNK_ROWS
    from draft_model.drafts.eagle3.unroll import KEPT_SHARE

    hidden, inner, vocabulary = shape.hidden_size, shape.intermediate_size, shape.draft_vocab_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    features = len(shape.aux_layers) * hidden * hidden
    projections = (queries + 2 * keys) * hidden  # of one half of the layer's input; the embedding's is computed once
    block = projections + queries * hidden + 3 * hidden * inner
    chunk = CHUNK_ROWS["cuda"]

    def row_numbers(number: float, memory: float) -> float:
        gate_up = steps * 2 * inner
        kept = gate_up if gate_up * number * KEPT_SHARE <= memory else 0
        return steps * (4 * hidden + 1.3 * queries + 2 * keys) + kept

    norms = 4 + len(shape.aux_layers) * (shape.fc_norm + shape.norm_before_fc)
    return Costs(
        parameters=features + projections + block + norms * hidden + vocabulary * hidden,
        token_numbers=5 * hidden + 5 * queries + 3 * keys,
        row_numbers=row_numbers,
        # Two for each multiply-add, and twice the forward pass for the backward pass; attention is causal.
        token_flops=6 * (features + projections),
        row_flops=lambda tokens: steps * (6 * (block + vocabulary * hidden) + 3 * (2 * tokens * queries)),
        # The head's gradient, the target's logits of a chunk of positions, and the draft's of all their steps.
        chunk_bytes=lambda width: (
            4.0 * vocabulary * hidden + chunk * width * (shape.vocab_size + (1 + steps) * vocabulary)
        ),
    )


def _owns(has_switches: bool, config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a draft, with one of EAGLE-3.1's switches on or without."""
    is_eagle3 = not config.get("architectures") or config["architectures"][0] in ARCHITECTURES  # some name none
    nested = config.get("eagle_config") or {}
    return is_eagle3 and has_switches == any(config.get(name) or nested.get(name) for name in SWITCHES)


EAGLE3 = Family(
    name="eagle3",
    title="EAGLE-3",
    vllm_method="eagle3",
    sglang_algorithm="EAGLE3",
    sglang_options=lambda proposals: {
        "speculative-num-steps": proposals,
        "speculative-eagle-topk": 1,
        "speculative-num-draft-tokens": proposals + 1,
    },
    owns=partial(_owns, False),
    default_shape=draft_config_for,
    adapt=with_overrides,
    create=later("eagle3.model:Eagle3Draft"),
    objective=later("eagle3.objective:Objective"),
    proposer=later("eagle3.model:ChainProposer"),
    costs=costs,
    read=later("eagle3.export:canonical"),
    export=later("eagle3.export:exported"),
)
EAGLE31 = replace(
    EAGLE3,
    name="eagle3.1",
    title="EAGLE-3.1",
    owns=partial(_owns, True),
    default_shape=lambda target, _proposals=0: replace(draft_config_for(target), fc_norm=True, norm_output=True),
)
