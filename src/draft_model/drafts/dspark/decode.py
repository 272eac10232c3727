"""Greedy proposals of a block: one pass over anchor and mask tokens, then the Markov head's walk along it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts.dspark.model import BlockDraft
from draft_model.drafts.layers import rotary_table

if TYPE_CHECKING:
    from draft_model.target.model import Target


class BlockProposer:
    """Proposes tokens for the rows of a batch; decoding may reach `length` positions, proposals included."""

    def __init__(self, draft: BlockDraft, target: Target, length: int) -> None:
        self.draft = draft
        self.rotary = rotary_table(draft.config, target.device, length + 1, torch.float32)
        self.embedding, self.head = target.embedding.float(), target.head.float()
        shape = draft.config
        # Keys and values of the target's tokens in every layer, [L, 2, B, C, kv_heads, d].
        self.cache = torch.empty(
            shape.num_hidden_layers, 2, 0, 0, shape.num_key_value_heads, shape.head_dim, device=target.device
        )

    def propose(
        self, features: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor, ends: Tensor, count: int
    ) -> Tensor:
        """Reads new columns, then fills in a block behind each row's last accepted one; see `base.Proposer`."""
        draft, shape = self.draft, self.draft.config
        rows, size = torch.arange(len(ends), device=ends.device), count + shape.first
        context = draft.context(features.float()).flatten(0, 1)
        behind = self.rotary[:, positions.flatten()]
        new = [torch.stack(layer.self_attn.keys_values(context, behind)) for layer in draft.layers]
        columns = torch.stack(new).unflatten(2, tokens.shape)  # [L, 2, B, Q, kv_heads, d]
        self.cache = torch.cat((self.cache, columns), 3) if self.cache.shape[3] else columns
        anchors = tokens[rows, ends]
        ids = torch.full((len(rows), size), shape.mask_token_id, device=ends.device)
        ids[:, 0] = anchors
        at = positions[rows, ends].unsqueeze(1) + 1 + torch.arange(size, device=ends.device)
        table = self.rotary[:, at.flatten()]
        mask = torch.cat((visible, visible.new_ones(len(rows), size)), 1)[:, None, None]  # [B, 1, 1, C + Q + S]

        def attend(q: Tensor, k: Tensor, v: Tensor, seen_k: Tensor, seen_v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, torch.cat((seen_k, k), 1), torch.cat((seen_v, v), 1)))
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

        x = functional.embedding(ids, self.embedding)
        for layer, (keys, values) in zip(draft.layers, self.cache, strict=True):
            x = layer(x, table, (keys, values), attend)
        logits: Tensor = draft.norm(x)[:, shape.first :] @ self.head.T  # [B, K, V]
        if not shape.markov_rank:
            return logits.argmax(-1)
        proposed, heads = [anchors], draft.markov_head
        for step in range(count):
            bias = heads.markov_w1.weight[proposed[-1]] @ heads.markov_w2.weight.T
            proposed.append((logits[:, step] + bias).argmax(-1))
        return torch.stack(proposed[1:], 1)

    def select(self, rows: Tensor) -> None:
        """Keeps some rows of the batch, int64 [B']."""
        self.cache = self.cache[:, :, rows]
