"""A block draft's configuration: derived from the target's, changed by the user's, written for vLLM and SGLang."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from draft_model.drafts.base import Costs, Family, later
from draft_model.drafts.shape import (
    FLAG,
    POSITIVE,
    USER,
    LayerShape,
    Rule,
    adapt_layers,
    among,
    is_ascending,
    only,
    target_layers,
    whole,
)  # fmt: skip

logger = logging.getLogger(__name__)

DEFAULT_LAYERS = 5
DEFAULT_PROPOSALS = 7
ARCHITECTURES = {"dspark": "Qwen3DSparkModel", "dflash": "DFlashDraftModel"}
ALIASES = {"dspark": {"DSparkDraftModel", "DSparkSpeculator"}, "dflash": {"DFlashSpeculator"}}
_CHAINS = ("fc_norm", "norm_before_fc", "norm_output", "eagle_aux_hidden_state_layer_ids", "eagle_config")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(LayerShape):
    """The shape of a block draft: layers like Qwen3's over the target's whole vocabulary."""

    num_hidden_layers: int  # L
    num_target_layers: int  # the target's
    block_size: int  # S, positions of a block: the anchor and S - 1 mask tokens
    # whether the anchor's own position proposes too. DSpark's does, and proposes S tokens; DFlash proposes S - 1, each
    # at the position of its mask token.
    sample_from_anchor: bool
    mask_token_id: int  # target token whose embedding stands at positions that are to be filled in
    markov_rank: int = 0  # r of the Markov head; 0: none, which is DFlash
    enable_confidence_head: bool = False  # whether there is one
    num_anchors: int = 512  # most blocks of a conversation in one training step
    loss_decay_gamma: float = 4.0  # proposal j counts exp(-j / gamma) in the loss
    dpace_alpha: float = 0.0  # smoothing of D-PACE's weights, which replace these; 0: they do not

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
        config = self.layer_json() | {name: getattr(self, name) for name in _OWN} | {
            "architectures": [ARCHITECTURES[self.family]], "model_type": "qwen3",
            "layer_types": ["full_attention"] * self.num_hidden_layers,
        }  # fmt: skip
        del config["draft_vocab_size"]
        if self.family == "dspark":
            head = {"markov_head_type": "vanilla", "confidence_head_with_markov": self.enable_confidence_head}
            return config | layers | head
        for name in ("markov_rank", "enable_confidence_head", "mask_token_id"):
            del config[name]
        return config | {"dflash_config": layers}


_OWN = tuple(field.name for field in fields(BlockConfig) if field.name not in LayerShape.__dataclass_fields__)


def feature_layers(layers: int, count: int) -> tuple[int, ...]:
    """Spreads `count` feature layers evenly from the target's second layer to its third from the end.

    There are fewer where the target is too shallow.
    """
    low, high = (2, layers - 2) if layers >= 7 else (1, layers - 1)
    return tuple(sorted({round(low + index * (high - low) / max(count - 1, 1)) for index in range(count)}))


def default_config(name: str, target: Mapping[str, Any], proposals: int = DEFAULT_PROPOSALS) -> BlockConfig:
    """The default draft of a target, by its config.json: of the family `name`, with blocks of `proposals` tokens.

    Raises:
        DraftModelError: when the target is no decoder of the known structure.
    """
    sizes = target_layers(target)
    depth, markov = int((target.get("text_config") or target)["num_hidden_layers"]), name == "dspark"
    return BlockConfig(
        **sizes | {"draft_vocab_size": sizes["vocab_size"], "aux_layers": feature_layers(depth, DEFAULT_LAYERS)},
        # As deep as published drafts for targets of 20 layers and more; a quarter of a shallower target.
        num_hidden_layers=min(DEFAULT_LAYERS, max(1, depth // 4)),
        num_target_layers=depth,
        block_size=max(2, proposals + (not markov)),
        sample_from_anchor=markov,
        # Models pad their vocabularies at the end; where they do not, a rare token serves as well, since nothing but
        # mask positions and the anchor is ever embedded.
        mask_token_id=sizes["vocab_size"] - 1,
        markov_rank=256 if markov else 0,
        enable_confidence_head=markov,
    )


def adapt(default: BlockConfig, given: Mapping[str, Any], source: str = USER) -> BlockConfig:
    """Applies the user's draft_model_config, or a checkpoint's config.json, to the default; see `adapt_layers`."""
    values = {key: value for key, value in given.items() if value is not None or key == "rope_scaling"}
    nested = values.get("dflash_config") or {}
    values |= {key: nested[key] for key in ("mask_token_id", "target_layer_ids") if key in nested}
    if source == USER and values.pop("draft_vocab_size", default.vocab_size) != default.vocab_size:
        logger.info("%s: `draft_vocab_size` is without effect; a block draft knows the whole vocabulary", source)
    problems = []
    without_markov = not values.get("confidence_head_with_markov", True)
    if default.markov_rank and without_markov and values.get("enable_confidence_head", True):
        problems.append("`confidence_head_with_markov` is false; the confidence head reads the Markov head's embedding")
    sizes = adapt_layers(default, values, source, _rules(default), problems)
    own = {key: values[key] for key in _OWN if key in values}
    if "target_layer_ids" in values:
        own["aux_layers"] = tuple(layer + 1 for layer in values["target_layer_ids"])
    return replace(default, **sizes, **own)


def _rules(default: BlockConfig) -> dict[str, Rule]:
    depth, vocabulary, has_heads = default.num_target_layers, default.vocab_size, default.family == "dspark"
    switch = FLAG if has_heads else ("false, for DFlash has none", lambda given: given is False)
    rank = whole(1) if has_heads else only(0)
    return {
        "architectures": among(ARCHITECTURES[default.family], *ALIASES[default.family]),
        "num_hidden_layers": whole(1), "block_size": whole(2), "num_anchors": whole(1),
        "mask_token_id": whole(0, vocabulary - 1), "num_target_layers": only(depth),
        "draft_vocab_size": (f"the whole vocabulary of {vocabulary}", only(vocabulary)[1]),
        "markov_rank": (f"{rank[0]}; DFlash has 0, and DSpark more", rank[1]), "enable_confidence_head": switch,
        "sample_from_anchor": switch, "loss_decay_gamma": POSITIVE,
        "dpace_alpha": ("0 (off) to 1", lambda given: type(given) in (int, float) and 0 <= given <= 1),
        "target_layer_ids": (
            f"ascending numbers from 0 to {depth - 2}",
            lambda ids: is_ascending(ids) and ids[0] >= 0 and ids[-1] <= depth - 2,
        ),
        # The other Markov heads have tensors that this draft does not.
        "markov_head_type": only("vanilla"), "is_causal": only(False),
        # Without a meaning for a draft that holds neither embedding nor head, or looked at elsewhere.
        **dict.fromkeys(("confidence_head_with_markov", "dflash_config", "tie_word_embeddings"), ("", lambda _: True)),
        **dict.fromkeys(_CHAINS, ("nothing, for it is no setting of a block draft", lambda given: not given)),
    }  # fmt: skip


def costs(shape: BlockConfig, _steps: int) -> Costs:
    """What a draft costs, with a block at every supervised position: fewer where a conversation has over num_anchors.

    The rows of a block count in full for each of its S positions; their activations are what autograd keeps.
    """
    from draft_model.drafts.dspark.objective import CHUNK_PAIRS

    hidden, inner, size, layers = shape.hidden_size, shape.intermediate_size, shape.block_size, shape.num_hidden_layers
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    rank, vocabulary = shape.markov_rank, shape.vocab_size
    features = len(shape.aux_layers) * hidden * hidden
    layer = 2 * queries * hidden + 2 * keys * hidden + 3 * hidden * inner
    heads = 2 * vocabulary * rank + (hidden + rank + 1 if shape.enable_confidence_head else 0)
    norms = 2 * hidden + layers * 2 * (hidden + shape.head_dim)
    return Costs(
        parameters=features + layers * layer + norms + heads,
        token_numbers=3 * hidden + layers * 6 * keys,
        row_numbers=lambda _number, _memory: (
            size * (layers * (6 * hidden + 7 * queries + 7 * keys + 4 * inner) + 4 * hidden)
        ),
        token_flops=6 * (features + layers * 2 * keys * hidden),
        row_flops=lambda tokens: (
            size * layers * (6 * layer + 3 * 2 * tokens * queries)
            # The draft's head and its gradient by the hidden state; the head itself is not trained, the Markov head is.
            + shape.proposals * vocabulary * (4 * hidden + 6 * rank)
        ),
        # The gradient of w2, head and w2 as one matrix; logits of target and draft.
        chunk_bytes=lambda width: (
            vocabulary * ((4.0 * rank + (hidden + rank) * width if rank else 0.0) + CHUNK_PAIRS["cuda"] * 2 * width)
        ),
    )


def _owns(name: str, config: Mapping[str, Any]) -> bool:
    return not {ARCHITECTURES[name], *ALIASES[name]}.isdisjoint(config.get("architectures") or ())


def _family(name: str, title: str, sglang_algorithm: str) -> Family:
    return Family(
        name=name,
        title=title,
        vllm_method=name,
        sglang_algorithm=sglang_algorithm,
        sglang_options=lambda proposals: {"speculative-num-draft-tokens": proposals + 1},
        unused=("ttt_length",),
        default_loss="tv",
        owns=partial(_owns, name),
        default_shape=partial(default_config, name),
        adapt=adapt,
        create=later("dspark.model:BlockDraft"),
        objective=later("dspark.objective:Objective"),
        proposer=later("dspark.model:BlockProposer"),
        costs=costs,
        read=later("dspark.export:canonical"),
        export=later("dspark.export:exported"),
    )


DSPARK = _family("dspark", "DSpark", "DSPARK")
DFLASH = _family("dflash", "DFlash", "DFLASH")
