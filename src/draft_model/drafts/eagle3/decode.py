"""Greedy proposals of a chain: the draft's one layer with its keys and values in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.layers import rotary_table, rotate

if TYPE_CHECKING:
    from draft_model.target.model import Target


class ChainProposer:
    """Proposes tokens for the rows of a batch; decoding may reach `length` positions, proposals included."""

    def __init__(self, draft: Eagle3Draft, target: Target, length: int) -> None:
        self.weights = draft.weights(torch.float32)
        self.head = draft.lm_head.weight
        self.target_ids = draft.target_ids
        self.rotary = rotary_table(draft.config, target.device, length, torch.float32)
        self.embedding = target.embedding.float()
        heads, size = draft.config.num_key_value_heads, draft.config.head_dim
        self.keys = self.values = torch.empty(0, heads, 0, size, device=target.device)  # [B, kv_heads, C, d]

    def propose(
        self, features: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor, ends: Tensor, count: int
    ) -> Tensor:
        """Reads new columns, then continues from each row's last one on the draft's own output; see `base.Proposer`."""
        rows = torch.arange(len(ends), device=ends.device)
        columns, width = visible.shape[1], tokens.shape[1]
        # Causal among the new columns; a masked column still sees itself, so that no softmax is empty.
        order = torch.ones(width, columns, dtype=torch.bool, device=ends.device).tril(columns - width)
        own = torch.eye(width, columns, dtype=torch.bool, device=ends.device).roll(columns - width, 1)
        mask = (visible.unsqueeze(1) & order) | own  # [B, Q, C + Q]
        features = features.float()
        for weights in self.weights.feature_norms:
            parts = zip(features.chunk(len(weights), -1), weights, strict=True)
            features = torch.cat([self._norm(part, weight) for part, weight in parts], -1)
        hidden = self._step(functional.linear(features, self.weights.fc), tokens, positions, mask)
        hidden, best = self._read(hidden[rows, ends].unsqueeze(1))
        proposed, position = [best], positions[rows, ends].unsqueeze(1)
        for depth in range(1, count):
            mask = torch.cat((visible, visible.new_ones(len(rows), depth)), 1).unsqueeze(1)
            hidden, best = self._read(self._step(hidden, proposed[-1], position + depth, mask))
            proposed.append(best)
        self.keys, self.values = self.keys[:, :, :columns], self.values[:, :, :columns]
        return torch.cat(proposed, 1)

    def select(self, rows: Tensor) -> None:
        """Keeps some rows of the batch, int64 [B']."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.weights.config.rms_norm_eps)

    def _read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the next step reads, and the favourite token of the layer's output [B, 1, H]."""
        normed = self._norm(hidden, self.weights.norm)
        best = functional.linear(normed, self.head).argmax(-1)
        return normed if self.weights.config.norm_output else hidden, self.target_ids[best]

    def _step(self, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """One pass of the layer over Q columns, whose keys and values stay in the cache: [B, Q, H] -> [B, Q, H]."""
        w, shape, config = self.weights, tokens.shape, self.weights.config
        hidden = hidden.flatten(0, 1)
        embedded = self._norm(functional.embedding(tokens, self.embedding).flatten(0, 1), w.input_layernorm)
        normed = self._norm(hidden, w.hidden_norm)
        qkv = functional.linear(embedded, w.embedding_qkv) + functional.linear(normed, w.hidden_qkv)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, k, v = qkv.unflatten(-1, (-1, config.head_dim)).split((heads, kv_heads, kv_heads), -2)  # [BQ, heads, d]
        table = self.rotary[:, positions.flatten()]
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (rotate(q, table), rotate(k, table), v))
        if self.keys.shape[2]:
            k, v = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        self.keys, self.values = k, v
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), enable_gqa=True)
        hidden = hidden + functional.linear(attended.transpose(1, 2).flatten(0, 1).flatten(-2), w.out)
        gate_up = functional.linear(self._norm(hidden, w.post_attention_layernorm), w.gate_up)
        gate, up = gate_up.chunk(2, -1)
        following: Tensor = (hidden + functional.linear(functional.silu(gate) * up, w.down)).unflatten(0, shape)
        return following
