r"""What a block draft minimises: each proposal's distance to the target, and a confidence that means something.

    total = sum_blocks sum_j (w_j l_j + exp(-j / gamma) BCE(c_j, alpha_j))          w_j = exp(-j / gamma)

with p the target's softmax at a proposal's teacher, z = head u + w2 e the draft's logits there (e the Markov embedding
of the token before), q = softmax(z), y = argmax p, alpha = sum_v min(p, q) the probability that sampling accepts, and

    l = a CE + b TV + c KL     CE = -log q(y)    dz = q - 1_y
                               TV = 1 - alpha    dz = q (s - 1[q < p]),  s = sum_{q < p} q
                               KL = -p.log q     dz = q - p

DSpark's own recipe is a = 0.1, b = 0.9 (`tv`); `kl` is c = 1 alone; `lk` weighs KL by exp(-3 alpha) and TV by the rest.

With D-PACE (arXiv 2605.18810) each block has weights of its own, which are no part of the gradient: how much the length
that is kept would grow with proposal j, by the draft's confidence q_i in y_i, smoothed by a,

    w_j = sum_{m >= j} prod_{i <= m} ((1 - a) q_i + a)

Loss and gradients need z, p and q of one proposal at a time, so the heads run a chunk of (block, proposal) pairs at a
time, ordered by teacher: one target head and one softmax p of a teacher serve all that it teaches. Head and w2 are one
matrix over (u, e), and the gradients leave at once: logits of all blocks never exist. Softmax and loss are one kernel
(triton_loss.py) on a GPU; a CPU takes a few rows at a time, which stay in the cache. Below the heads is plain autograd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from draft_model.drafts import kernels
from draft_model.drafts.batch import Batch, move
from draft_model.drafts.counts import Counts
from draft_model.drafts.dspark.blocks import Blocks, block_attention, place_blocks
from draft_model.drafts.dspark.model import BlockDraft
from draft_model.drafts.layers import rotary_table

if TYPE_CHECKING:
    from draft_model.target.model import Target

CHUNK_PAIRS = {"cpu": 512, "cuda": 2048}  # proposals in one head: 512 x 50,000 bfloat16 logits are 50 MB
CACHED_ROWS = 16
"""Proposals whose float32 probabilities a CPU works on at once: 16 x 50,000 are 3 MB, and there are four of them."""
LOSSES = {"tv": (0.1, 0.9, 0.0), "kl": (0.0, 0.0, 1.0)}
"""Weights of hard cross-entropy, total variation and soft cross-entropy; those of `lk` depend on the position."""


class Objective:
    """The loss (tv, kl or lk) of a block draft against its target, which is frozen and in the compute type `dtype`.

    attention_backend is flex_attention or sdpa; no conversation is longer than max_length tokens.
    """

    def __init__(
        self,
        draft: BlockDraft,
        target: Target,
        _ttt_length: int,
        attention_backend: str,
        dtype: torch.dtype,
        max_length: int,
        loss: str,
    ) -> None:
        self.draft, self.target, self.loss, self.dtype = draft, target, loss, dtype
        self.backend = kernels.choose_backend(attention_backend, target.device, dtype)
        shape = draft.config
        self.rotary = rotary_table(shape, target.device, max_length + shape.block_size, dtype)
        self.decay = torch.exp(-torch.arange(shape.proposals, device=target.device) / shape.loss_decay_gamma)
        # With room for w2 in the compute type, [V, H + r]; the target's part is copied once.
        room = target.head.new_empty(len(target.head), shape.markov_rank)
        self.head = torch.cat((target.head, room), 1) if shape.markov_rank else target.head

    def __call__(self, batch: Batch, states: list[Tensor]) -> tuple[Tensor, Counts]:
        """The loss summed over blocks and proposals, to be divided by the global count of blocks; sums per proposal.

        Without gradients every token that a round of decoding may start at gets a block, so that the acceptance length
        is the one that decoding would have.
        """
        draft, shape = self.draft, self.draft.config
        limit = shape.num_anchors if torch.is_grad_enabled() else None
        blocks = move(place_blocks(batch, shape.proposals, limit), self.target.device)
        if not len(blocks.anchors):
            nothing = sum(parameter.sum() for parameter in draft.parameters()) * 0.0
            return torch.as_tensor(nothing), self.no_counts()
        features, final = torch.cat(states).split((len(shape.aux_layers) * shape.hidden_size, shape.hidden_size), -1)
        hidden = self._propose(blocks, features)[:, shape.first :]  # [N, K, H]
        embedded = weight = None
        if shape.markov_rank:
            embedded = functional.embedding(blocks.previous, draft.markov_head.markov_w1.weight).to(self.dtype)
            weight = draft.markov_head.markov_w2.weight
            self.head[:, shape.hidden_size :].copy_(weight.detach())
        weights = self.decay.expand(blocks.learnt.shape)
        if shape.dpace_alpha and torch.is_grad_enabled():
            sure = _Teaching(self, final, blocks, weights, learn=False)
            with torch.no_grad():
                _Heads.apply(sure, hidden, embedded, weight)  # type: ignore[no-untyped-call]
            smooth = (1.0 - shape.dpace_alpha) * sure.confidence + shape.dpace_alpha
            weights = (smooth.cumprod(1) * blocks.learnt).flip(1).cumsum(1).flip(1)
        teaching = _Teaching(self, final, blocks, weights, torch.is_grad_enabled())
        loss: Tensor = _Heads.apply(teaching, hidden, embedded, weight)  # type: ignore[no-untyped-call]
        if shape.enable_confidence_head:
            read = torch.cat((hidden, embedded), -1).float()  # type: ignore[arg-type]
            confidence = draft.confidence_head.proj(read)[..., 0]  # [N, K]
            error = functional.binary_cross_entropy_with_logits(confidence, teaching.overlap, reduction="none")
            loss = loss + (error * blocks.learnt * self.decay).sum()
        parts = torch.stack((teaching.losses, blocks.learnt, teaching.agree, teaching.overlap)) * blocks.learnt
        sums = parts.sum(1, dtype=torch.float64)
        return loss, Counts.of(sums, blocks.learnt.T, teaching.agree.T, blocks.replies)

    def no_counts(self) -> Counts:
        """The counts of no conversation, on the device."""
        return Counts.zeros(self.draft.config.proposals, self.target.device)

    def _propose(self, blocks: Blocks, features: Tensor) -> Tensor:
        """The final hidden states of all blocks, [N, S, H], from the target's features [T, n H]."""
        draft, shape = self.draft, self.draft.config
        ids = torch.full((len(blocks.anchors), shape.block_size), shape.mask_token_id, device=features.device)
        ids[:, 0] = blocks.tokens[blocks.anchors]
        x = functional.embedding(ids, self.target.embedding).to(self.dtype)
        offsets = torch.arange(shape.block_size, device=features.device)
        table = self.rotary[:, (blocks.times.unsqueeze(1) + offsets).flatten()]
        behind = self.rotary[:, blocks.positions]
        context = draft.context(features)
        attend = block_attention(self.backend, blocks, shape.block_size, shape.num_attention_heads)
        for layer in draft.layers:
            x = layer(x, table, layer.self_attn.keys_values(context, behind), attend)
        hidden: Tensor = draft.norm(x)
        return hidden


class _Teaching:
    """The target's side of the heads, and what they found out of the N blocks' K proposals."""

    def __init__(self, objective: Objective, final: Tensor, blocks: Blocks, weights: Tensor, learn: bool) -> None:
        self.logits, self.loss, self.blocks, self.learn = objective.target.logits, objective.loss, blocks, learn
        self.head = objective.head  # the draft's in the compute type, beside it w2 where there is one, [V, H or H + r]
        self.final = final  # the target's final hidden states, [T, H]
        self.weights = weights  # of the proposals, float32 [N, K]
        # Losses, the draft's probabilities of the target's favourites, and alpha; float32 [N, K].
        self.losses, self.confidence, self.overlap = torch.zeros(3, *weights.shape, device=final.device)
        self.agree = torch.zeros_like(self.losses, dtype=torch.bool)  # whether both have the same favourite


class _Heads(torch.autograd.Function):
    """All proposals' heads and losses; the gradients of hidden states, Markov embeddings and w2 are made on the way."""

    @staticmethod
    def forward(
        ctx: Any, teaching: _Teaching, hidden: Tensor, embedded: Tensor | None, weight: Tensor | None
    ) -> Tensor:  # fmt: skip
        blocks, learn, matrix = teaching.blocks, teaching.learn, teaching.head
        read = hidden if embedded is None else torch.cat((hidden, embedded), -1)  # [N, K, H or H + r]
        ctx.width = hidden.shape[-1]
        grad = torch.zeros_like(read) if learn else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learn and weight is not None else None
        size = CHUNK_PAIRS[hidden.device.type]
        for start in range(0, len(blocks.taught), size):
            end = min(start + size, len(blocks.taught))
            first, last = blocks.taught[start], blocks.taught[end - 1] + 1
            block, number, teacher = blocks.pairs[:, start:end]
            logits = teaching.logits(teaching.final[blocks.teachers[first:last]])
            rows = read[block, number]  # [C, H + r]
            z = rows @ matrix.T
            if kernels.fused(z):
                _distil_fused(teaching, block, number, logits, teacher - first, z)
            else:
                top = logits.max(-1).indices  # several times as fast as argmax in bfloat16
                for at in range(start, end, CACHED_ROWS):
                    part, past = slice(at - start, at - start + CACHED_ROWS), min(at + CACHED_ROWS, end)
                    low, high = blocks.taught[at], blocks.taught[past - 1] + 1
                    p = torch.softmax(logits[low - first : high - first], -1, dtype=torch.float32)  # once per teacher
                    taught = teacher[part]
                    _distil(teaching, block[part], number[part], p[taught - low], top[taught - first], z[part])
            if grad is not None:
                grad[block, number] = z @ matrix
                if grad_weight is not None:
                    kernels.accumulate(grad_weight, z.T, rows[:, ctx.width :])
        ctx.save_for_backward(grad, grad_weight)
        total: Tensor = (teaching.losses * teaching.weights).sum(dtype=torch.float64).float()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_weight = (None if x is None else x * by_loss.to(x.dtype) for x in ctx.saved_tensors)
        assert grad is not None
        of_embedded = None if grad_weight is None else grad[..., ctx.width :]
        return None, grad[..., : ctx.width], of_embedded, grad_weight


def _distil(teaching: _Teaching, block: Tensor, number: Tensor, p: Tensor, top: Tensor, logits: Tensor) -> None:
    """Some proposals' losses against p [n, V], noted for each; `logits` [n, V] become their gradient if wanted."""
    z = logits.float()
    chosen, (highest, favourite) = z.gather(1, top.unsqueeze(1))[:, 0], z.max(-1)
    soft = torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).flatten() if teaching.loss != "tv" else None
    q = torch.softmax(z, -1)
    normaliser = highest - q.gather(1, favourite.unsqueeze(1))[:, 0].log()  # logsumexp(z)
    overlap = torch.minimum(p, q, out=z).sum(1)
    if teaching.loss == "lk":
        far = torch.exp(-kernels.LK_DECAY * overlap)
        hard, variation, kl = torch.zeros_like(far), 1.0 - far, far
    else:
        hard, variation, kl = (torch.full_like(overlap, weight) for weight in LOSSES[teaching.loss])
    losses = hard * (normaliser - chosen) + variation * (1.0 - overlap)
    if soft is not None:
        losses += kl * (normaliser - soft)
    at = block, number
    teaching.agree[at], teaching.overlap[at], teaching.losses[at] = favourite == top, overlap, losses
    teaching.confidence[at] = (chosen - normaliser).exp()
    if not teaching.learn:
        return
    weight = teaching.weights[at]
    less = torch.mul(q, q < p, out=z)
    of_all = hard + kl + variation * less.sum(1)
    gradient = less.mul_((-weight * variation).unsqueeze(1)).addcmul_(q, (weight * of_all).unsqueeze(1))
    if soft is not None:
        gradient -= p.mul_((weight * kl).unsqueeze(1))
    logits.copy_(gradient.scatter_add_(1, top.unsqueeze(1), (-weight * hard).unsqueeze(1)))


def _distil_fused(
    teaching: _Teaching, block: Tensor, number: Tensor, logits: Tensor, teachers: Tensor, z: Tensor
) -> None:  # fmt: skip
    """The same for a whole chunk, whose proposals' teachers are rows of `logits`, [M, V]."""
    from draft_model.drafts.dspark import triton_loss

    at = block, number
    parts, decay = LOSSES.get(teaching.loss, (0.0,) * 3), kernels.LK_DECAY if teaching.loss == "lk" else 0.0
    found = triton_loss.distil(z, logits, teachers, teaching.weights[at], teaching.learn, parts, decay)
    teaching.losses[at], agree, teaching.overlap[at], teaching.confidence[at] = found.unbind(1)
    teaching.agree[at] = agree > 0
