"""What a training step cannot do without: its multiply-adds, and how fast this machine multiplies matrices."""

from __future__ import annotations

import torch

from common import TTT_LENGTH, Shape, now
from draft_model.drafts.batch import collate
from draft_model.drafts.eagle3.plan import plan_unroll

FORWARD, BACKWARD = 1, 2  # products per matrix product: y = x W; then dx and dW


def multiply_adds(shape: Shape, tokens: torch.Tensor, loss_mask: torch.Tensor) -> int:
    """Multiply-adds of one step whose supervised positions all lie in the draft vocabulary.

    Counted: every linear layer of target and draft, forward and backward, on the positions that have a use; the full
    target head on supervised positions (its favourite decides what is supervised); causal attention, two products
    forward and four backward. Not counted: whatever a kernel computes twice, norms, rotations, softmaxes, AdamW.

    Args:
        shape: of target and draft.
        tokens: int64 [B, T].
        loss_mask: bool [B, T].
    """
    plan = plan_unroll(collate(list(zip(tokens, loss_mask, strict=True))), TTT_LENGTH)
    hidden, inner, vocab, draft_vocab = shape.hidden, shape.intermediate, shape.vocab, shape.draft_vocab
    head_dim = hidden // shape.heads
    query, key_value = shape.heads * head_dim, 2 * shape.kv_heads * head_dim
    layer = hidden * (query + key_value) + query * hidden + 3 * hidden * inner  # of the target
    pairs = shape.batch * shape.tokens * (shape.tokens + 1) // 2  # query and key under the causal mask
    all_tokens, valid, rows, teachers = shape.batch * shape.tokens, len(plan.keys), len(plan.rows), len(plan.teachers)
    taught = int((plan.students >= 0).sum())
    target = shape.target_layers * (all_tokens * layer + 2 * pairs * query) + teachers * vocab * hidden
    draft_pairs = int((plan.windows.row_time + 1).sum())
    both = FORWARD + BACKWARD
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
