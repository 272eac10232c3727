"""A block draft's configuration: derived from the target's, changed by the user's, written for vLLM and SGLang."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from draft_model.drafts.eagle3.config import USER, DraftConfig, draft_config_for, with_overrides
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

DEFAULT_LAYERS = 5
DEFAULT_PROPOSALS = 7
ARCHITECTURES = {"dspark": "Qwen3DSparkModel", "dflash": "DFlashDraftModel"}
ALIASES = {"dspark": {"DSparkDraftModel", "DSparkSpeculator"}, "dflash": {"DFlashSpeculator"}}
_LAYER_TYPE = "full_attention"
_OWN_SIZES = {"num_hidden_layers": 1, "block_size": 2, "num_anchors": 1, "markov_rank": 0, "mask_token_id": 0}
# With one possible value each; the other Markov heads have tensors that this draft does not.
_FIXED = {"markov_head_type": "vanilla", "attention_bias": False, "is_causal": False, "hidden_act": "silu"}
_DERIVED = (
    "architectures", "model_type", "layer_types", "dflash_config", "confidence_head_with_markov", "target_layer_ids",
    "num_target_layers", "max_window_layers", "use_sliding_window", "sliding_window",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BlockConfig(DraftConfig):
    """The shape of a block draft: layers like Qwen3's over the target's whole vocabulary.

    Attributes:
        num_hidden_layers: L.
        num_target_layers: the target's.
        block_size: S, positions of a block: the anchor and S - 1 mask tokens.
        sample_from_anchor: whether the anchor's own position proposes too. DSpark's does, and proposes S tokens; DFlash
            proposes S - 1, each at the position of its mask token.
        mask_token_id: target token whose embedding stands at positions that are to be filled in.
        markov_rank: r of the Markov head; 0: none, which is DFlash.
        enable_confidence_head: whether there is one.
        num_anchors: most blocks of a conversation in one training step.
        loss_decay_gamma: proposal j counts exp(-j / gamma) in the loss.
    """

    num_hidden_layers: int
    num_target_layers: int
    block_size: int
    sample_from_anchor: bool
    mask_token_id: int
    markov_rank: int
    enable_confidence_head: bool
    num_anchors: int = 512
    loss_decay_gamma: float = 4.0

    @property
    def family(self) -> str:
        """Its name in `drafts.FAMILIES`."""
        return "dspark" if self.markov_rank else "dflash"

    @property
    def first(self) -> int:
        """The first position of a block that proposes."""
        return 0 if self.sample_from_anchor else 1

    @property
    def proposals(self) -> int:
        """K, tokens that a block proposes."""
        return self.block_size - self.first

    def to_json(self) -> dict[str, Any]:
        """config.json as both engines read it; feature layers are 0-based there: our "after n layers" minus 1."""
        layers = {"target_layer_ids": [layer - 1 for layer in self.aux_layers], "mask_token_id": self.mask_token_id}
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.family]], "model_type": "qwen3", "dtype": "bfloat16",
            "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
            "layer_types": [_LAYER_TYPE] * self.num_hidden_layers, "rope_theta": self.rope_parameters["rope_theta"],
        }  # fmt: skip
        names = (
            "hidden_size", "vocab_size", "max_position_embeddings", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "target_model_type",
            "num_hidden_layers", "num_target_layers", "block_size", "sample_from_anchor", "num_anchors",
            "loss_decay_gamma",
        )  # fmt: skip
        config |= {name: getattr(self, name) for name in names}
        if self.rope_parameters.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        if self.family == "dflash":
            return config | {"dflash_config": layers}
        return config | layers | {
            "markov_rank": self.markov_rank, "markov_head_type": "vanilla",
            "enable_confidence_head": self.enable_confidence_head,
            "confidence_head_with_markov": self.enable_confidence_head,
        }  # fmt: skip

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> BlockConfig:
        """Reads the config.json that `to_json` wrote."""
        layers = config.get("dflash_config", config)
        whole = {"draft_vocab_size": config["vocab_size"], "markov_rank": 0, "enable_confidence_head": False} | dict(
            config
        )
        whole |= {"mask_token_id": layers["mask_token_id"]}
        whole |= {"aux_layers": tuple(layer + 1 for layer in layers["target_layer_ids"])}
        return cls(**{field.name: whole[field.name] for field in fields(cls)})


def feature_layers(layers: int, count: int) -> tuple[int, ...]:
    """Spreads feature layers evenly between the target's second layer and its third from the end, both included.

    Args:
        layers: the target's.
        count: features; fewer where the target is too shallow.
    """
    low, high = (2, layers - 2) if layers >= 7 else (1, layers - 1)
    return tuple(sorted({round(low + index * (high - low) / max(count - 1, 1)) for index in range(count)}))


def default_config(name: str, target: Mapping[str, Any]) -> BlockConfig:
    """The default draft of a target.

    Args:
        name: dspark or dflash.
        target: its config.json.

    Raises:
        DraftModelError: when the target is no decoder of the known structure.
    """
    base = draft_config_for(target)
    depth = int((target.get("text_config") or target)["num_hidden_layers"])
    # As deep as published drafts for targets of 20 layers and more; a quarter of a shallower target.
    layers = min(DEFAULT_LAYERS, max(1, depth // 4))
    markov = name == "dspark"
    return BlockConfig(
        **vars(replace(base, draft_vocab_size=base.vocab_size, aux_layers=feature_layers(depth, DEFAULT_LAYERS))),
        num_hidden_layers=layers,
        num_target_layers=depth,
        block_size=DEFAULT_PROPOSALS + (not markov),
        sample_from_anchor=markov,
        # Models pad their vocabularies at the end; where they do not, a rare token serves as well, since nothing but
        # mask positions and the anchor is ever embedded.
        mask_token_id=base.vocab_size - 1,
        markov_rank=256 if markov else 0,
        enable_confidence_head=markov,
    )


def adapt(default: BlockConfig, given: Mapping[str, Any], source: str = USER) -> BlockConfig:
    """Applies the user's draft_model_config, or a checkpoint's config.json, to the default of the target.

    Args:
        default: of `default_config`.
        given: the JSON object, whole or partial; what is null counts as not given.
        source: where it comes from.

    Raises:
        DraftModelError: with everything in it that does not fit the target or the architecture.
    """
    values = {key: value for key, value in given.items() if value is not None}
    nested = values.get("dflash_config") or {}
    values |= {key: nested[key] for key in ("mask_token_id", "target_layer_ids") if key in nested}
    if source == USER and values.get("draft_vocab_size", default.vocab_size) != default.vocab_size:
        logger.info("%s: `draft_vocab_size` is without effect; a block draft knows the whole vocabulary", source)
        del values["draft_vocab_size"]
    if problems := _problems(default, values):
        raise DraftModelError([f"{source}: {problem}" for problem in problems])
    own = {key: values.pop(key) for key in (*_OWN_SIZES, "sample_from_anchor", "enable_confidence_head",
                                            "loss_decay_gamma") if key in values}  # fmt: skip
    if "target_layer_ids" in values:
        own["aux_layers"] = tuple(layer + 1 for layer in values["target_layer_ids"])
    rest = {key: value for key, value in values.items() if key not in _DERIVED and key not in _FIXED}
    changed = with_overrides(default, rest, source)
    assert isinstance(changed, BlockConfig)
    return replace(changed, **own)


def _problems(default: BlockConfig, given: Mapping[str, Any]) -> list[str]:
    """What in a configuration no block draft of this target can have."""
    name, depth = default.family, default.num_target_layers
    allowed = {ARCHITECTURES[name], *ALIASES[name]}
    problems = [
        f"`{key}` is {given[key]!r}; allowed: a whole number >= {least}"
        for key, least in _OWN_SIZES.items()
        if key in given and (type(given[key]) is not int or given[key] < least)
    ]
    problems += [
        f"`{key}` is {given[key]!r}; allowed: {value!r}"
        for key, value in _FIXED.items()
        if given.get(key, value) != value
    ]
    if not set(given.get("architectures", ())) <= allowed:
        problems.append(f"`architectures` is {given['architectures']!r}; a {name} draft has {ARCHITECTURES[name]}")
    if bool(given.get("markov_rank", default.markov_rank)) != (name == "dspark"):
        problems.append(f"`markov_rank` is {given['markov_rank']!r}; DFlash has 0, and DSpark more")
    if name == "dflash":
        problems += [f"`{key}` is true; DFlash has none" for key in ("sample_from_anchor", "enable_confidence_head")
                     if given.get(key)]  # fmt: skip
    elif given.get("enable_confidence_head", True) and not given.get("confidence_head_with_markov", True):
        problems.append("`confidence_head_with_markov` is false; the confidence head reads the Markov head's embedding")
    if set(given.get("layer_types", ())) - {_LAYER_TYPE} or given.get("use_sliding_window"):
        problems.append("`layer_types`: only full_attention is trained here")
    if (mask := given.get("mask_token_id", 0)) and type(mask) is int and mask >= default.vocab_size:
        problems.append(f"`mask_token_id` is {mask}; the target's vocabulary has {default.vocab_size} tokens")
    if given.get("draft_vocab_size", default.vocab_size) != default.vocab_size:
        problems.append(f"`draft_vocab_size` is {given['draft_vocab_size']}; a block draft knows the whole vocabulary "
                        f"of {default.vocab_size}")  # fmt: skip
    if given.get("num_target_layers", depth) != depth:
        problems.append(f"`num_target_layers` is {given['num_target_layers']!r}; the target has {depth}")
    ids = given.get("target_layer_ids", [0])
    if not isinstance(ids, list | tuple) or list(ids) != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < depth - 1:
        problems.append(f"`target_layer_ids` is {ids!r}; allowed: ascending numbers from 0 to {depth - 2}")
    gamma = given.get("loss_decay_gamma", 1.0)
    if type(gamma) not in (int, float) or not gamma > 0:
        problems.append(f"`loss_decay_gamma` is {gamma!r}; allowed: a number > 0")
    return problems
