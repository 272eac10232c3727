"""Where the blocks of a batch stand and what each proposal learns: all indices, worked out once, on the host.

A block's anchor a is a token of a reply whose successor is the reply's too: decoding starts a round at no other. Its
proposal j speaks of x[a+1+j], has x[a+j] before it, and its teacher is the target at a+j. Conversations are packed one
after the other. A conversation of more anchors than are wanted gets a random choice of them, by its `Batch.keys`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draft_model.drafts.batch import Batch, to_device


@dataclass(frozen=True)
class Blocks:
    """N blocks of a batch of T packed tokens."""

    steps: int  # K, proposals of a block
    tokens: Tensor  # token ids, int64 [T]
    positions: Tensor  # of each token in its conversation, int64 [T]
    conversation: Tensor  # of each token, int64 [T]
    anchors: Tensor  # packed positions, ascending, int64 [N]
    times: Tensor  # their positions in their conversations, int64 [N]
    previous: Tensor  # the token before each proposal, int64 [N, K]
    learnt: Tensor  # which proposals are supervised: those up to the reply's end, bool [N, K]
    teachers: Tensor  # packed positions that teach, ascending, int64 [M]
    pairs: Tensor  # block, proposal and teacher's number of all that is learnt, by teacher, int64 [3, P]
    chunks: tuple[tuple[int, int, int, int], ...]  # the first and last + 1 pair of each head, and of its teachers
    reply_rows: Tensor  # 0, ..., N - 1: a round of decoding may start at every block
    reply_ends: Tensor  # for each block, which number the first block after its reply has, int64 [N]
    reply_starts: Tensor  # first block of each reply, int64 [replies]
    longest_reply: int  # most blocks of a reply
    # of each conversation with blocks: its first and last + 1 block, and its first packed token
    spans: tuple[tuple[int, int, int], ...]
    whole: bool  # whether there is a block wherever decoding may start a round

    def to(self, device: torch.device) -> Blocks:
        """The same on another device."""
        moved: dict[str, Any] = {name: to_device(x, device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def place_blocks(batch: Batch, steps: int, limit: int | None, size: int = 256) -> Blocks:
    """Chooses the anchors, at most `limit` of a conversation, and works the indices out for K proposals.

    Heads take the pairs in chunks of `size`.
    """
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
    taught = pairs[2].tolist()
    edges = [*range(0, len(taught), size), len(taught)]
    starts_reply = torch.ones(len(anchors), dtype=torch.bool)
    starts_reply[1:] = anchors[1:] != anchors[:-1] + 1
    sizes = torch.bincount(starts_reply.cumsum(0) - 1) if len(anchors) else torch.zeros(0, dtype=torch.int64)
    of = conversation[anchors]
    counts = torch.bincount(of, minlength=len(batch.lengths)).tolist()
    ends = np.cumsum(counts).tolist()
    return Blocks(
        steps=steps,
        tokens=tokens,
        positions=positions,
        conversation=conversation,
        anchors=anchors,
        times=positions[anchors],
        previous=tokens[reads],
        learnt=learnt,
        teachers=teachers,
        pairs=pairs,
        chunks=tuple((start, end, taught[start], taught[end - 1] + 1) for start, end in pairwise(edges)),
        reply_rows=torch.arange(len(anchors)),
        reply_ends=sizes.cumsum(0).repeat_interleave(sizes),
        reply_starts=starts_reply.nonzero()[:, 0],
        longest_reply=int(sizes.max()) if len(anchors) else 0,
        spans=tuple((end - n, end, start) for end, n, start in zip(ends, counts, starts.tolist(), strict=True) if n),
        whole=bool((chosen == begins).all()),
    )
