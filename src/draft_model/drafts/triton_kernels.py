"""The elementwise work of a training step as Triton kernels: one pass over memory each, float32 inside.

Every function has a plain PyTorch counterpart of the same name and arguments in `kernels.py`, which says what it
computes and of which types; tests hold the two against each other (on a CPU by Triton's interpreter). No kernel uses
atomics, so results are deterministic, and row counts are run-time arguments, so no new count compiles a kernel again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 264  # of kernels that sum over rows: two per multiprocessor of an H100


def _warps(block: int) -> int:
    return 1 if block <= 512 else 4 if block <= 2048 else 8


@triton.jit(do_not_specialize=["eps"], do_not_specialize_on_alignment=["rows"])
def _rms_norm(x, weight, unit, scale, rows, H, eps, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = row
    if GATHER:
        source = tl.load(rows + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (column < H) & (source >= 0)
    value = tl.load(x + source * H + column, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / H + eps)
    multiplier = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(unit + row * H + column, value * inverse * multiplier, mask=column < H)
    tl.store(scale + row, inverse)


def rms_norm(x, weight, eps, rows=None):
    """See `kernels.rms_norm`."""
    count, size = (len(x) if rows is None else len(rows)), x.shape[1]
    unit, scale = x.new_empty(count, size), x.new_empty(count, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    _rms_norm[(count,)](x, weight, unit, scale, rows, size, eps, rows is not None, block, num_warps=_warps(block))
    return unit, scale


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["rows"])
def _rms_norm_backward(
    grad, x, weight, scale, residual, rows, dx, partial, N, H,
    GATHER: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < H
    multiplier = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    number = program
    while number < N:
        row = number.to(tl.int64)
        source = row
        if GATHER:
            source = tl.load(rows + row).to(tl.int64)
        there = inside & (source >= 0)
        inverse = tl.load(scale + row)
        unit = tl.load(x + source * H + column, mask=there, other=0.0).to(tl.float32) * inverse
        given = tl.load(grad + row * H + column, mask=inside, other=0.0).to(tl.float32)
        total += unit * given
        given = given * multiplier
        value = inverse * (given - unit * (tl.sum(unit * given, 0) / H))
        if RESIDUAL:
            value += tl.load(residual + source * H + column, mask=there, other=0.0).to(tl.float32)
        tl.store(dx + source * H + column, value, mask=there)
        number += programs
    tl.store(partial + program * H + column, total, mask=inside)


def rms_norm_backward(grad, x, weight, scale, *, residual=None, rows=None, out=None):
    """See `kernels.rms_norm_backward`."""
    out = torch.empty_like(x) if out is None else out
    count, size = grad.shape
    programs = min(_PROGRAMS, count)
    partial = x.new_empty(programs, size, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    _rms_norm_backward[(programs,)](
        grad, x, weight, scale, residual, rows, out, partial, count, size,
        rows is not None, residual is not None, block, num_warps=_warps(block),
    )  # fmt: skip
    return out, partial.sum(0)


@triton.jit
def _swiglu(gates, ups, product, I, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    gate = tl.load(gates + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + row * I + column, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


def swiglu(gate, up):
    """See `kernels.swiglu`; the two are of like strides."""
    count, size = gate.shape
    product = gate.new_empty(count, size)
    block = min(1024, triton.next_power_of_2(size))
    _swiglu[(count, triton.cdiv(size, block))](gate, up, product, size, gate.stride(0), block, num_warps=4)
    return product


@triton.jit
def _swiglu_backward(both, grad, I, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    gate_at, up_at, at = both + row * 2 * I + column, both + row * 2 * I + I + column, grad + row * I + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    active = gate * sigmoid
    tl.store(gate_at, given * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=inside)
    tl.store(up_at, given * active, mask=inside)
    tl.store(at, active * up, mask=inside)


def swiglu_backward(both, grad):
    """See `kernels.swiglu_backward`; the results take the place of the arguments."""
    count, size = grad.shape
    block = min(1024, triton.next_power_of_2(size))
    _swiglu_backward[(count, triton.cdiv(size, block))](both, grad, size, block, num_warps=4)
    return both, grad


@triton.jit(do_not_specialize=["step", "token_column"], do_not_specialize_on_alignment=["tokens", "time"])
def _rotate_heads(
    qkv, token_part, tokens, table, time, step, q, k, v, positions, token_width, token_column, rotary,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, DP)[None, :]
    inside = (head < QH + 2 * KH) & (place < D)
    token = tl.maximum(tl.load(tokens + row), 0).to(tl.int64)
    base, own = qkv + row * (QH + 2 * KH) * D, token_part + token * token_width + token_column
    partner = tl.where(place < rotary // 2, place + rotary // 2, place - rotary // 2)
    turned = (place < rotary) & (head < QH + KH)
    value = tl.load(base + head * D + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(own + head * D + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(base + head * D + partner, mask=inside & turned, other=0.0).to(tl.float32)
    other += tl.load(own + head * D + partner, mask=inside & turned, other=0.0).to(tl.float32)
    at = (tl.load(time + row) + step) * rotary + place
    cosine = tl.load(table + at, mask=place < rotary, other=1.0).to(tl.float32)
    sine = tl.load(table + positions * rotary + at, mask=place < rotary, other=0.0).to(tl.float32)
    sign = tl.where(place < rotary // 2, -1.0, 1.0)
    value = tl.where(turned, value * cosine + sign * other * sine, value)
    tl.store(q + row * QH * D + head * D + place, value, mask=inside & (head < QH))
    tl.store(k + row * KH * D + (head - QH) * D + place, value, mask=inside & (head >= QH) & (head < QH + KH))
    tl.store(v + row * KH * D + (head - QH - KH) * D + place, value, mask=inside & (head >= QH + KH))


def rotate_heads(qkv, token_part, tokens, table, time, step, column, q, k, v):
    """See `kernels.rotate_heads`."""
    query_heads = q.shape[1] if q is not None else 0
    kv_heads = k.shape[1] if k is not None else 0
    (size,) = {x.shape[-1] for x in (q, k) if x is not None}
    total = query_heads + 2 * kv_heads
    heads = min(16, triton.next_power_of_2(total))
    grid = (len(qkv), triton.cdiv(total, heads))
    _rotate_heads[grid](
        qkv, token_part, tokens, table, time, step, *(qkv if x is None else x for x in (q, k, v)),
        table.shape[1], token_part.shape[1], column,
        table.shape[2], query_heads, kv_heads, size, heads, triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["step", "token_column"], do_not_specialize_on_alignment=["tokens", "time"])
def _rotate_heads_backward(
    dq, dk, dv, table, time, step, tokens, dqkv, token_grad, positions, token_width, token_column, rotary,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, DP)[None, :]
    inside = (head < QH + 2 * KH) & (place < D)
    partner = tl.where(place < rotary // 2, place + rotary // 2, place - rotary // 2)
    turned = inside & (place < rotary) & (head < QH + KH)
    of_q, of_k, of_v = head < QH, (head >= QH) & (head < QH + KH), head >= QH + KH
    q_at, k_at = dq + row * QH * D + head * D, dk + row * KH * D + (head - QH) * D
    value = tl.load(q_at + place, mask=inside & of_q, other=0.0).to(tl.float32)
    value += tl.load(k_at + place, mask=inside & of_k, other=0.0).to(tl.float32)
    value += tl.load(dv + row * KH * D + (head - QH - KH) * D + place, mask=inside & of_v, other=0.0).to(tl.float32)
    other = tl.load(q_at + partner, mask=turned & of_q, other=0.0).to(tl.float32)
    other += tl.load(k_at + partner, mask=turned & of_k, other=0.0).to(tl.float32)
    start = (tl.load(time + row) + step) * rotary
    cosine = tl.load(table + start + place, mask=place < rotary, other=1.0).to(tl.float32)
    sine = tl.load(table + positions * rotary + start + partner, mask=place < rotary, other=0.0).to(tl.float32)
    sign = tl.where(place < rotary // 2, 1.0, -1.0)  # that of the partner
    value = tl.where(turned, value * cosine + sign * other * sine, value)
    tl.store(dqkv + row * (QH + 2 * KH) * D + head * D + place, value, mask=inside)
    token = tl.load(tokens + row).to(tl.int64)
    at = token_grad + token * token_width + token_column + head * D + place
    reads = inside & (token >= 0)
    tl.store(at, tl.load(at, mask=reads, other=0.0) + value, mask=reads)


def rotate_heads_backward(dq, dk, dv, table, time, step, tokens, token_grad, column, dtype):
    """See `kernels.rotate_heads_backward`."""
    query_heads = dq.shape[1] if dq is not None else 0
    kv_heads = dk.shape[1] if dk is not None else 0
    (size,) = {x.shape[-1] for x in (dq, dk) if x is not None}
    total = query_heads + 2 * kv_heads
    heads = min(16, triton.next_power_of_2(total))
    dqkv = torch.empty(len(time), total * size, dtype=dtype, device=table.device)
    grid = (len(time), triton.cdiv(total, heads))
    _rotate_heads_backward[grid](
        *(dqkv if x is None else x for x in (dq, dk, dv)), table, time, step, tokens, dqkv, token_grad,
        table.shape[1], token_grad.shape[1], column,
        table.shape[2], query_heads, kv_heads, size, heads, triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return dqkv


@triton.jit(do_not_specialize=["N", "W"], do_not_specialize_on_alignment=["places", "lse", "total"])
def _merge(
    q, out, lse, places, keys, values, merged, total, N, W, scale, later: tl.constexpr,
    KH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(places + row).to(tl.int64)
    group, d = tl.arange(0, GP), tl.arange(0, DP)
    head = kv_head * G + group
    inside, inside_d = (group[:, None] < G) & (d[None, :] < D), d < D
    at = head[:, None] * D + d[None, :]
    query = tl.load(q + row * KH * G * D + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(out + place * KH * G * D + at, mask=inside, other=0.0).to(tl.float32)
    top = tl.load(lse + head.to(tl.int64) * W + place, mask=group < G, other=0.0)
    sum_ = tl.full((GP,), 1.0, tl.float32)
    for m in range(later):
        offset = ((m * N + row) * KH + kv_head) * D + d
        key = tl.load(keys + offset, mask=inside_d, other=0.0).to(tl.float32)
        score = tl.sum(query * key[None, :], 1) * scale
        higher = tl.maximum(top, score)
        shrink, weight = tl.exp(top - higher), tl.exp(score - higher)
        vector = tl.load(values + offset, mask=inside_d, other=0.0).to(tl.float32)
        value = value * shrink[:, None] + weight[:, None] * vector[None, :]
        sum_ = sum_ * shrink + weight
        top = higher
    tl.store(merged + row * KH * G * D + at, value / sum_[:, None], mask=inside)
    tl.store(total + head.to(tl.int64) * N + row, top + tl.log(sum_), mask=group < G)


def merge(q, out, lse, places, keys, values, later):
    """See `kernels.merge`."""
    places = torch.arange(len(q), device=q.device) if places is None else places
    count, heads, size = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    lse = lse.contiguous()
    merged, total = torch.empty_like(q), lse.new_empty(heads, count)
    _merge[(count, kv_heads)](
        q, out, lse, places, keys, values, merged, total, count, lse.shape[1], size**-0.5, later,
        kv_heads, group, size, triton.next_power_of_2(group), triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return merged, total


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["places", "total"])
def _merge_backward(
    q, grad, merged, total, dq_causal, places, keys, values, dq, dkeys, dvalues, N, scale, later: tl.constexpr,
    KH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(places + row).to(tl.int64)
    group, d = tl.arange(0, GP), tl.arange(0, DP)
    head = kv_head * G + group
    inside, inside_d = (group[:, None] < G) & (d[None, :] < D), d < D
    at = head[:, None] * D + d[None, :]
    of_row = row * KH * G * D + at
    query = tl.load(q + of_row, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad + of_row, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(given * tl.load(merged + of_row, mask=inside, other=0.0).to(tl.float32), 1)
    normaliser = tl.load(total + head.to(tl.int64) * N + row, mask=group < G, other=0.0)
    value = tl.load(dq_causal + place * KH * G * D + at, mask=inside, other=0.0).to(tl.float32)
    for m in range(later):
        offset = ((m * N + row) * KH + kv_head) * D + d
        key = tl.load(keys + offset, mask=inside_d, other=0.0).to(tl.float32)
        vector = tl.load(values + offset, mask=inside_d, other=0.0).to(tl.float32)
        p = tl.where(group < G, tl.exp(tl.sum(query * key[None, :], 1) * scale - normaliser), 0.0)
        dscore = p * (tl.sum(given * vector[None, :], 1) - delta) * scale
        value += dscore[:, None] * key[None, :]
        dkey, dvector = tl.sum(dscore[:, None] * query, 0), tl.sum(p[:, None] * given, 0)
        if not FIRST:
            dkey += tl.load(dkeys + offset, mask=inside_d, other=0.0)
            dvector += tl.load(dvalues + offset, mask=inside_d, other=0.0)
        tl.store(dkeys + offset, dkey, mask=inside_d)
        tl.store(dvalues + offset, dvector, mask=inside_d)
    tl.store(dq + of_row, value, mask=inside)


def merge_backward(q, grad, merged, total, dq_causal, places, keys, values, dkeys, dvalues, later, first):
    """See `kernels.merge_backward`."""
    places = torch.arange(len(q), device=q.device) if places is None else places
    count, heads, size = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    dq = torch.empty_like(q)
    _merge_backward[(count, kv_heads)](
        q, grad, merged, total, dq_causal, places, keys, values, dq, dkeys, dvalues, count, size**-0.5, later,
        kv_heads, group, size, triton.next_power_of_2(group), triton.next_power_of_2(size), first, num_warps=1,
    )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["T"])
def _rotate(
    x, cosines, sines, out, T, heads, sb, sh, st, tb, tt,
    D: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    batch, time = tl.program_id(0).to(tl.int64) // T, tl.program_id(0).to(tl.int64) % T
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, DP)[None, :]
    inside = (head < heads) & (place < D)
    partner = tl.where(place < D // 2, place + D // 2, place - D // 2)
    base = batch * sb + time * st + head * sh
    value = tl.load(x + base + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + base + partner, mask=inside, other=0.0).to(tl.float32)
    at = batch * tb + time * tt + place
    cosine = tl.load(cosines + at, mask=place < D, other=0.0).to(tl.float32)
    sine = tl.load(sines + at, mask=place < D, other=0.0).to(tl.float32)
    turned = value * cosine + tl.where(place < D // 2, -1.0, 1.0) * other * sine
    tl.store(out + base + place, turned, mask=inside)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, T, d], of any strides but the last, by tables [B or 1, T, d]."""
    batch, heads, time, size = x.shape
    out = torch.empty_like(x)  # of the same strides
    block = min(16, triton.next_power_of_2(heads))
    _rotate[(batch * time, triton.cdiv(heads, block))](
        x, cosines, sines, out, time, heads, x.stride(0), x.stride(1), x.stride(2),
        cosines.stride(0) if len(cosines) == batch else 0, cosines.stride(1),
        size, block, triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out
