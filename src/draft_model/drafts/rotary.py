"""Rotary position embedding of drafts, with the target's settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Rotary position embedding with the target's settings (linear, dynamic, llama3, yarn: transformers' own).

    Args:
        config: a Shape with num_attention_heads, head_dim and rope_parameters.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        llama: Any = LlamaConfig(
            # The table needs head_dim alone, but the class wants a hidden size that the heads divide.
            hidden_size=config.num_attention_heads * config.head_dim,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope_parameters),
        )
        self._embedding = LlamaRotaryEmbedding(llama).to(device)
        self._device = device

    def table(self, positions: int, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of positions 0..P-1, [2, P, d]."""
        probe = torch.empty(0, device=self._device, dtype=torch.float32)
        cos, sin = self._embedding(probe, torch.arange(positions, device=self._device).unsqueeze(0))
        return torch.stack((cos[0], sin[0])).to(dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates heads [N, heads, d] by the rows' cosines and sines [2, N, d]."""
    first, second = x.chunk(2, -1)
    return x * table[0].unsqueeze(1) + torch.cat((-second, first), -1) * table[1].unsqueeze(1)
