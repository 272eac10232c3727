"""What a training step cannot do without: its multiply-adds, and how fast this machine multiplies matrices."""

from __future__ import annotations

import torch

from common import ANCHORS, BLOCK_LAYERS, MARKOV_RANK, PROPOSALS, TTT_LENGTH, Shape, now
from draft_model.drafts.batch import collate
from draft_model.drafts.dspark.blocks import place_blocks
from draft_model.drafts.eagle3.plan import plan_unroll

FORWARD, BACKWARD = 1, 2  # products per matrix product: y = x W; then dx and dW


def multiply_adds(shape: Shape, family: str, tokens: torch.Tensor, loss_mask: torch.Tensor) -> int:
    """Multiply-adds of one step whose supervised positions all lie in the draft vocabulary.

    Counted: every linear layer of target and draft, forward and backward, on the positions that have a use; the full
    target head on supervised positions (its favourite decides what is supervised); causal attention, two products
    forward and four backward. Not counted: whatever a kernel computes twice, norms, rotations, softmaxes, AdamW.

    Args:
        shape: of target and draft.
        family: eagle3, dflash or dspark.
        tokens: int64 [B, T].
        loss_mask: bool [B, T].
    """
    batch = collate(list(zip(tokens, loss_mask, strict=True)))
    hidden, inner, vocab, draft_vocab = shape.hidden, shape.intermediate, shape.vocab, shape.draft_vocab
    head_dim = hidden // shape.heads
    query, key_value = shape.heads * head_dim, 2 * shape.kv_heads * head_dim
    layer = hidden * (query + key_value) + query * hidden + 3 * hidden * inner  # of the target
    pairs = shape.batch * shape.tokens * (shape.tokens + 1) // 2  # query and key under the causal mask
    all_tokens, both = shape.batch * shape.tokens, FORWARD + BACKWARD
    target = shape.target_layers * (all_tokens * layer + 2 * pairs * query)
    if family != "eagle3":
        blocks = place_blocks(batch, PROPOSALS, ANCHORS)
        size, taught = PROPOSALS + (family == "dflash"), blocks.pairs.shape[1]
        seen = int(blocks.times.sum()) * size + len(blocks.anchors) * size * size  # queries and keys
        draft = 2 * all_tokens * 3 * hidden * hidden + BLOCK_LAYERS * both * (
            all_tokens * hidden * key_value + len(blocks.anchors) * size * layer
        )
        draft += BLOCK_LAYERS * seen * query * (2 + 4)
        # The target's head is frozen, so that the draft's needs no gradient of its own.
        head = taught * vocab * (2 * hidden + (both * MARKOV_RANK if family == "dspark" else 0))
        return int(target + len(blocks.teachers) * vocab * hidden + draft + head)
    plan = plan_unroll(batch, TTT_LENGTH)
    valid, rows, teachers = len(plan.keys), len(plan.rows), len(plan.teachers)
    taught = int((plan.students >= 0).sum())
    target += teachers * vocab * hidden
    draft_pairs = int((plan.windows.row_time + 1).sum())
    # The frozen inputs (features, embeddings) need no gradient of their own.
    draft = 2 * valid * 3 * hidden * hidden + 2 * all_tokens * hidden * (query + key_value)
    draft += both * hidden * (valid * key_value + rows * query + (TTT_LENGTH - 1) * rows * (query + key_value))
    draft += both * TTT_LENGTH * rows * (query * hidden + 3 * hidden * inner)
    draft += TTT_LENGTH * draft_pairs * query * (2 + 4)
    return int(target + draft + both * taught * draft_vocab * hidden)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of the machine's matrix product, the best of a few."""
    side = 2_048 if device.type == "cpu" else 8_192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = now(device)
        torch.mm(left, right)
        best = min(best, now(device) - started)
    return side**3 / best
