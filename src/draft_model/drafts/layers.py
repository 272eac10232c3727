"""What the layers of all families share: projections, rotary position embedding, what they start with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from draft_model.drafts.shape import LayerShape


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """A projection in the type of x; gradients reach the float32 weight."""
    return functional.linear(x, module.weight.to(x.dtype))


class Attention(nn.Module):
    """The projections of an attention that reads `inputs` numbers per position."""

    def __init__(self, config: LayerShape, inputs: int) -> None:
        super().__init__()
        query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj, self.k_proj = nn.Linear(inputs, query, bias=False), nn.Linear(inputs, key, bias=False)
        self.v_proj, self.o_proj = nn.Linear(inputs, key, bias=False), nn.Linear(query, config.hidden_size, bias=False)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: LayerShape) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return linear(functional.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)


def rotary_table(config: LayerShape, device: torch.device, positions: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of positions 0..P-1, [2, P, d], by transformers (linear, dynamic, llama3, yarn, longrope)."""
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
    probe = torch.empty(0, device=device, dtype=torch.float32)
    cos, sin = LlamaRotaryEmbedding(llama).to(device)(probe, torch.arange(positions, device=device).unsqueeze(0))
    return torch.stack((cos[0], sin[0])).to(dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates heads [N, heads, d] by the rows' cosines and sines [2, N, d]."""
    first, second = x.chunk(2, -1)
    return x * table[0].unsqueeze(1) + torch.cat((-second, first), -1) * table[1].unsqueeze(1)


def start(draft: Any, seed: int, target: Any) -> None:
    """Starts a draft of any family, whose norms are ones: random matrices, and the target's final norm.

    `fc` passes the highest feature through, nearly alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
    draft.fc.weight.mul_(0.5)[:, -draft.config.hidden_size :].diagonal().add_(1.0)
    draft.norm.weight.copy_(target.norm)
