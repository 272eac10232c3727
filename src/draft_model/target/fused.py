"""One kernel each for what a frozen model does between its matrix products: norms, rotation, SwiGLU.

transformers runs these as five to ten kernels each, which is a tenth of the target's time. Each is replaced only where
a probe shows that the replacement gives what the model's own code gives, up to the rounding of its type.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts import kernels

logger = logging.getLogger(__name__)


def multiplier(norm: Any) -> Tensor:
    """What an RMSNorm multiplies by, [H]: its weight, or 1 + weight in Gemma."""
    weight: Tensor = norm.weight
    # Ones pass a norm unchanged but for its epsilon, so what comes out tells weight from 1 + weight.
    passed: Tensor = norm(torch.ones_like(weight))
    return weight + (passed - weight).round()


@torch.no_grad()
def fuse(decoder: Any) -> None:
    """Replaces parts of a decoder of transformers, on a GPU, by kernels that compute the same."""
    weight = next(decoder.parameters())
    done = 0
    for module in decoder.modules():
        if all(type(parameter.data) is Tensor for parameter in module.parameters(recurse=False)):  # else it is spread
            done += sum(_replaced(module, candidate) for candidate in (_norm, _mlp))
    attention = getattr(decoder.layers[0], "self_attn", None)
    if attention is not None:
        _fuse_rotation(sys.modules[type(attention).__module__], weight)
    logger.info("target: %d modules run as fused kernels", done)


def _replaced(module: Any, candidate: Callable[[Any], tuple[Callable[[Tensor], Tensor], int] | None]) -> bool:
    """Whether a module's forward was replaced by a candidate that gives the same."""
    found = candidate(module)
    if found is None:
        return False
    forward, size = found
    like = next(module.parameters())
    probe = torch.randn(8, size, device=like.device, dtype=like.dtype)
    if not _alike(forward(probe), module(probe)):
        return False
    module.forward = forward
    return True


def _alike(value: Tensor, truth: Tensor) -> bool:
    """Whether two results differ by no more than the rounding of their type."""
    return bool((value - truth).float().norm() <= 2 * torch.finfo(truth.dtype).eps * truth.float().norm())


def _norm(module: Any) -> tuple[Callable[[Tensor], Tensor], int] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or eps is None or getattr(module, "weight", None) is None:
        return None
    weight = multiplier(module)

    def forward(x: Tensor) -> Tensor:
        return kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)

    return forward, len(weight)


def _mlp(module: Any) -> tuple[Callable[[Tensor], Tensor], int] | None:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(type(part) is not torch.nn.Linear or type(part.weight.data) is not Tensor for part in parts):
        return None
    gate, up, down = parts

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        product: Tensor = down(kernels.swiglu(gate(rows), up(rows)))
        return product.view(x.shape)

    return forward, gate.in_features


def _fuse_rotation(module: Any, like: Tensor) -> None:
    """Replaces a modeling module's `apply_rotary_pos_emb` where no gradient is asked for."""
    original = getattr(module, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "fused"):
        return
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return
    from draft_model.drafts import triton_kernels

    @functools.wraps(original)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        whole = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and cos.shape[1] == q.shape[2]
        if torch.is_grad_enabled() or not q.is_cuda or not whole or rest or named:
            return original(q, k, cos, sin, *rest, **named)
        cos, sin = cos.contiguous(), sin.contiguous()
        return triton_kernels.rotate(q, cos, sin), triton_kernels.rotate(k, cos, sin)

    rotate.fused = True  # type: ignore[attr-defined]
    q, k = (torch.randn(2, 5, n, 16, device=like.device, dtype=like.dtype).transpose(1, 2) for n in (4, 2))
    angles = torch.randn(2, 5, 8, device=like.device).repeat(1, 1, 2)
    tables = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    pairs = zip(rotate(q, k, *tables), original(q, k, *tables), strict=True)
    if all(_alike(mine, theirs) for mine, theirs in pairs):
        module.apply_rotary_pos_emb = rotate
