"""The draft's one layer with its keys and values, as decoding runs it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts.eagle3.model import Eagle3Draft, Rotary, rotate
from draft_model.target.model import Target


class DraftCache:
    """Keys and values of the draft's layer, [B, kv_heads, C, d].

    Args:
        draft: the draft.
        target: its target.
        length: positions that decoding may reach.
    """

    def __init__(self, draft: Eagle3Draft, target: Target, length: int) -> None:
        self.weights = draft.weights(torch.float32)
        self.head = draft.lm_head.weight
        self.target_ids = draft.target_ids
        self.rotary = Rotary(draft.config, target.device).table(length, torch.float32)
        self.embedding = target.embedding
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def step(self, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """One pass of the layer over new columns, which stay in the cache.

        Args:
            hidden: h of each column, [B, Q, H].
            tokens: the token that each column reads, int64 [B, Q].
            positions: rotary positions, int64 [B, Q].
            mask: which columns, old and new, each new one may see, bool [B, Q, C + Q]; each sees at least itself.

        Returns:
            The layer's output, [B, Q, H].
        """
        w, (batch, width) = self.weights, tokens.shape
        normed = w.rms_norm(hidden, w.hidden_norm)
        embedded = functional.embedding(tokens, self.embedding)
        qkv = functional.linear(normed, w.hidden_qkv) + w.project_embedding(embedded)
        q, k, v = (x.unflatten(0, (batch, width)) for x in w.split_heads(qkv.flatten(0, 1)))
        table = self.rotary[:, positions.flatten()]
        q, k = (rotate(x.flatten(0, 1), table).unflatten(0, (batch, width)).transpose(1, 2) for x in (q, k))
        v = v.transpose(1, 2)
        self.keys = k if self.keys is None else torch.cat((self.keys, k), 2)
        self.values = v if self.values is None else torch.cat((self.values, v), 2)
        attended = functional.scaled_dot_product_attention(
            q, self.keys, self.values, attn_mask=mask.unsqueeze(1), enable_gqa=True
        )
        return w.finish_layer(hidden, attended.transpose(1, 2))

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the draft's vocabulary after each h: [..., H] -> [..., D]."""
        return functional.linear(self.weights.rms_norm(hidden, self.weights.norm), self.head)

    def cut(self, columns: int) -> None:
        """Forgets all columns but the first so many."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, :columns], self.values[:, :, :columns]

    def select(self, rows: Tensor) -> None:
        """Keeps some rows of the batch."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


def causal(visible: Tensor, width: int) -> Tensor:
    """The mask of the last `width` columns: what is visible, not later, and always themselves.

    Args:
        visible: which columns a row may see, bool [B, C].
        width: new columns Q among them.

    Returns:
        bool [B, Q, C]; a masked row sees itself, so that no softmax is empty.
    """
    columns = visible.shape[1]
    order = torch.ones(width, columns, dtype=torch.bool, device=visible.device).tril(columns - width)
    own = torch.eye(width, columns, dtype=torch.bool, device=visible.device).roll(columns - width, 1)
    return (visible.unsqueeze(1) & order) | own
