"""DSpark and DFlash as `Family`s, and what training them costs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from draft_model.drafts.base import Costs, Family, later
from draft_model.drafts.dspark.config import ALIASES, ARCHITECTURES, BlockConfig, adapt, default_config


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
        # The gradient of w2, head and w2 as one matrix; logits of target and draft, and four matrices in float32.
        chunk_bytes=lambda width: (
            vocabulary
            * ((4.0 * rank + (hidden + rank) * width if rank else 0.0) + CHUNK_PAIRS["cuda"] * (2 * width + 4 * 4))
        ),
    )


def _owns(name: str, config: Mapping[str, Any]) -> bool:
    return not {ARCHITECTURES[name], *ALIASES[name]}.isdisjoint(config.get("architectures") or ())


def _family(name: str, title: str, sglang_algorithm: str) -> Family:
    create = later("dspark.model:BlockDraft")
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
        create=create,
        objective=later("dspark.objective:Objective"),
        proposer=later("dspark.decode:BlockProposer"),
        costs=costs,
        save=later("files:save_draft"),
        load=partial(later("files:load_draft"), BlockConfig.from_json, create, title),
        read=later("dspark.export:canonical"),
        vocabulary=later("files:vocabulary_of"),
        export=later("dspark.export:exported"),
    )


DSPARK = _family("dspark", "DSpark", "DSPARK")
DFLASH = _family("dflash", "DFlash", "DFLASH")
