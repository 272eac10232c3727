"""Attention of blocks: each sees the target's features before its anchor, and itself whole; no other block.

The dense mask of that is N S x (T + N S), nearly all of it empty. On a CPU blocks are taken a few at a time, with the
context up to the last of their anchors and scores that are made again for the backward pass; on a GPU FlexAttention
skips what is masked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draft_model.drafts.dspark.blocks import Blocks
from draft_model.drafts.dspark.model import Attend

SCORES = 1 << 23
"""Scores that exist at once on a CPU: 32 MB in float32."""


def block_attention(backend: str, blocks: Blocks, size: int, heads: int) -> Attend:
    """The attention of one batch's blocks of `size` positions: by flex_attention, or in chunks for sdpa."""
    if backend == "flex_attention":
        return functools.partial(_flex, block_mask(blocks, size))
    chunks = []
    for first, last, start in blocks.spans:
        anchors = blocks.anchors[first:last].tolist()
        step = max(1, SCORES // (size * heads * (anchors[-1] - start)))
        chunks += [
            (slice(at, min(at + step, last)), slice(start, anchors[min(at + step, last) - first - 1]))
            for at in range(first, last, step)
        ]

    def attend(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor) -> Tensor:
        parts: list[Tensor] = [
            checkpoint(
                attend_dense, q[mine], k[mine], v[mine], context_k[seen], context_v[seen], blocks.times[mine],
                use_reentrant=False, preserve_rng_state=False,
            )
            for mine, seen in chunks
        ]  # fmt: skip
        return torch.cat(parts)

    return attend


def attend_dense(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, times: Tensor) -> Tensor:
    """Attention of n blocks over T context positions, of which each sees `times` (int64 [n]), and over themselves.

    q is [n, S, heads, d], k and v [n, S, kv_heads, d], those of the context [T, kv_heads, d]. Returns [n, S, heads, d].
    """
    (count, size, _, width), kv_heads, length = q.shape, k.shape[2], len(context_k)
    grouped = (q * width**-0.5).unflatten(2, (kv_heads, -1)).permute(2, 0, 1, 3, 4).flatten(2, 3)  # [kv, n, S g, d]
    far = (grouped.flatten(1, 2) @ context_k.permute(1, 2, 0)).unflatten(1, (count, -1))  # [kv, n, S g, T]
    hidden = torch.arange(length, device=q.device) >= times.unsqueeze(1)  # [n, T]
    far = far.masked_fill(hidden.unsqueeze(1), -torch.inf)
    near = grouped @ k.permute(2, 0, 3, 1)  # [kv, n, S g, S]
    p = torch.softmax(torch.cat((far, near), -1), -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    out = (p[..., :length].flatten(1, 2) @ context_v.transpose(0, 1)).unflatten(1, (count, -1))
    out = out + p[..., length:] @ v.permute(2, 0, 1, 3)  # [kv, n, S g, d]
    attended: Tensor = out.unflatten(2, (size, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return attended


def block_mask(blocks: Blocks, size: int) -> Any:
    """FlexAttention's mask of N S queries over T context positions and N S of the blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    length, of, positions = len(blocks.tokens), blocks.conversation, blocks.positions
    own, times = of[blocks.anchors], blocks.times

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block, token = query // size, key.clamp(max=length - 1)
        context = (key < length) & (of[token] == own[block]) & (positions[token] < times[block])
        return context | ((key >= length) & ((key - length) // size == block))

    queries = len(blocks.anchors) * size
    return create_block_mask(sees, None, None, queries, length + queries, device=blocks.tokens.device.type)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(mask: Any, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor) -> Tensor:
    if q.is_cuda:
        flex = _compiled_flex()
    else:
        from torch.nn.attention.flex_attention import flex_attention as flex
    keys, values = (torch.cat((far, near.flatten(0, 1))) for far, near in ((context_k, k), (context_v, v)))
    rows = [x.transpose(0, 1).unsqueeze(0) for x in (q.flatten(0, 1), keys, values)]  # [1, heads, rows, d]
    out: Tensor = flex(*rows, block_mask=mask, enable_gqa=True)
    attended: Tensor = out[0].transpose(0, 1).unflatten(0, q.shape[:2])
    return attended
