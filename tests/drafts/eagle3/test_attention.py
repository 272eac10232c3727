"""The merged attention equals the dense masked one, in value and in every gradient."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from draft_model.drafts import kernels
from draft_model.drafts.batch import collate, move
from draft_model.drafts.eagle3 import attention
from draft_model.drafts.eagle3.attention import causal_attention
from draft_model.drafts.eagle3.plan import Windows, plan_unroll
from draft_model.drafts.kernels import choose_backend
from draft_model.errors import DraftModelError
from drafts.flex import assert_is_mask, dense_flex

from . import reference

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@dataclass
class Inputs:
    """One step's queries and keys."""

    lengths: list[int]  # positions of each conversation
    windows: Windows  # which of them hold a key, and which a query
    # q [N, heads, d], k0 and v0 [P, kv_heads, d], then the later steps' keys and values [later, N, ...]
    tensors: list[Tensor]
    weight: Tensor  # the gradient of the output

    def run(self, backend: str) -> list[Tensor]:
        """Output, and the gradients of all tensors."""
        q, k0, v0, keys, values = self.tensors
        later = len(keys)
        causal = causal_attention(backend, self.windows, k0, v0)
        given = causal.forward(q)
        out, total = kernels.merge(q, given.out, given.lse, given.places, keys, values, later)
        grad = self.weight.to(out)
        dq = causal.backward(given, q, grad, out, total)
        sums = [torch.zeros(x.shape, device=q.device) for x in (keys, values)]
        dq = kernels.merge_backward(q, grad, out, total, dq, given.places, keys, values, *sums, later, True)
        return [out, dq, *causal.key_gradients(), *sums]

    def dense(self) -> list[Tensor]:
        """The same by the reference, conversation by conversation, in float64."""
        leaves = [tensor.double().cpu().requires_grad_() for tensor in self.tensors]
        q, k0, v0, keys, values = leaves
        out = torch.zeros_like(q)
        host = [x.cpu() for x in (self.windows.row_conversation, self.windows.row_time, self.windows.conversation)]
        for row, length in enumerate(self.lengths):
            mine = (host[0] == row).nonzero()[:, 0]
            time = host[1][mine]

            def place(x: Tensor, mine: Tensor = mine, time: Tensor = time, length: int = length) -> Tensor:
                return torch.zeros(length, *x.shape[1:], dtype=x.dtype).index_put((time,), x[mine])

            own = host[2] == row
            found = reference.dense_attention(place(q), [k0[own], *map(place, keys)], [v0[own], *map(place, values)])
            out = out.index_put((mine,), found[time])
        grads = torch.autograd.grad(out, leaves, self.weight.double().cpu(), allow_unused=True, materialize_grads=True)
        return [out.detach(), *grads]


def random_inputs(
    seed: int,
    lengths: list[int],
    later: int,
    *,
    heads: tuple[int, int] = (4, 2),
    size: int = 8,
    share: float = 0.7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    first: int = 0,
) -> Inputs:
    """Random queries, one at least, at a random share of the positions from `first` on, and `later` diagonal keys."""
    generator = torch.Generator().manual_seed(seed)
    batch = collate([(torch.zeros(length + 2, dtype=torch.int64), torch.zeros(length + 2) > 0) for length in lengths])
    active = torch.rand(len(lengths), max(lengths), generator=generator) < share
    active[:, : min(first, max(lengths) - 1)] = False
    active[lengths.index(max(lengths)), -1] = True
    active &= torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    predicted = torch.zeros_like(batch.predicted)
    predicted[:, 1 : 1 + max(lengths)] = active  # position t is taught by t + 1
    plan = move(plan_unroll(replace(batch, predicted=predicted), 1), torch.device(device))
    count, (query_heads, kv_heads) = len(plan.rows), heads
    kv = (kv_heads, size)
    shapes = [(count, query_heads, size), *[(sum(lengths), *kv)] * 2, *[(later, count, *kv)] * 2]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weight = torch.randn(count, query_heads, size, generator=generator)
    return Inputs(lengths, plan.windows, tensors, weight.to(device))


def assert_same(found: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Out and the gradients of q, k0, v0 and the diagonal, relative to the norm of each.

    Where terms cancel (a score's gradient is p (do.v - do.o)) the rest has the rounding of the terms: a tenth
    of the tolerance of the largest norm is free.
    """
    scale = max(float(tensor.norm()) for tensor in truth)
    for number, (value, expected) in enumerate(zip(found, truth, strict=True)):
        error = float((value.double().cpu() - expected).norm())
        assert error <= tolerance * float(expected.norm()) + 0.1 * tolerance * scale, number


def assert_close(found: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Out, and all gradients as one vector, relative to their norms: in bfloat16 small ones cancel."""
    for part in (slice(0, 1), slice(1, None)):
        value = torch.cat([tensor.flatten().double().cpu() for tensor in found[part]])
        expected = torch.cat([tensor.flatten() for tensor in truth[part]])
        assert float((value - expected).norm()) <= tolerance * float(expected.norm())


shapes = given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    later=st.integers(0, 6),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 2)]),
    size=st.sampled_from([2, 6, 8, 16, 24]),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    first=st.sampled_from([0, 0, 1, 7, 30]),
)


@shapes
@settings(max_examples=100, deadline=None)
def test_float32_equals_the_dense_mask(seed, lengths, later, heads, size, share, first):
    inputs = random_inputs(seed, lengths, later, heads=heads, size=size, share=share, first=first)
    assert_same(inputs.run("sdpa"), inputs.dense(), 1e-5)


@shapes
@settings(max_examples=100, deadline=None)
def test_bfloat16_is_close_to_the_dense_mask(seed, lengths, later, heads, size, share, first):
    inputs = random_inputs(seed, lengths, later, heads=heads, size=size, share=share, first=first, dtype=torch.bfloat16)
    assert_close(inputs.run("sdpa"), inputs.dense(), 1e-2)


@pytest.mark.parametrize("length", [129, 600])  # over the CPU kernel's block edges
@pytest.mark.parametrize("first", [0, 64, 100])
def test_long_conversations(length, first):
    inputs = random_inputs(0, [length, 65], 3, heads=(2, 1), share=0.5, first=first)
    assert_same(inputs.run("sdpa"), inputs.dense(), 1e-5)


def test_large_scores_do_not_overflow():
    inputs = random_inputs(0, [12, 7], 4)
    inputs.tensors[0] *= 30
    assert_same(inputs.run("sdpa"), inputs.dense(), 1e-4)  # scores of hundreds: their rounding shows


def test_a_backend_that_cannot_run_becomes_sdpa_with_one_line_or_is_refused(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_backend("sdpa", CPU, torch.float32) == "sdpa"
        assert choose_backend("sdpa", GPU, torch.bfloat16) == "sdpa"
        assert choose_backend("flex_attention", GPU, torch.float32) == "flex_attention"
        assert not caplog.records
        assert choose_backend("flex_attention", CPU, torch.float32) == "sdpa"
    (record,) = caplog.records
    assert "flex_attention has no backward on CPU; sdpa" in record.getMessage()
    with pytest.raises(DraftModelError, match=r"attention_backend: given 'sdpa'.*attention_backend=flex_attention"):
        choose_backend("sdpa", GPU, torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("later", "heads"), [(0, (4, 2)), (3, (4, 2)), (6, (4, 4))])
@pytest.mark.parametrize("first", [0, 5])
def test_flex_attention_has_the_same_values_on_cpu(monkeypatch, later, heads, first):
    """Only its compiled kernel needs a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    inputs = random_inputs(5, [20, 11], later, heads=heads, size=16, first=first)
    q, k0, v0, keys, values = inputs.tensors
    given = attention._Flex(inputs.windows, k0, v0).forward(q)
    out, _ = kernels.merge(q, given.out, given.lse, given.places, keys, values, later)
    assert_same([out], inputs.dense()[:1], 1e-5)


@pytest.mark.parametrize(("lengths", "share"), [([20, 11], 0.7), ([7, 1, 150], 0.3), ([140], 1.0)])
def test_gradients_around_flex_attention_are_those_of_the_dense_mask(monkeypatch, lengths, share):
    monkeypatch.setattr(attention, "compiled_flex", lambda: dense_flex)
    inputs = random_inputs(5, lengths, 3, size=16, share=share, first=2)
    assert_same(inputs.run("flex_attention"), inputs.dense(), 1e-5)


def test_flex_attention_is_not_compiled_again_for_other_row_counts(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(attention, "compiled_flex", lambda: kernels.compiled_flex(True, "eager"))

    def run(lengths):
        inputs = random_inputs(5, lengths, 0, size=16)
        q, k0, v0, *_ = inputs.tensors
        attention._Flex(inputs.windows, k0, v0).forward(q)

    run([200, 110])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([300, 333, 70], [900], [130, 260, 31, 500]):
            run(lengths)


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
       share=st.sampled_from([0.0, 0.1, 1.0]), first=st.sampled_from([0, 100]))  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_the_tiles_of_flex_attentions_mask_are_those_of_the_mask(seed, lengths, share, first):
    windows = random_inputs(seed, lengths, 0, heads=(1, 1), size=2, share=share, first=first).windows
    mask = attention._block_mask(windows)
    truth = torch.zeros(mask.seq_lengths, dtype=torch.bool)
    queries, keys = windows.query_starts.tolist(), windows.key_starts.tolist()
    for row in range(len(queries) - 1):
        size, count = queries[row + 1] - queries[row], keys[row + 1] - keys[row]
        own = truth[queries[row] : queries[row + 1], keys[row] : keys[row + 1]]
        own.copy_(torch.ones(size, count, dtype=torch.bool).tril(count - size))  # aligned at the end
    assert_is_mask(mask, truth)


def dense_flash(q, k, v, query_starts, key_starts):
    """Scores of packed conversations, each causal and aligned at its end, and the keys and values of all heads."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    sees = torch.zeros(len(q), len(k), dtype=torch.bool)
    for first, last, start, end in zip(query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False):
        sees[first:last, start:end] = torch.ones(last - first, end - start).tril((end - start) - (last - first)) > 0
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~sees, -torch.inf), k, v


def flash_forward(q, k, v, query_starts, key_starts, longest_query, longest_key, *_settings):
    """What PyTorch's flash attention for packed conversations gives."""
    assert longest_query == query_starts.diff().max()
    assert longest_key == key_starts.diff().max()
    scores, _, v = dense_flash(q, k, v, query_starts, key_starts)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1), "seed", "offset", None


def flash_backward(grad, q, k, v, out, lse, query_starts, key_starts, *settings):
    """Its backward, which takes whichever output and log-sum-exp it is given."""
    assert settings[-2:] == ("seed", "offset")
    scores, keys, values = dense_flash(q, k, v, query_starts, key_starts)
    p = (scores - lse.unsqueeze(-1)).exp()
    d_scores = p * (torch.einsum("qhd,khd->hqk", grad, values) - (grad * out).sum(-1).T.unsqueeze(-1))
    d_scores *= q.shape[-1] ** -0.5
    dk, dv = torch.einsum("hqk,qhd->khd", d_scores, q), torch.einsum("hqk,qhd->khd", p, grad)
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return torch.einsum("hqk,khd->qhd", d_scores, keys), dk, dv


@shapes
@example(seed=0, lengths=[3, 2], later=0, heads=(2, 2), size=2, share=0.0, first=0)
@settings(max_examples=30, deadline=None)
def test_packed_conversations_equal_each_alone(seed, lengths, later, heads, size, share, first):
    """The GPU's packing around a dense form of its kernel, which needs one."""
    inputs = random_inputs(seed, lengths, later, heads=heads, size=size, share=share, first=first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_FlashOnCpu", attention._FlashOnGpu)
        patch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
        patch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
        found = inputs.run("sdpa")
    assert_same(found, inputs.dense(), 1e-5)


def padded_scores(q, k):
    """Causal scores of conversations padded to one length, [B, heads, S, S]."""
    assert q.shape == k.shape
    assert q.shape[2] % attention.CUDNN_BLOCK == 0
    sees = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~sees, -torch.inf)


def cudnn_forward(q, k, v):
    """What cuDNN's attention gives."""
    scores = padded_scores(q, k)
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True), "seed", "offset"


def cudnn_backward(grad, q, k, v, out, lse, *state):
    """Its backward, which takes whichever output and log-sum-exp it is given."""
    assert state == ("seed", "offset")
    p = (padded_scores(q, k) - lse).exp()
    d_scores = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return d_scores @ k, d_scores.mT @ q, p.mT @ grad


@shapes
@settings(max_examples=20, deadline=None)
def test_padding_for_cudnn_changes_nothing(seed, lengths, later, heads, size, share, first):
    inputs = random_inputs(seed, lengths, later, heads=heads, size=size, share=share, first=first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_FlashOnCpu", attention._Cudnn)
        patch.setattr(attention, "_cudnn_forward", cudnn_forward)
        patch.setattr(attention, "_cudnn_backward", cudnn_backward)
        found = inputs.run("sdpa")
    assert_same(found, inputs.dense(), 1e-5)


@pytest.mark.parametrize("kind", [attention._FlashOnGpu, attention._Cudnn])
def test_pytorchs_operators_for_gpus_take_what_they_are_given(kind):
    """Without a GPU they know types and shapes, which the stand-ins above may have wrong."""
    inputs = random_inputs(1, [200, 150], 2, size=64, dtype=torch.bfloat16)
    windows = replace(inputs.windows, **{
        name: value.to("meta") for name, value in vars(inputs.windows).items() if isinstance(value, Tensor)
    })  # fmt: skip
    q, k0, v0, *_ = (tensor.to("meta") for tensor in inputs.tensors)
    causal = kind(windows, k0, v0)
    given = causal.forward(q)
    assert given.out.shape[1:] == q.shape[1:]
    assert (given.lse.shape, given.lse.dtype) == ((q.shape[1], len(given.out)), torch.float32)
    total = given.lse.index_select(1, given.places)
    assert causal.backward(given, q, torch.empty_like(q), torch.empty_like(q), total).shape == given.out.shape
    assert [gradient.shape for gradient in causal.key_gradients()] == [k0.shape, v0.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("later", "heads"), [(3, (8, 2)), (6, (4, 4))])
@pytest.mark.parametrize("lengths", [[300, 65], [128, 1, 128], [1100], [1030, 1500]])
@pytest.mark.parametrize("first", [0, 64])
def test_both_backends_on_a_gpu(backend, later, heads, lengths, first):
    inputs = random_inputs(7, lengths, later, heads=heads, size=64, dtype=torch.bfloat16, device="cuda", first=first)
    assert_close(inputs.run(backend), inputs.dense(), 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("lengths", "first", "kind"), [([1100], 0, "_Cudnn"), ([1100], 1000, "_FlashOnGpu")])
def test_short_windows_and_short_conversations_keep_to_flash(lengths, first, kind):
    inputs = random_inputs(7, lengths, 1, size=64, dtype=torch.bfloat16, device="cuda", first=first)
    assert type(causal_attention("sdpa", inputs.windows, *inputs.tensors[1:3])).__name__ == kind
