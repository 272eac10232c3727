r"""The decoder layer's two halves around attention, each with its own backward that keeps as little as it can.

Autograd would keep every intermediate of every unroll step: some 12 numbers per hidden unit, position and step. Norms
and the SwiGLU product are cheap to make again, matrix products are not, so only the inputs and outputs of the latter
are kept. With x the input, s = 1 / sqrt(mean x^2 + eps), u = s x (RMSNorm is w u) and g the gradient of w u:

    dw = sum g u        dx = s (w g - u mean(w g u))

and with (a, b) the two halves of gate_up, p = silu(a) b, and g the gradient of down p:

    d down = g^T p      dp = g down      da = dp b silu'(a)      db = dp silu(a)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean x^2 + eps) over the last dimension, float32 [N, 1]."""
    square: Tensor = torch.linalg.vector_norm(x, 2, -1, keepdim=True, dtype=torch.float32) ** 2
    return (square / x.shape[-1] + eps).rsqrt()


def normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm of [N, H] whose `inverse_rms` is known."""
    return (x * scale).mul_(weight).to(x.dtype)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm's input [N, H] and weight [H]."""
    unit = x * scale
    product = unit * grad
    d_weight = product.sum(0)
    mean = product.mul_(weight).mean(-1, keepdim=True)
    return torch.mul(grad, weight, out=product).sub_(unit.mul_(mean)).mul_(scale).to(x.dtype), d_weight.to(weight.dtype)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, norm, weight, scale)
        return functional.linear(normed(x, norm, scale), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, weight, scale = ctx.saved_tensors
        d_weight = grad.T @ normed(x, norm, scale)
        dx, d_norm = norm_backward(grad @ weight, x, norm, scale)
        return dx if ctx.needs_input_grad[0] else None, d_norm, d_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        both = functional.linear(normed(x, norm, scale), gate_up)
        ctx.save_for_backward(x, norm, gate_up, down, scale, both)
        gate, up = both.chunk(2, -1)
        return functional.linear(functional.silu(gate).mul_(up), down).add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, gate_up, down, scale, both = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        active = functional.silu(gate)
        d_down = grad.T @ (active * up)
        d_product = grad @ down
        d_both = torch.cat((torch.ops.aten.silu_backward(d_product * up, gate), active.mul_(d_product)), -1)
        d_gate_up = d_both.T @ normed(x, norm, scale)
        dx, d_norm = norm_backward(d_both @ gate_up, x, norm, scale)
        return dx.add_(grad), d_norm, d_gate_up, d_down, None


def normed_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A matrix after RMSNorm.

    Args:
        x: [N, H].
        norm: the norm's weight, [H].
        weight: [O, H].
        eps: of the norm.

    Returns:
        [N, O].
    """
    return cast(Tensor, _NormedLinear.apply(x, norm, weight, eps))  # type: ignore[no-untyped-call]


def residual_swiglu(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """The SwiGLU of a normed input, added to it: x + SwiGLU(RMSNorm(x)).

    Args:
        x: [N, H].
        norm: the norm's weight, [H].
        gate_up: gate and up projection, one above the other, [2I, H].
        down: [H, I].
        eps: of the norm.

    Returns:
        [N, H].
    """
    return cast(Tensor, _SwiGLU.apply(x, norm, gate_up, down, eps))  # type: ignore[no-untyped-call]
