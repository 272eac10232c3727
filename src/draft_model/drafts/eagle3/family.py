"""EAGLE-3 as a `Family`, and what training it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from draft_model.drafts.base import Costs, Family, later
from draft_model.drafts.eagle3.config import ARCHITECTURES, SWITCHES, DraftConfig, draft_config_for, with_overrides


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


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an EAGLE-3 draft of any trainer; some name no architecture."""
    return not config.get("architectures") or config["architectures"][0] in ARCHITECTURES


def is_eagle31(config: Mapping[str, Any]) -> bool:
    """Whether one of EAGLE-3.1's switches is on."""
    return is_eagle3(config) and any(
        config.get(name) or (config.get("eagle_config") or {}).get(name) for name in SWITCHES
    )


_CREATE = later("eagle3.model:Eagle3Draft")
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
    owns=lambda config: is_eagle3(config) and not is_eagle31(config),
    default_shape=draft_config_for,
    adapt=with_overrides,
    create=_CREATE,
    objective=later("eagle3.step:Objective"),
    proposer=later("eagle3.decode:ChainProposer"),
    costs=costs,
    save=later("files:save_draft"),
    load=partial(later("files:load_draft"), DraftConfig.from_json, _CREATE, "EAGLE-3"),
    read=later("eagle3.export:canonical"),
    vocabulary=later("files:vocabulary_of"),
    export=later("eagle3.export:exported"),
)
EAGLE31 = replace(
    EAGLE3,
    name="eagle3.1",
    title="EAGLE-3.1",
    owns=is_eagle31,
    default_shape=lambda target, _proposals=0: replace(draft_config_for(target), fc_norm=True, norm_output=True),
)
