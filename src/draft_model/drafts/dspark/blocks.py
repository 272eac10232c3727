"""Where the blocks of a batch stand and what each proposal learns: all indices, worked out once, on the host.

A block's anchor a is a token of a reply whose successor is the reply's too: decoding starts a round at no other. Its
proposal j speaks of x[a+1+j], has x[a+j] before it, and its teacher is the target at a+j. Conversations are packed one
after the other. A conversation of more anchors than are wanted gets a random choice of them, by its `Batch.keys`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draft_model.drafts.batch import Batch
from draft_model.drafts.counts import Replies
from draft_model.drafts.dspark.model import Attend
from draft_model.drafts.kernels import compiled_flex, flex_mask, flex_rows

SCORES = 1 << 23  # scores that exist at once on a CPU: 32 MB in float32


@dataclass(frozen=True)
class Blocks:
    """N blocks of a batch of T packed tokens."""

    tokens: Tensor  # token ids, int64 [T]
    positions: Tensor  # of each token in its conversation, int64 [T]
    anchors: Tensor  # packed positions, ascending, int64 [N]
    places: tuple[int, ...]  # the same on the host
    times: Tensor  # their positions in their conversations, int64 [N]
    previous: Tensor  # the token before each proposal, int64 [N, K]
    learnt: Tensor  # which proposals are supervised: those up to the reply's end, bool [N, K]
    teachers: Tensor  # packed positions that teach, ascending, int64 [M]
    pairs: Tensor  # block, proposal and teacher's number of all that is learnt, by teacher, int64 [3, P]
    taught: tuple[int, ...]  # the teachers' numbers of the pairs, on the host, [P]
    replies: Replies | None  # of the blocks; None unless there is one wherever decoding may start a round
    # of each conversation with blocks: its first and last + 1 block, and its first packed token
    spans: tuple[tuple[int, int, int], ...]


def place_blocks(batch: Batch, steps: int, limit: int | None) -> Blocks:
    """Chooses the anchors, at most `limit` of a conversation, and works the indices out for K proposals."""
    real = torch.arange(batch.tokens.shape[1]) < batch.lengths.unsqueeze(1)
    predicted = batch.predicted & real
    begins = predicted.clone()
    begins[:, 0] = False
    begins[:, 1:] &= predicted[:, :-1]  # the anchor itself is the assistant's
    chosen = begins.clone()
    for row in (begins.sum(1) > (limit or begins.shape[1])).nonzero()[:, 0].tolist():
        generator = np.random.default_rng(int(batch.keys[row]))
        order = generator.permutation(int(begins[row].sum()))[limit:]
        chosen[row, begins[row].nonzero()[:, 0][torch.from_numpy(order)]] = False
    predicted, tokens = predicted[real], batch.tokens[real]  # packed
    conversation = torch.arange(len(batch.lengths)).repeat_interleave(batch.lengths)
    starts = batch.lengths.cumsum(0) - batch.lengths
    positions = torch.arange(len(tokens)) - starts[conversation]
    anchors = chosen[real].nonzero()[:, 0]
    reads = (anchors.unsqueeze(1) + torch.arange(steps)).clamp(max=len(tokens) - 1)  # [N, K]
    # No position predicts across a conversation's end, so a leading run stays inside its conversation and reply.
    learnt = predicted[reads].cummin(1).values if len(anchors) else torch.zeros(0, steps, dtype=torch.bool)
    teachers, index = reads[learnt].unique(return_inverse=True)
    order = index.argsort(stable=True)
    pairs = torch.cat((learnt.nonzero().T, index.unsqueeze(0)))[:, order]  # a chunk's teachers follow one another
    numbers = torch.arange(len(anchors))
    of = conversation[anchors]
    counts = torch.bincount(of, minlength=len(batch.lengths)).tolist()
    ends = np.cumsum(counts).tolist()
    return Blocks(
        tokens=tokens,
        positions=positions,
        anchors=anchors,
        places=tuple(anchors.tolist()),
        times=positions[anchors],
        previous=tokens[reads],
        learnt=learnt,
        teachers=teachers,
        pairs=pairs,
        taught=tuple(pairs[2].tolist()),
        replies=Replies.of(numbers, anchors - numbers) if torch.equal(chosen, begins) else None,
        spans=tuple((end - n, end, start) for end, n, start in zip(ends, counts, starts.tolist(), strict=True) if n),
    )


def block_attention(backend: str, blocks: Blocks, size: int, heads: int) -> Attend:
    """The attention of one batch's blocks of `size` positions: by flex_attention, or in chunks for sdpa."""
    if backend == "flex_attention":
        return functools.partial(_flex, block_mask(blocks, size))
    chunks = []
    for first, last, start in blocks.spans:
        step = max(1, SCORES // (size * heads * (blocks.places[last - 1] - start)))
        for at in range(first, last, step):
            end = min(at + step, last)
            chunks.append((slice(at, end), slice(start, blocks.places[end - 1])))

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
    """FlexAttention's mask of N S queries over T context positions and N S of the blocks.

    Each query sees the context of its conversation before its anchor, and its own block.
    """
    length, count = len(blocks.tokens), len(blocks.anchors)
    near = length + size * torch.arange(count, device=blocks.anchors.device)
    runs = (blocks.anchors - blocks.times, blocks.anchors, near, near + size)
    first, last, near_first, near_last = (end.repeat_interleave(size) for end in runs)
    return flex_mask([(first, last), (near_first, near_last)], length + count * size)


def _flex(mask: Any, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor) -> Tensor:
    keys, values = (torch.cat((far, near.flatten(0, 1))) for far, near in ((context_k, k), (context_v, v)))
    rows = [flex_rows(x) for x in (q.flatten(0, 1), keys, values)]
    out: Tensor = compiled_flex(q.is_cuda)(*rows, block_mask=mask, enable_gqa=True)
    attended: Tensor = out[0, :, : q.shape[:2].numel()].transpose(0, 1).unflatten(0, q.shape[:2])
    return attended
