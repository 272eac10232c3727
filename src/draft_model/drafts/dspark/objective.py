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

Loss and gradients need z, p and q of one proposal at a time, so the heads run a chunk of teacher positions at a time
with one target head and one softmax p for all proposals that it teaches, and leave their gradients at once: logits of
all blocks never exist. Everything below the heads is ordinary autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from draft_model.drafts.batch import Batch
from draft_model.drafts.counts import Counts, decode_rounds
from draft_model.drafts.dspark.attention import block_attention
from draft_model.drafts.dspark.blocks import Blocks, place_blocks
from draft_model.drafts.dspark.model import BlockDraft
from draft_model.drafts.kernels import choose_backend
from draft_model.drafts.rotary import Rotary

if TYPE_CHECKING:
    from draft_model.target.model import Target

CHUNK_ROWS = {"cpu": 256, "cuda": 1024}
"""Teacher positions in one head: 256 x 50,000 float32 logits are 50 MB, and there are four such matrices at once."""
LOSSES = {"tv": (0.1, 0.9, 0.0), "kl": (0.0, 0.0, 1.0)}
"""Weights of hard cross-entropy, total variation and soft cross-entropy; those of `lk` depend on the position."""


class Objective:
    """The loss of a block draft against its target.

    Args:
        draft: float32 parameters.
        target: the frozen target, in the compute type.
        attention_backend: `flex_attention` or `sdpa`.
        dtype: compute type.
        max_length: longest conversation, in tokens.
        loss: tv, kl or lk.
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
        self.backend = choose_backend(attention_backend, target.device, dtype)
        shape = draft.config
        self.rotary = Rotary(shape, target.device).table(max_length + shape.block_size, dtype)
        self.decay = torch.exp(-torch.arange(shape.proposals, device=target.device) / shape.loss_decay_gamma)

    def __call__(self, batch: Batch, states: list[Tensor]) -> tuple[Tensor, Counts]:
        """The loss summed over blocks and proposals, to be divided by the global count of blocks.

        Without gradients every token that a round of decoding may start at gets a block, so that the acceptance length
        is the one that decoding would have.

        Args:
            batch: B conversations, on the host.
            states: what `Target.states` gave for each of them.

        Returns:
            A float32 scalar and the sums per proposal, both on the device.
        """
        draft, shape = self.draft, self.draft.config
        limit = shape.num_anchors if torch.is_grad_enabled() else None
        blocks = place_blocks(batch, shape.proposals, limit).to(self.target.device)
        if not len(blocks.anchors):
            nothing = sum(parameter.sum() for parameter in draft.parameters()) * 0.0
            return torch.as_tensor(nothing), self.no_counts()
        features, final = torch.cat(states).split((len(shape.aux_layers) * shape.hidden_size, shape.hidden_size), -1)
        hidden = self._propose(blocks, features)[:, shape.first :]  # [N, K, H]
        embedded = weight = None
        if shape.markov_rank:
            embedded = functional.embedding(blocks.previous, draft.markov_head.markov_w1.weight).to(self.dtype)
            weight = draft.markov_head.markov_w2.weight.to(self.dtype)
        weights = self.decay.expand(blocks.learnt.shape)
        if shape.dpace_alpha and torch.is_grad_enabled():
            sure = _Teaching(self.target, final, blocks, weights, self.loss, learn=False)
            with torch.no_grad():
                _Heads.apply(sure, hidden, embedded, weight)  # type: ignore[no-untyped-call]
            weights = dpace_weights(sure.confidence, blocks.learnt, shape.dpace_alpha)
        teaching = _Teaching(self.target, final, blocks, weights, self.loss, torch.is_grad_enabled())
        loss: Tensor = _Heads.apply(teaching, hidden, embedded, weight)  # type: ignore[no-untyped-call]
        if shape.enable_confidence_head:
            read = torch.cat((hidden, embedded), -1).float()  # type: ignore[arg-type]
            confidence = draft.confidence_head.proj(read)[..., 0]  # [N, K]
            error = functional.binary_cross_entropy_with_logits(confidence, teaching.overlap, reduction="none")
            loss = loss + (error * blocks.learnt * self.decay).sum()
        return loss, _step_sums(blocks, teaching)

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


def dpace_weights(confidence: Tensor, learnt: Tensor, alpha: float) -> Tensor:
    """D-PACE's weights, [N, K], from the draft's confidence in what the target would choose, float32 [N, K].

    Args:
        confidence: q of each proposal.
        learnt: which of them are supervised, a leading run of each block, bool [N, K].
        alpha: of the smoothing.
    """
    kept: Tensor = ((1.0 - alpha) * confidence + alpha).cumprod(1) * learnt
    return kept.flip(1).cumsum(1).flip(1)


@dataclass
class _Teaching:
    """The target's side of the heads, and what they found out.

    Attributes:
        target: the target.
        final: its final hidden states, [T, H].
        blocks: N blocks of K proposals.
        weights: of the proposals, float32 [N, K].
        loss: tv, kl or lk.
        learn: whether gradients are wanted.
        sums: loss, supervised, agree, overlap, float64 [4, K].
        losses: of the proposals, float32 [N, K].
        confidence: the draft's probability of the target's favourite, float32 [N, K].
        agree: whether the favourites of draft and target are the same, bool [N, K].
        overlap: alpha, float32 [N, K].
    """

    target: Target
    final: Tensor
    blocks: Blocks
    weights: Tensor
    loss: str
    learn: bool

    def __post_init__(self) -> None:
        shape, device = self.blocks.learnt.shape, self.final.device
        self.sums = torch.zeros(4, shape[1], dtype=torch.float64, device=device)
        self.agree = torch.zeros(shape, dtype=torch.bool, device=device)
        self.losses, self.confidence, self.overlap = torch.zeros(3, *shape, device=device)


class _Heads(torch.autograd.Function):
    """All proposals' heads and losses; the gradients of hidden states, Markov embeddings and w2 are made on the way."""

    @staticmethod
    def forward(
        ctx: Any, teaching: _Teaching, hidden: Tensor, embedded: Tensor | None, weight: Tensor | None
    ) -> Tensor:  # fmt: skip
        blocks, target = teaching.blocks, teaching.target
        learn = teaching.learn
        grads = [torch.zeros_like(x) if learn and x is not None else None for x in (hidden, embedded)]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learn and weight is not None else None
        size = CHUNK_ROWS[hidden.device.type]
        for start in range(0, len(blocks.teachers), size):
            logits = target.logits(teaching.final[blocks.teachers[start : start + size]])
            p = torch.softmax(logits, -1, dtype=torch.float32)  # [C, V]
            top = logits.max(-1).indices
            del logits
            for number, taught in enumerate(blocks.students[:, start : start + size]):
                present = (taught >= 0).nonzero()[:, 0]
                block = taught[present]
                every = len(present) == len(taught)
                u = hidden[block, number]
                z = u @ target.head.T
                if embedded is not None and weight is not None:
                    e = embedded[block, number]
                    z += e @ weight.T
                gradient = _distil(
                    teaching, number, block, p if every else p[present], top if every else top[present], z.float()
                )
                if gradient is None:
                    continue
                dz = gradient.mul_(teaching.weights[block, number].unsqueeze(1)).to(u.dtype)
                grads[0][block, number] = dz @ target.head  # type: ignore[index]
                if grad_weight is not None:
                    grads[1][block, number] = dz @ weight  # type: ignore[index,operator]
                    grad_weight.add_(dz.T @ e)
        ctx.save_for_backward(*grads, grad_weight)
        total: Tensor = (teaching.losses * teaching.weights).sum(dtype=torch.float64).float()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors)


def _distil(teaching: _Teaching, number: int, block: Tensor, p: Tensor, top: Tensor, z: Tensor) -> Tensor | None:
    """One proposal's losses against p [C, V], noted for each block; their gradient by z, float32 [C, V], if wanted."""
    highest, favourite = z.max(-1)
    chosen = z.gather(1, top.unsqueeze(1))
    soft = torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).flatten() if teaching.loss != "tv" else None
    q = torch.softmax(z, -1, out=z) if not z.requires_grad else torch.softmax(z, -1)
    normaliser = highest - q.gather(1, favourite.unsqueeze(1))[:, 0].log()  # logsumexp(z)
    less = q < p
    below = torch.where(less, q, 0.0).sum(1)
    overlap = 1.0 - torch.where(less, p, 0.0).sum(1) + below
    if teaching.loss == "lk":
        far = torch.exp(-3.0 * overlap)
        hard, variation, kl = torch.zeros_like(far), 1.0 - far, far
    else:
        hard, variation, kl = (torch.full_like(overlap, weight) for weight in LOSSES[teaching.loss])
    losses = hard * (normaliser - chosen[:, 0]) + variation * (1.0 - overlap)
    if soft is not None:
        losses += kl * (normaliser - soft)
    agrees = favourite == top
    teaching.agree[block, number], teaching.overlap[block, number] = agrees, overlap
    teaching.losses[block, number], teaching.confidence[block, number] = losses, (chosen[:, 0] - normaliser).exp()
    parts = (losses, torch.ones_like(losses), agrees, overlap)
    teaching.sums[:, number] += torch.stack([part.sum(dtype=torch.float64) for part in parts])
    if not teaching.learn:
        return None
    gradient = q * torch.where(less, (hard + kl + variation * (below - 1.0)).unsqueeze(1),
                               (hard + kl + variation * below).unsqueeze(1))  # fmt: skip
    if soft is not None:
        gradient -= kl.unsqueeze(1) * p
    return gradient.scatter_add_(1, top.unsqueeze(1), -hard.unsqueeze(1))


def _step_sums(blocks: Blocks, teaching: _Teaching) -> Counts:
    """The sums per proposal, on the device."""
    agreed = (teaching.agree & blocks.learnt).cummin(1).values  # [N, K]
    before = torch.cat((torch.ones_like(agreed[:, :1]), agreed[:, :-1]), 1) & blocks.learnt
    chains = torch.stack((blocks.learnt, before, agreed)).sum(1, dtype=torch.float64)
    if blocks.whole:
        rounds = torch.stack(decode_rounds(blocks, agreed.sum(1)))
    else:  # blocks at random: the mean over where they stand
        rounds = torch.stack((torch.full_like(chains[2], len(agreed)), chains[2].cumsum(0)))
    return Counts.from_tensor(torch.cat((teaching.sums, chains, rounds)))
