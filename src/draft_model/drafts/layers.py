"""What the layers of all families share: projections, rotary position embedding, what they start with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from draft_model.drafts.shape import LayerShape


@contextmanager
def cast_once(draft: Any, dtype: torch.dtype) -> Iterator[None]:
    """Casts the weights of a draft once for all that is computed with them inside, where nothing may change them."""
    parameters = [*draft.parameters()]
    if parameters[0].dtype == dtype:
        yield
        return
    sizes = [parameter.numel() for parameter in parameters]
    # In one piece, as the gradients are, so that matrices of one product are one.
    flat = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device)
    copies = [part.view_as(parameter) for parameter, part in zip(parameters, flat.split(sizes), strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(copies, parameters)
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.copy_in_compute_type = copy
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter.copy_in_compute_type


class _Cast(torch.autograd.Function):
    """The copy of a float32 weight, with a gradient that is cast back and added to the weight's."""

    @staticmethod
    def forward(_ctx: Any, _weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


def copy_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The copy in that type by `cast_once`, or the weight itself where there is none; without a gradient."""
    copy: Tensor = getattr(weight, "copy_in_compute_type", weight)
    return (copy if copy.dtype == dtype else weight).detach()


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 weight in the compute type; gradients reach the weight."""
    copy = copy_of(weight, dtype)
    if copy.dtype == weight.dtype:
        return weight.to(dtype)
    through: Tensor = _Cast.apply(weight, copy)  # type: ignore[no-untyped-call]
    return through


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """A projection in the type of x; gradients reach the float32 weight."""
    return functional.linear(x, cast(module.weight, x.dtype))


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
