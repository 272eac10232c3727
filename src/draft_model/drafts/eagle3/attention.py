r"""Attention of the unroll: one causal flash attention plus a diagonal, merged exactly.

At unroll step i the query at position t sees the step-0 keys of j <= t and, for m = 1..i, only the step-m key at t
itself. The dense mask of that is T x (i+1)T, nearly all of it empty. Write the scores of the two parts as
a_j = s q.k_j (causal, step 0) and b_m = s q.k_m (the diagonal), s the scale. Then

    A = logsumexp_j a_j     o_A = sum_j exp(a_j - A) v_j          (what a flash kernel returns)
    L = logsumexp(A, b_1, ..., b_i)
    o = exp(A - L) o_A + sum_m exp(b_m - L) v_m                   (the dense masked attention, exactly)

Backward, with do the gradient of o and D = do.o: every probability of the dense softmax is p = exp(score - L), and
the gradient of its score is p (do.v - D). A flash backward kernel computes just that from (q, k, v, o, logsumexp),
so calling it with the MERGED o and L gives the step-0 part's exact dq, dk, dv; the diagonal part is elementwise:
dv_m = p_m do,  db_m = p_m (do.v_m - D),  dq += s db_m k_m,  dk_m = s db_m q. No mask and no growing cache exist.

The same merge joins a full attention over the prompts that come before every query with a causal one over the rest.
Sequences are padded on the right, so the causal mask alone keeps every real query from every padding key.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

BLOCK = 64  # queries that flash kernels take at once
FLEX_BLOCK = 128


@dataclass(frozen=True)
class Rows:
    """Which positions of a padded batch have a query: N of the B x S.

    Attributes:
        index: flat positions b * S + t, ascending, int64 [N].
        batch: B.
        length: S.
        first: no conversation has a query before this t; W = S - first positions are attended from.
    """

    index: Tensor
    batch: int
    length: int
    first: int = 0

    @classmethod
    def of(cls, index: Tensor, batch: int, length: int) -> Rows:
        """The rows with the shortest window, in whole blocks of the kernels."""
        first = int((index % length).min()) if len(index) else 0
        return cls(index, batch, length, first - first % BLOCK)

    @property
    def window(self) -> int:
        """W."""
        return self.length - self.first

    @functools.cached_property
    def _place(self) -> Tensor:
        """Where the rows stand in the flat B x W."""
        return self.index - (self.index.div(self.length, rounding_mode="floor") + 1) * self.first

    def scatter(self, rows: Tensor) -> Tensor:
        """Puts rows [N, heads, d] at their positions: [B, heads, W, d], zero elsewhere."""
        dense = rows.new_zeros(self.batch * self.window, *rows.shape[1:])
        dense[self._place] = rows
        return dense.view(self.batch, self.window, *rows.shape[1:]).transpose(1, 2)

    def gather(self, dense: Tensor) -> Tensor:
        """Takes the rows [N, heads, ...] out of [B, heads, W, ...]."""
        return dense.transpose(1, 2).reshape(self.batch * self.window, *_head_shape(dense))[self._place]


def _head_shape(dense: Tensor) -> tuple[int, ...]:
    return (dense.shape[1], *dense.shape[3:])


@dataclass(frozen=True)
class _Part:
    """One flash attention, as its backward needs it.

    Attributes:
        keys: which of the S step-0 keys it reads.
        causal: whether query w sees the first w of them only.
        extra: of the CUDA kernel.
    """

    keys: slice
    causal: bool
    extra: tuple[Any, ...]


def _flash(q: Tensor, k: Tensor, v: Tensor, keys: slice, causal: bool) -> tuple[Tensor, Tensor, _Part]:
    """Flash attention [B, heads, W, d] over some of the keys, and its log-sum-exp [B, heads, W]."""
    k, v = k[:, :, keys], v[:, :, keys]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse, _Part(keys, causal, ())
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse, _Part(keys, causal, tuple(rest[:6]))


def _causal(rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[_Part, ...]]:
    """Causal attention of a window of queries [B, heads, W, d], its log-sum-exp, and the parts it was made of.

    Before the window lie prompts, whose keys every query sees: a full attention over these and a causal one over the
    window's own keys, merged like the diagonal.
    """
    out, lse, tail = _flash(q, k, v, slice(rows.first, None), causal=True)
    if not rows.first:
        return out, lse, (tail,)
    before, before_lse, head = _flash(q, k, v, slice(rows.first), causal=False)
    total = torch.logaddexp(lse, before_lse)
    weight, before_weight = ((part - total).exp().unsqueeze(-1) for part in (lse, before_lse))
    return (out * weight + before * before_weight).to(q.dtype), total, (head, tail)


def _causal_backward(
    parts: tuple[_Part, ...], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `lse` are those of the whole, merged attention."""
    found = [_part_backward(part, grad, q, k[:, :, part.keys], v[:, :, part.keys], out, lse) for part in parts]
    dq, dk, dv = zip(*found, strict=True)
    return sum(dq[1:], dq[0]), torch.cat(dk, 2), torch.cat(dv, 2)


def _part_backward(
    part: _Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return cast("tuple[Tensor, Tensor, Tensor]", backward(grad, q, k, v, out, lse, 0.0, part.causal))
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    cum_q, cum_k, max_q, max_k, seed, offset = part.extra
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, part.causal, seed, offset
    )
    return dq, *(x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """Splits query heads [N, heads, d] into groups that share a key head: [N, kv_heads, group, d], float32."""
    grouped: Tensor = q.unflatten(1, (kv_heads, q.shape[1] // kv_heads)).float()
    return grouped


def _diagonal(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of i steps, [N, kv_heads, d] each, stacked: float32 [N, kv_heads, i, d]."""
    steps = len(tensors) // 2
    return torch.stack(list(tensors[:steps]), 2).float(), torch.stack(list(tensors[steps:]), 2).float()


class _MergedAttention(torch.autograd.Function):
    """Queries [N, heads, d] over step-0 keys [B, kv_heads, S, d] and i diagonal keys [N, kv_heads, d] each."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, q: Tensor, k0: Tensor, v0: Tensor, *diagonal: Tensor) -> Tensor:
        dense_out, dense_lse, parts = _causal(rows, rows.scatter(q), k0, v0)
        steps = len(diagonal) // 2
        out, lse = rows.gather(dense_out), rows.gather(dense_lse)  # [N, heads, d], [N, heads]
        if steps:
            k, v = _diagonal(diagonal)
            grouped = _grouped(q, k.shape[1])
            causal_lse = lse.view(grouped.shape[:-1])  # [N, kv, group]
            scores = torch.einsum("nhgd,nhid->nhgi", grouped, k) * q.shape[-1] ** -0.5
            total = torch.logsumexp(torch.cat((causal_lse.unsqueeze(-1), scores), -1), -1)
            merged = _grouped(out, k.shape[1]) * (causal_lse - total).exp().unsqueeze(-1)
            merged += torch.einsum("nhgi,nhid->nhgd", (scores - total.unsqueeze(-1)).exp(), v)
            out, lse = merged.flatten(1, 2).to(q.dtype), total.flatten(1)
        ctx.rows, ctx.steps, ctx.parts = rows, steps, parts
        ctx.save_for_backward(q, k0, v0, out, lse, *diagonal)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k0, v0, merged, lse, *diagonal = ctx.saved_tensors
        rows, steps = ctx.rows, ctx.steps
        # Contiguous: CUDA's flash backward takes no strides of the log-sum-exp.
        dense_lse = rows.scatter(lse.unsqueeze(-1)).squeeze(-1).contiguous()
        dense = _causal_backward(
            ctx.parts, rows.scatter(grad), rows.scatter(q), k0, v0, rows.scatter(merged), dense_lse
        )  # fmt: skip
        dq, dk0, dv0 = rows.gather(dense[0]), dense[1], dense[2]
        if not steps:
            return None, dq, dk0, dv0
        scale = q.shape[-1] ** -0.5
        k, v = _diagonal(diagonal)
        kv_heads = k.shape[1]
        grouped, dout = _grouped(q, kv_heads), _grouped(grad, kv_heads)
        total = lse.view(grouped.shape[:-1]).unsqueeze(-1)
        delta = (dout * _grouped(merged, kv_heads)).sum(-1, keepdim=True)
        p = (torch.einsum("nhgd,nhid->nhgi", grouped, k) * scale - total).exp()
        dscores = p * (torch.einsum("nhgd,nhid->nhgi", dout, v) - delta) * scale
        dq = dq + torch.einsum("nhgi,nhid->nhgd", dscores, k).flatten(1, 2).to(q.dtype)
        dk = torch.einsum("nhgi,nhgd->nhid", dscores, grouped).to(q.dtype)
        dv = torch.einsum("nhgi,nhgd->nhid", p, dout).to(q.dtype)
        return None, dq, dk0, dv0, *dk.unbind(2), *dv.unbind(2)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex_attention(rows: Rows, q: Tensor, k0: Tensor, v0: Tensor, *diagonal: Tensor) -> Tensor:
    """The same value by PyTorch's FlexAttention, which returns a differentiable log-sum-exp; needs a GPU."""
    # Whole blocks, lest every length be a kernel of its own; only padded queries see padded keys.
    queries, keys, values = (
        functional.pad(x, (0, 0, 0, -x.shape[2] % FLEX_BLOCK)) for x in (rows.scatter(q), k0, v0)
    )  # fmt: skip
    mask = _block_mask(queries.shape[2], keys.shape[2], rows.first, q.device)
    dense_out, dense_lse = _compiled_flex()(queries, keys, values, block_mask=mask, enable_gqa=True, return_lse=True)
    dense_out, dense_lse = dense_out[:, :, : rows.window], dense_lse[:, :, : rows.window]
    steps = len(diagonal) // 2
    if not steps:
        return rows.gather(dense_out)
    k, v = _diagonal(diagonal)
    grouped = _grouped(q, k.shape[1])
    lse = rows.gather(dense_lse).view(grouped.shape[:-1]).unsqueeze(-1)
    scores = torch.einsum("nhgd,nhid->nhgi", grouped, k) * q.shape[-1] ** -0.5
    weights = functional.softmax(torch.cat((lse, scores), -1), -1)
    values = torch.cat((_grouped(rows.gather(dense_out), k.shape[1]).unsqueeze(-2), _expand(v, grouped)), -2)
    return torch.einsum("nhgi,nhgid->nhgd", weights, values).flatten(1, 2).to(q.dtype)


def _expand(v: Tensor, grouped: Tensor) -> Tensor:
    return v.unsqueeze(2).expand(-1, -1, grouped.shape[2], -1, -1)


@functools.lru_cache(maxsize=64)
def _block_mask(queries: int, keys: int, first: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q + first >= k, None, None, queries, keys, device=str(device))


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


def unroll_attention(
    backend: str, rows: Rows, q: Tensor, k0: Tensor, v0: Tensor, keys: list[Tensor], values: list[Tensor]
) -> Tensor:
    """Attention of one unroll step over the step-0 keys (causal) and the later steps' keys (diagonal).

    Args:
        backend: `sdpa` or `flex_attention`, of `choose_backend`.
        rows: the N positions that have a query.
        q: [N, heads, d], rotated.
        k0: step-0 keys of every position, [B, kv_heads, S, d], rotated; heads is a multiple of kv_heads.
        v0: step-0 values, [B, kv_heads, S, d].
        keys: for m = 1..i the step-m keys [N, kv_heads, d], rotated.
        values: likewise.

    Returns:
        [N, heads, d].
    """
    run = _flex_attention if backend == "flex_attention" else _MergedAttention.apply
    return cast(Tensor, run(rows, q, k0, v0, *keys, *values))
