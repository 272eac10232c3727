"""The elementwise parts of a training step, between its matrix products: PyTorch here, Triton on a GPU.

Each function marked `_in_triton` runs as one Triton kernel (`triton_kernels.py`) where the tensors are on a GPU, and as
the plain PyTorch code below elsewhere; both compute in float32 and return the compute type. Shapes: N rows, H hidden, I
inner size of SwiGLU, d head size, T tokens of the batch without padding.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts.layers import rotate
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

LK_DECAY = 3.0  # how fast draft_loss=lk goes from the divergence to the rejection as a position gets better

FLEX_TILE = 128  # queries, and keys, of one tile of a flex_attention's mask

_Function = TypeVar("_Function", bound=Callable[..., Any])


def fused(x: Tensor) -> bool:
    """Whether Triton kernels run: on a GPU, or in Triton's interpreter (tests)."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _in_triton(plain: _Function) -> _Function:
    """Has the function of the same name and arguments in `triton_kernels` run where it can."""

    @functools.wraps(plain)
    def call(*args: Any, **named: Any) -> Any:
        if not fused(next(x for x in args if x is not None)):
            return plain(*args, **named)
        from draft_model.drafts import triton_kernels

        return getattr(triton_kernels, plain.__name__)(*args, **named)

    return cast(_Function, call)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention that can run there: flex_attention has no backward on CPU, so it becomes sdpa, said once.

    Raises:
        DraftModelError: for sdpa in float32 on a GPU, whose flash kernel takes 16-bit types only.
    """
    if name == "flex_attention" and device.type == "cpu":
        logger.info("attention_backend: flex_attention has no backward on CPU; sdpa computes the same values")
        return "sdpa"
    if name == "sdpa" and device.type != "cpu" and dtype == torch.float32:
        raise DraftModelError(
            "attention_backend: given 'sdpa' with compute_dtype 'float32' on a GPU; its flash kernel takes bfloat16: "
            "use compute_dtype=bfloat16, or attention_backend=flex_attention"
        )
    return name


def memory_of(device: torch.device) -> float | None:
    """Bytes of a GPU; of a CPU nobody asks, for its processes share them."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@functools.cache
def compiled_flex(on_gpu: bool = True, backend: str = "inductor") -> Any:
    """PyTorch's flex_attention; compiled on a GPU, where it would be slow otherwise."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, backend=backend) if on_gpu else flex_attention


def flex_length(length: int) -> int:
    """Whole tiles, and two at least: PyTorch compiles anew for a size of one."""
    return max(-(-length // FLEX_TILE), 2) * FLEX_TILE


def flex_rows(x: Tensor) -> Tensor:
    """[L, heads, d] -> [1, heads, whole tiles, d]."""
    return functional.pad(x, (0, 0, 0, 0, 0, flex_length(len(x)) - len(x))).transpose(0, 1).unsqueeze(0)


def flex_mask(runs: Sequence[tuple[Tensor, Tensor]], keys: int) -> Any:
    """FlexAttention's mask of queries that see runs of the `keys` keys, padded to whole tiles; nothing sees padding.

    Worked out tile by tile, so that no mask of all queries by all keys is made. A run is the first key and the last + 1
    that each query sees of it, int64 [Q] both.
    """
    from torch.nn.attention.flex_attention import BlockMask

    padding = flex_length(len(runs[0][0])) - len(runs[0][0])
    ends = [(functional.pad(a, (0, padding), value=keys), functional.pad(b, (0, padding))) for a, b in runs]

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key < 0
        for first, last in ends:
            seen = seen | ((key >= first[query]) & (key < last[query]))
        return seen

    begin = torch.arange(0, flex_length(keys), FLEX_TILE, device=ends[0][0].device)
    touched = whole = torch.zeros(1, 1, dtype=torch.bool, device=begin.device)
    for first, last in ((x.view(-1, FLEX_TILE) for x in run) for run in ends):
        touched = touched | ((begin < last.amax(1, True)) & (begin + FLEX_TILE > first.amin(1, True)))
        whole = whole | ((begin >= first.amax(1, True)) & (begin + FLEX_TILE <= last.amin(1, True)))

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return tiles.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    lengths = (len(ends[0][0]), flex_length(keys))
    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole), *listed(whole), BLOCK_SIZE=FLEX_TILE, mask_mod=sees, seq_lengths=lengths
    )


@_in_triton
def rms_norm(x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMSNorm of x [N, H], or of some rows of it: int64 [R]; on a GPU, -1 gives a row of zeros.

    Returns:
        The normed rows [R, H] and 1 / rms of each, float32 [R].
    """
    x = x if rows is None else x.index_select(0, rows)
    square = torch.linalg.vector_norm(x, 2, -1, keepdim=True, dtype=torch.float32) ** 2
    scale = (square / x.shape[-1] + eps).rsqrt()
    return (x * scale).mul_(weight).to(x.dtype), scale[:, 0]


@_in_triton
def rms_norm_backward(
    grad: Tensor,  # of the normed rows, [R, H]
    x: Tensor,  # what was normed, [N, H]
    weight: Tensor,  # [H]
    scale: Tensor,  # 1 / rms, float32 [R]
    *,
    residual: Tensor | None = None,  # added to dx, [N, H]
    rows: Tensor | None = None,  # which rows of x were normed, each at most once; all where not given
    out: Tensor | None = None,  # where dx goes, [N, H]; only its `rows` are written. A new tensor where not given
) -> tuple[Tensor, Tensor]:
    """Gradients dx [N, H] and dw, float32 [H]: with u = scale x, dw = sum g u, dx = scale (w g - u mean(w g u))."""
    out = torch.empty_like(x) if out is None else out
    taken = x if rows is None else x.index_select(0, rows)
    unit = taken * scale.unsqueeze(1)
    product = unit * grad
    d_weight = product.sum(0)
    mean = product.mul_(weight).mean(-1, keepdim=True)
    dx = torch.mul(grad, weight, out=product).sub_(unit.mul_(mean)).mul_(scale.unsqueeze(1))
    if residual is not None:
        dx += residual if rows is None else residual.index_select(0, rows)
    if rows is None:
        out.copy_(dx)
    else:
        out.index_copy_(0, rows, dx.to(out.dtype))
    return out, d_weight


@_in_triton
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]."""
    return functional.silu(gate).mul_(up)


@_in_triton
def swiglu_backward(both: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up [N, 2I] from that of the product [N, I], and the product; both arguments are used up."""
    gate, up = both.chunk(2, -1)
    active = functional.silu(gate)
    product = active * up
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    up.copy_(active.mul_(grad))
    gate.copy_(d_gate)
    return both, product


@_in_triton
def rotate_heads(
    qkv: Tensor,  # the hidden state's part, [N, heads * d]
    token_part: Tensor,  # the token's part, [T, W]
    tokens: Tensor,  # token of each row; -1 past the conversation's end, where any will do, int64 [N]
    table: Tensor,  # cosines and sines, [2, positions, d]
    time: Tensor,  # position of each row, int64 [N]
    step: int,  # of the unroll, added to the position
    column: int,  # of token_part at which qkv's columns begin
    q: Tensor | None,  # where the queries go, [N, heads, d], if qkv has them
    k: Tensor | None,  # where the keys go, [N, kv_heads, d], if qkv has them
    v: Tensor | None,  # where the values go
) -> None:
    """Adds the token's part to the hidden state's part of q, k, v; rotates q and k; writes q, k and v."""
    sizes = [x.shape[1:].numel() for x in (q, k, v) if x is not None]
    part = token_part.narrow(1, column, qkv.shape[1]).index_select(0, tokens.clamp(min=0))
    parts = list((part + qkv).split(sizes, -1))
    rows = table[:, time + step]
    if q is not None:
        q.copy_(rotate(parts.pop(0).view_as(q), rows))
    if k is not None and v is not None:
        k.copy_(rotate(parts[0].view_as(k), rows))
        v.copy_(parts[1].view_as(v))


@_in_triton
def rotate_heads_backward(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, table: Tensor, time: Tensor, step: int, tokens: Tensor,
    token_grad: Tensor, column: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gradient of qkv [N, heads * d] from those of q, k and v (float32 sums are fine); the rest as in `rotate_heads`.

    The token's part of it is added to token_grad, float32 [T, W]; no two rows share a token. `dtype` is the result's.
    """
    back = table[:, time + step] * torch.tensor([1.0, -1.0], dtype=table.dtype).view(2, 1, 1)
    parts = [] if dq is None else [rotate(dq, back).flatten(1)]
    if dk is not None and dv is not None:
        parts += [rotate(dk, back).flatten(1), dv.flatten(1)]
    dqkv = torch.cat(parts, -1)
    # Rows past the end have no gradient, so it does no harm that they are added to token 0.
    token_grad.narrow(1, column, dqkv.shape[1]).index_add_(0, tokens.clamp(min=0), dqkv.to(token_grad.dtype))
    return dqkv.to(dtype)


@_in_triton
def merge(
    q: Tensor,  # rotated queries, [N, heads, d]
    out: Tensor,  # causal attention at W positions, [W, heads, d]
    lse: Tensor,  # its log-sum-exp, float32 [heads, W]
    places: Tensor | None,  # which of the W positions is each row's, int64 [N]; none where they are the rows
    keys: Tensor,  # the steps' own keys, rotated, [steps - 1, N, kv_heads, d]
    values: Tensor,
    later: int,  # how many of them count
) -> tuple[Tensor, Tensor]:
    """Joins a causal attention with the diagonal keys of the steps 1..later; `attention.py` derives it.

    Returns:
        The merged attention [N, heads, d] and its log-sum-exp, float32 [heads, N].
    """
    if places is not None:
        out, lse = out.index_select(0, places), lse.index_select(1, places)
    if not later:
        return out, lse
    grouped, k, v = _grouped(q, keys), keys[:later].transpose(0, 1).float(), values[:later].transpose(0, 1).float()
    causal_lse = lse.T.reshape(grouped.shape[:-1])  # [N, kv, group]
    scores = torch.einsum("nhgd,nihd->nhgi", grouped, k) * q.shape[-1] ** -0.5
    total = torch.logsumexp(torch.cat((causal_lse.unsqueeze(-1), scores), -1), -1)
    merged = _grouped(out, keys) * (causal_lse - total).exp().unsqueeze(-1)
    merged += torch.einsum("nhgi,nihd->nhgd", (scores - total.unsqueeze(-1)).exp(), v)
    return merged.flatten(1, 2).to(q.dtype), total.flatten(1).T.contiguous()


@_in_triton
def merge_backward(
    q: Tensor, grad: Tensor, merged: Tensor, total: Tensor, dq_causal: Tensor, places: Tensor | None, keys: Tensor,
    values: Tensor, dkeys: Tensor, dvalues: Tensor, later: int, first: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the queries [N, heads, d], and of the diagonal keys and values; the rest as in `merge`.

    grad is of the merged attention, [N, heads, d]; dq_causal of the queries through the causal part, [W, heads, d]. The
    first `later` entries of dkeys and dvalues, float32 [steps - 1, N, kv_heads, d], are added to, or written where
    they hold nothing yet (`first`).
    """
    dq = dq_causal if places is None else dq_causal.index_select(0, places)
    if not later:
        return dq
    scale = q.shape[-1] ** -0.5
    grouped, dout = _grouped(q, keys), _grouped(grad, keys)
    k, v = keys[:later].transpose(0, 1).float(), values[:later].transpose(0, 1).float()
    delta = (dout * _grouped(merged, keys)).sum(-1, keepdim=True)
    normaliser = total.T.reshape(grouped.shape[:-1]).unsqueeze(-1)
    p = (torch.einsum("nhgd,nihd->nhgi", grouped, k) * scale - normaliser).exp()
    dscores = p * (torch.einsum("nhgd,nihd->nhgi", dout, v) - delta) * scale
    dk = torch.einsum("nhgi,nhgd->inhd", dscores, grouped)
    dv = torch.einsum("nhgi,nhgd->inhd", p, dout)
    for sums, new in ((dkeys[:later], dk), (dvalues[:later], dv)):
        sums.copy_(new) if first else sums.add_(new)
    return dq + torch.einsum("nhgi,nihd->nhgd", dscores, k).flatten(1, 2).to(q.dtype)


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """Splits query heads [N, heads, d] into groups that share a key head: float32 [N, kv_heads, group, d]."""
    grouped: Tensor = x.unflatten(1, (keys.shape[2], -1))
    return grouped.float()


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to a float32 matrix, which may be a view of wider rows."""
    if left.is_cuda and left.dtype != total.dtype:
        # One product that reads and writes the float32 total, without another matrix of its size.
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
