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

The classes below are the causal part on the three kinds of machine; `kernels.merge` is the diagonal. Where the causal
part comes from FlexAttention, whose backward knows its own o_A and A only, these get the gradients
do exp(A - L) and exp(A - L) do.(o_A - o).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from draft_model.drafts.eagle3.plan import Windows
from draft_model.drafts.kernels import compiled_flex, flex_mask, flex_rows

logger = logging.getLogger(__name__)

BLOCK = 64  # queries that the CPU's flash kernel takes at once
CUDNN_BLOCK = 128


@dataclass(frozen=True)
class Attended:
    """What the causal part gives."""

    out: Tensor  # [W, heads, d], or of the rows alone [N, heads, d] where places is none
    lse: Tensor  # its log-sum-exp, float32 [heads, W or N]
    places: Tensor | None  # where the rows stand in out, int64 [N]
    kept: Any = None  # what this kind's backward wants to have again


class CausalAttention:
    """Causal attention of the rows of one batch over its step-0 keys; adds the gradients of these up over the steps."""

    _gradients: tuple[Tensor, ...] = ()  # of keys and values, as the kind lays them out

    def _add(self, *gradients: Tensor) -> None:
        for total, gradient in zip(self._gradients, gradients, strict=bool(self._gradients)):
            total.add_(gradient)
        self._gradients = self._gradients or gradients

    def forward(self, q: Tensor) -> Attended:
        """Attends with the rotated queries of one step, [N, heads, d]."""
        raise NotImplementedError

    def backward(self, given: Attended, q: Tensor, grad: Tensor, merged: Tensor, total: Tensor) -> Tensor:
        """The queries' gradient, as `Attended.out` is laid out, from that of the merged attention, [N, heads, d].

        `given` is what the step's `forward` gave; `total` the merged attention's log-sum-exp, float32 [heads, N].
        """
        raise NotImplementedError

    def key_gradients(self) -> tuple[Tensor, ...]:
        """Gradients of keys and values over all steps, [P, kv_heads, d] each."""
        return self._gradients


def causal_attention(backend: str, windows: Windows, k0: Tensor, v0: Tensor) -> CausalAttention:
    """The attention of one batch, over its step-0 keys (rotated) and values, [P, kv_heads, d]."""
    if backend == "flex_attention":
        return _Flex(windows, k0, v0)
    if not k0.is_cuda:
        return _FlashOnCpu(windows, k0, v0)
    fits_cudnn = windows.square and _cudnn_works(k0.shape[-1], k0.device)
    return (_Cudnn if fits_cudnn else _FlashOnGpu)(windows, k0, v0)


def _spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Rows [N, ...] at their places of [size, ...], zero elsewhere."""
    out = rows.new_zeros(size, *rows.shape[1:])
    size_of = rows.shape[1:].numel()
    # A single row may be contiguous whatever its stride.
    wide = size_of * rows.element_size() % 8 == 0 and rows.is_contiguous() and rows.stride(0) == size_of
    # Eight bytes at a time: the kernel takes as long for an element of two bytes.
    kind = torch.int64 if wide else rows.dtype
    out.flatten(1).view(kind).index_copy_(0, places, rows.flatten(1).view(kind))
    return out


class _FlashOnGpu(CausalAttention):
    """Variable-length flash attention over packed windows: no padding, and no two conversations meet."""

    def __init__(self, windows: Windows, k0: Tensor, v0: Tensor) -> None:
        self._windows, self._k, self._v = windows, k0, v0
        self._starts = windows.query_starts.to(torch.int32), windows.key_starts.to(torch.int32)
        self._spans = windows.longest_query, windows.longest_key

    def _spread(self, rows: Tensor) -> Tensor:
        """Rows [N, ...] at their places in the windows [W, ...], zero elsewhere."""
        w = self._windows
        return rows if w.dense else _spread(rows, w.places, w.size)

    def forward(self, q: Tensor) -> Attended:
        out, lse, *state = torch.ops.aten._flash_attention_forward(
            self._spread(q), self._k, self._v, *self._starts, *self._spans, 0.0, True, False
        )
        return Attended(out, lse, self._windows.places, tuple(state[:2]))

    def backward(self, given: Attended, q: Tensor, grad: Tensor, merged: Tensor, total: Tensor) -> Tensor:
        dense = self._windows.dense
        lse = total if dense else self._spread(total.T.contiguous()).T.contiguous()
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            self._spread(grad), self._spread(q), self._k, self._v, self._spread(merged), lse,
            *self._starts, *self._spans, 0.0, True, *given.kept,
        )  # fmt: skip
        self._add(dk.float(), dv.float())
        return cast(Tensor, dq)


@functools.cache
def _cudnn_works(size: int, device: torch.device) -> bool:
    """Whether cuDNN's attention and its backward run here, for heads of this size."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    probe = torch.zeros(1, 1, CUDNN_BLOCK, size, device=device, dtype=torch.bfloat16)
    try:
        out, lse, *state = _cudnn_forward(probe, probe, probe)
        _cudnn_backward(probe, probe, probe, probe, out, lse, *state)
    except (RuntimeError, IndexError) as error:
        logger.info("attention: cuDNN's does not run here (%s); flash attention does", str(error).partition("\n")[0])
        return False
    return True


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal attention [B, heads, S, d], its log-sum-exp [B, heads, S, 1], and a random state that nothing uses."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    return found[0], found[1], found[6], found[7]


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    length = q.shape[2]
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    found = backward(grad, q, k, v, out, lse, seed, offset, None, None, None, length, length, 0.0, True)
    return cast("tuple[Tensor, Tensor, Tensor]", found)


class _Cudnn(CausalAttention):
    """cuDNN's attention over whole conversations padded to one length, twice as fast as the other on Hopper.

    It makes a plan for each shape, so lengths are rounded up. All heads get keys of their own, for it takes no groups.
    """

    def __init__(self, windows: Windows, k0: Tensor, v0: Tensor) -> None:
        self._batch, self._length = windows.batch, -(-windows.longest_key // CUDNN_BLOCK) * CUDNN_BLOCK
        self._rows = windows.row_conversation * self._length + windows.row_time  # flat in [B, S]
        self._keys = windows.conversation * self._length + windows.key_time
        self._k0, self._v0, self._kv_heads = k0, v0, k0.shape[1]
        self._k = self._v = k0.new_empty(0)  # of all heads, made with the first queries

    def _spread(self, rows: Tensor, places: Tensor) -> Tensor:
        """Rows [N, heads, d] in [B, heads, S, d], zero elsewhere."""
        size = self._batch * self._length
        rows = rows if len(rows) == size else _spread(rows, places, size)
        return rows.view(self._batch, self._length, *rows.shape[1:]).transpose(1, 2)

    def forward(self, q: Tensor) -> Attended:
        if not self._k.numel():
            groups = (x.repeat_interleave(q.shape[1] // self._kv_heads, 1) for x in (self._k0, self._v0))
            self._k, self._v = (self._spread(x, self._keys) for x in groups)
        out, lse, seed, offset = _cudnn_forward(self._spread(q, self._rows), self._k, self._v)
        flat = out.transpose(1, 2).reshape(-1, *q.shape[1:])
        by_head = lse.view(self._batch, q.shape[1], self._length).transpose(0, 1).flatten(1)
        return Attended(flat, by_head, self._rows, (lse.shape, seed, offset))

    def backward(self, given: Attended, q: Tensor, grad: Tensor, merged: Tensor, total: Tensor) -> Tensor:
        shape, seed, offset = given.kept
        spread = total.new_zeros(total.shape[0], self._batch * self._length).index_copy_(1, self._rows, total)
        lse = spread.view(-1, self._batch, self._length).transpose(0, 1).contiguous().view(shape)
        queries, dout, out = (self._spread(x, self._rows) for x in (q, grad, merged))
        dq, dk, dv = _cudnn_backward(dout, queries, self._k, self._v, out, lse, seed, offset)
        self._add(*(x.unflatten(1, (self._kv_heads, -1)).sum(2, dtype=torch.float32) for x in (dk, dv)))
        return dq.transpose(1, 2).reshape(-1, *q.shape[1:])

    def key_gradients(self) -> tuple[Tensor, ...]:
        return tuple(x.transpose(1, 2).flatten(0, 1).index_select(0, self._keys) for x in self._gradients)


class _FlashOnCpu(CausalAttention):
    """PyTorch's flash attention for CPUs over padded windows [B, heads, S - first, d].

    Before the window lie prompts, whose keys every query sees: a full attention over these and a causal one over the
    window's own keys, merged like the diagonal.
    """

    def __init__(self, windows: Windows, k0: Tensor, v0: Tensor) -> None:
        self._batch, self._length = windows.batch, max(windows.longest_key, 1)
        self._keys = windows.conversation * self._length + windows.key_time  # flat in [B, S]
        self._first = windows.first - windows.first % BLOCK
        self._width = self._length - self._first
        self._rows = windows.row_conversation * self._width + windows.row_time - self._first  # flat in [B, W]
        self._k, self._v = (self._scatter(x, self._keys, self._length) for x in (k0, v0))
        # Which step-0 keys each of the attentions reads, and whether query w sees the first w of them only.
        self._parts = [(slice(self._first), False)] if self._first else []
        self._parts.append((slice(self._first, None), True))

    def _scatter(self, rows: Tensor, places: Tensor, length: int) -> Tensor:
        """Rows [N, heads, ...] in [B, heads, length, ...], zero elsewhere."""
        dense = rows.new_zeros(self._batch * length, *rows.shape[1:]).index_copy_(0, places, rows)
        return dense.view(self._batch, length, *rows.shape[1:]).transpose(1, 2)

    def _gather(self, dense: Tensor) -> Tensor:
        """The rows [N, heads, ...] of [B, heads, W, ...]."""
        return dense.transpose(1, 2).flatten(0, 1).index_select(0, self._rows)

    def forward(self, q: Tensor) -> Attended:
        queries = self._scatter(q, self._rows, self._width)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found = [flash(queries, self._k[:, :, at], self._v[:, :, at], 0.0, causal) for at, causal in self._parts]
        out, lse = found[-1]
        if len(found) == 2:
            before, before_lse = found[0]
            total = torch.logaddexp(lse, before_lse)
            weight, before_weight = ((part - total).exp().unsqueeze(-1) for part in (lse, before_lse))
            out, lse = (out * weight + before * before_weight).to(q.dtype), total
        return Attended(self._gather(out), self._gather(lse).T, None)

    def backward(self, given: Attended, q: Tensor, grad: Tensor, merged: Tensor, total: Tensor) -> Tensor:
        queries, dout, out = (self._scatter(x, self._rows, self._width) for x in (q, grad, merged))
        lse = self._scatter(total.T, self._rows, self._width)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        keys = [(self._k[:, :, at], self._v[:, :, at], causal) for at, causal in self._parts]
        dq, dk, dv = zip(*(flash(dout, queries, k, v, out, lse, 0.0, causal) for k, v, causal in keys), strict=True)
        self._add(torch.cat(dk, 2), torch.cat(dv, 2))
        return self._gather(sum(dq[1:], dq[0]))

    def key_gradients(self) -> tuple[Tensor, ...]:
        return tuple(x.transpose(1, 2).flatten(0, 1).index_select(0, self._keys) for x in self._gradients)


class _Flex(CausalAttention):
    """PyTorch's FlexAttention over packed windows under a block mask; for a GPU."""

    def __init__(self, windows: Windows, k0: Tensor, v0: Tensor) -> None:
        self._windows, self._kv = windows, tuple(flex_rows(x) for x in (k0, v0))
        self._keys = len(k0)
        self._mask = _block_mask(windows)

    def forward(self, q: Tensor) -> Attended:
        from torch.nn.attention.flex_attention import AuxRequest

        w = self._windows
        spread = q if w.dense else q.new_zeros(w.size, *q.shape[1:]).index_copy_(0, w.places, q)
        leaves = [x.detach().requires_grad_(x.is_cuda) for x in (flex_rows(spread), *self._kv)]
        with torch.enable_grad():
            # return_lse would warn once, for which Dynamo compiles twice.
            aux = AuxRequest(lse=True)
            out, more = compiled_flex()(*leaves, block_mask=self._mask, enable_gqa=True, return_aux=aux)
        lse = more.lse
        packed = out.detach()[0].transpose(0, 1).contiguous()
        return Attended(packed, lse.detach()[0].contiguous(), w.places, (leaves, out, lse))

    def backward(self, given: Attended, q: Tensor, grad: Tensor, merged: Tensor, total: Tensor) -> Tensor:
        leaves, out, lse = given.kept
        places = self._windows.places
        own = given.out.index_select(0, places)
        weight = (given.lse.index_select(1, places) - total).exp().T.unsqueeze(-1)  # [N, heads, 1]
        d_own = grad.float() * weight
        d_lse = (d_own * (own.float() - merged.float())).sum(-1)
        d_out = torch.zeros_like(given.out).index_copy_(0, places, d_own.to(q.dtype))
        d_lse = torch.zeros_like(given.lse).index_copy_(1, places, d_lse.T)
        dq, dk, dv = torch.autograd.grad((out, lse), leaves, (d_out.transpose(0, 1).unsqueeze(0), d_lse.unsqueeze(0)))
        self._add(dk.float(), dv.float())
        return cast(Tensor, dq[0].transpose(0, 1).contiguous())

    def key_gradients(self) -> tuple[Tensor, ...]:
        return tuple(x[0, :, : self._keys].transpose(0, 1).contiguous() for x in self._gradients)


def _block_mask(windows: Windows) -> Any:
    """Query w of a window sees the keys of its conversation up to its own."""
    starts, ends = windows.query_starts, windows.key_starts
    # The first key, and key - query where both are at the same position.
    first, offset = (
        torch.repeat_interleave(x, starts.diff(), output_size=windows.size) for x in (ends[:-1], ends[1:] - starts[1:])
    )
    last = torch.arange(1, windows.size + 1, device=first.device) + offset
    return flex_mask([(first, last)], len(windows.key_time))
