"""Each Triton kernel against the plain PyTorch code beside it; on a machine without a GPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from draft_model.drafts import kernels
from draft_model.drafts.dspark import objective as objective_of_blocks
from draft_model.drafts.dspark.blocks import block_mask, place_blocks
from draft_model.drafts.layers import cast_once
from draft_model.training.optimizer import Gradients, make_optimizer
from drafts.dspark.case import DFLASH
from drafts.dspark.case import random_case as random_blocks
from drafts.dspark.test_objective import assert_is_the_definition
from drafts.eagle3.case import random_case
from drafts.eagle3.test_loss import EAGLE31, assert_equals_reference
from drafts.flex import dense_flex

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1")
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels are tested in this process")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def both(monkeypatch, call, *tensors):
    """Results of the kernel, and of the plain code in float64 on the CPU's tensors."""
    found = call(*[x.clone() if isinstance(x, torch.Tensor) else x for x in tensors])
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "fused", lambda _: False)
        exact = [
            x.cpu().clone().float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors
        ]
        exact = [x.cpu() if isinstance(x, torch.Tensor) else x for x in exact]
        truth = call(*exact)
    return found, truth


def assert_close(found, truth, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for value, expected in zip(found, truth, strict=True):
        error = (value.double().cpu() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm() + 1e-9


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, [3, 0, 6]])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(monkeypatch, dtype, rows, residual):
    x, weight = random(7, 20, dtype=dtype), random(20, dtype=dtype, seed=1)
    index = None if rows is None else torch.tensor(rows, device=DEVICE)
    found, truth = both(monkeypatch, lambda *given: kernels.rms_norm(*given, 1e-5, *rest(index, given)), x, weight)
    assert_close(found, truth, dtype)
    grad = random(len(found[0]), 20, dtype=dtype, seed=2)
    extra = random(7, 20, dtype=dtype, seed=3) if residual else None

    def backward(grad, x, weight, scale, extra):
        out = torch.zeros_like(x)
        return kernels.rms_norm_backward(
            grad, x, weight, scale, residual=extra, rows=None if index is None else index.to(x.device), out=out
        )

    assert_close(*both(monkeypatch, backward, grad, x, weight, found[1], extra), dtype)


def rest(index, given):
    return [None if index is None else index.to(given[0].device)]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(monkeypatch, dtype):
    gate_up, grad = random(5, 26, dtype=dtype), random(5, 13, dtype=dtype, seed=1)
    assert_close(*both(monkeypatch, lambda x: [kernels.swiglu(*x.chunk(2, -1))], gate_up), dtype)
    assert_close(*both(monkeypatch, kernels.swiglu_backward, gate_up, grad), dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 6), (3, 1, 10), (0, 2, 8), (4, 0, 8)])
def test_rotation(monkeypatch, dtype, heads, kv_heads, size):
    count, tokens = 5, 9
    width = (heads + 2 * kv_heads) * size
    time = torch.tensor([0, 3, 1, 4, 2], device=DEVICE)
    index = torch.tensor([2, 5, 0, 8, -1], device=DEVICE)
    table = random(2, 12, size // 2, dtype=dtype, seed=3).repeat(1, 1, 2)  # a pair shares its angle
    part = random(tokens, width + 3, dtype=dtype, seed=1)
    part[0] = 0  # what -1 reads differs between the two, and is never used

    def forward(qkv, part, table):
        shapes = [(heads,), (kv_heads,), (kv_heads,)]
        q, k, v = (qkv.new_zeros(count, *n, size) if n[0] else None for n in shapes)
        kernels.rotate_heads(qkv, part, index.to(qkv.device), table, time.to(qkv.device), 2, 3, q, k, v)
        return [x for x in (q, k, v) if x is not None]

    found, truth = both(monkeypatch, forward, random(count, width, dtype=dtype), part, table)
    assert_close(found, truth, dtype)
    grads = [random(*x.shape, dtype=torch.float32, seed=7 + n) for n, x in enumerate(found)]
    for grad in grads:
        grad[-1] = 0  # no gradient comes from past a conversation's end

    def backward(table, *grads):
        grads = list(grads)
        dq = grads.pop(0) if heads else None
        dk, dv = grads or (None, None)
        sums = torch.ones(tokens, width + 3, device=table.device)
        dqkv = kernels.rotate_heads_backward(
            dq, dk, dv, table, time.to(table.device), 2, index.to(table.device), sums, 3, table.dtype
        )
        return [dqkv, sums]

    assert_close(*both(monkeypatch, backward, table, *grads), dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("later", [0, 1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (6, 2, 10)])
def test_merge(monkeypatch, dtype, later, heads, kv_heads, size):
    count, window = 5, 8
    places = torch.tensor([1, 2, 4, 6, 7], device=DEVICE)
    q, out = random(count, heads, size, dtype=dtype), random(window, heads, size, dtype=dtype, seed=1)
    lse = random(heads, window, seed=2)
    keys, values = (random(3, count, kv_heads, size, dtype=dtype, seed=seed) for seed in (3, 4))
    call = lambda *given: kernels.merge(*given[:3], places.to(given[0].device), *given[3:], later)  # noqa: E731
    found, truth = both(monkeypatch, call, q, out, lse, keys, values)
    assert_close(found, truth, dtype)
    grad, dq = random(count, heads, size, dtype=dtype, seed=5), random(window, heads, size, dtype=dtype, seed=6)
    for first in (False, True):

        def backward(q, grad, merged, total, dq, keys, values, first=first):
            sums = [torch.ones(keys.shape, device=q.device) for _ in range(2)]
            result = kernels.merge_backward(
                q, grad, merged, total, dq, places.to(q.device), keys, values, *sums, later, first
            )
            return [result, *sums]

        assert_close(*both(monkeypatch, backward, q, grad, *found, dq, keys, values), dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["kl", "lk", "tv"])
def test_distillation(dtype, loss):
    from draft_model.drafts.eagle3 import triton_loss

    vocab, known, teachers = 5000, 2300, 4
    logits = random(teachers, vocab, dtype=dtype) * 3
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:known].sort().values.to(DEVICE)
    draft_ids = torch.full((vocab,), -1, device=DEVICE)
    draft_ids[ids] = torch.arange(known, device=DEVICE)
    taught = triton_loss.teach(logits, ids, draft_ids)
    assert torch.equal(taught[0], logits[:, ids])
    assert torch.equal(taught[2], draft_ids[logits.argmax(-1)])
    assert_close([taught[1]], [logits[:, ids].cpu().double().logsumexp(-1)], torch.float32)
    rows = torch.tensor([0, 1, 2, 3, 1, 0], device=DEVICE)
    weights = torch.tensor([1.0, 0.5, 0.8, 1.0, 0.0, 0.3], device=DEVICE)
    z = random(6, known, dtype=dtype, seed=2) * 2
    exact = z.cpu().double().requires_grad_()
    p = logits[:, ids].cpu().double().softmax(-1)[rows.cpu()]
    log_q = exact.log_softmax(-1)
    counts = (weights.cpu() > 0) & (taught[2].cpu()[rows.cpu()] >= 0)
    overlap = torch.minimum(p, log_q.exp()).sum(-1) * counts
    share = {"kl": 1.0, "tv": 0.0, "lk": torch.exp(-3 * overlap.detach())}[loss]
    losses = (share * -(p * log_q).sum(-1) + (1 - share) * (1 - overlap)) * counts
    (losses * weights.cpu()).sum().backward()
    sums = triton_loss.distill(z, taught, rows, weights, True, loss).cpu()
    assert torch.equal(sums[:, 1] > 0, counts)
    assert torch.equal(sums[:, 2] > 0, counts & (exact.argmax(-1) == taught[2].cpu()[rows.cpu()]))
    assert_close([sums[:, 0], sums[:, 3], z], [losses.detach(), overlap.detach(), exact.grad], dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["tv", "kl", "lk"])
def test_distillation_of_blocks(dtype, loss):
    from draft_model.drafts.dspark import triton_loss

    logits, z = random(3, 5000, dtype=dtype) * 3, random(5, 5000, dtype=dtype, seed=2) * 3
    logits[1, 4321], z[3, 4321] = 20, 15  # agrees
    teachers, weights = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([1.0, 0.5, 0.8, 0.2, 0.3])
    exact, p = z.cpu().double().requires_grad_(), logits.cpu().double().softmax(-1)[teachers]
    q, top = exact.softmax(-1), p.argmax(-1)
    overlap, sure = torch.minimum(p, q).sum(-1), q.gather(1, top.unsqueeze(1))[:, 0]
    far = torch.exp(-3 * overlap.detach())
    hard, variation, soft = {"tv": (0.1, 0.9, 0.0), "kl": (0.0, 0.0, 1.0), "lk": (0.0, 1 - far, far)}[loss]
    losses = -hard * sure.log() + variation * (1 - overlap) - soft * (p * q.log()).sum(-1)
    (losses * weights).sum().backward()
    parts, decay = objective_of_blocks.LOSSES.get(loss, (0.0, 0.0, 0.0)), 3.0 if loss == "lk" else 0.0
    given = logits, teachers.to(DEVICE), weights.to(DEVICE)
    plain = triton_loss.distil(z, *given, False, parts, decay)
    assert torch.equal(z.cpu().double(), exact)
    sums = triton_loss.distil(z, *given, True, parts, decay)
    assert torch.equal(sums, plain)
    assert torch.equal(sums[:, 1].cpu() > 0, exact.argmax(-1) == top)
    assert sums[:, 1].tolist()[3] == 1
    assert_close(
        [sums[:, 0], sums[:, 2], sums[:, 3], z], [x.detach() for x in (losses, overlap, sure, exact.grad)], dtype
    )


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_rotation_of_the_targets_heads(dtype, batch):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from draft_model.drafts import triton_kernels

    q = random(2, 5, 3, 8, dtype=dtype).transpose(1, 2)
    angles = random(batch, 5, 4, seed=1).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    truth, _ = apply_rotary_pos_emb(*(x.cpu().double() for x in (q, q, cos, sin)))
    found = triton_kernels.rotate(q, cos, sin)
    assert found.stride() == q.stride()
    assert_close([found], [truth], dtype)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """How many variants of each kernel were compiled; without a GPU, Triton compiles for an H100 and launches none."""
    triton = pytest.importorskip("triton")
    from triton.runtime import JITFunction, driver

    from draft_model.drafts import triton_kernels
    from draft_model.drafts.dspark import triton_loss as of_blocks
    from draft_model.drafts.eagle3 import triton_loss

    all_kernels = {
        (module.__name__, name): value
        for module in (triton_kernels, triton_loss, of_blocks)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    }
    if not CUDA:
        run, target = JITFunction.run, triton.backends.compiler.GPUTarget("cuda", 90, 32)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(kernels, "fused", lambda _: True)
        monkeypatch.setattr(JITFunction, "run", lambda *args, **named: run(*args, **{**named, "warmup": True}))
        fake = {
            "get_current_target": lambda: target,
            "get_current_device": lambda: 0,
            "get_current_stream": lambda _: 0,
        }
        monkeypatch.setattr(driver, "_active", SimpleNamespace(**fake))
    return lambda: {
        name: sum(len(cache[0]) for cache in kernel.device_caches.values()) for name, kernel in all_kernels.items()
    }


def step_of_each_family(lengths, loss, dtype=torch.bfloat16, **form):
    chain = random_case(0, lengths, learnt=lambda length: torch.arange(length) >= length // 2, **form)
    blocks = random_blocks(0, lengths, head_dim=16)
    backend = "sdpa" if dtype == torch.bfloat16 else "flex_attention"
    objectives = chain.on(DEVICE, 3, backend, dtype, loss)[0], blocks.objective(loss, dtype, DEVICE)
    for case, objective in zip((chain, blocks), objectives, strict=True):
        total, _ = objective(case.batch, [states.to(DEVICE, dtype) for states in case.states])
        if total.requires_grad:
            total.backward()


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_every_kernel_compiles_for_a_gpu(compiled, monkeypatch):
    from draft_model.drafts import triton_kernels
    from draft_model.drafts.eagle3 import attention

    if not CUDA:  # whatever compiled flex_attention does, its kernels are not ours
        monkeypatch.setattr(attention, "compiled_flex", lambda: dense_flex)
    for loss, form in (("kl", {}), ("lk", EAGLE31[2]), ("tv", {})):
        step_of_each_family([9, 14], loss, **form)
    step_of_each_family([9, 14], "lk", torch.float32)
    with torch.no_grad():
        step_of_each_family([9, 14], "tv")
    for dtype in (torch.bfloat16, torch.float32):
        triton_kernels.rotate(*(random(*shape, dtype=dtype) for shape in ((2, 3, 5, 8), (1, 5, 8), (1, 5, 8))))
    assert min(compiled().values()) > 0


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_new_row_counts_compile_nothing(compiled):
    for lengths in ([64, 50], [33], [129, 40]):
        step_of_each_family(lengths, "tv", head_dim=16)
    before = compiled()
    for lengths in ([65, 51], [34], [96], [17, 18, 19], [200, 3]):
        step_of_each_family(lengths, "tv", head_dim=16)
    assert compiled() == before


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: numbers and sizes that depend on tensors' values, and copies."""

    def __init__(self):
        super().__init__()
        self.seen, self.patch = [], pytest.MonkeyPatch()

    def __enter__(self):
        for name in ("tolist", "cpu", "numpy"):  # which no dispatcher sees on a CPU
            method = getattr(torch.Tensor, name)
            self.patch.setattr(torch.Tensor, name, lambda *x, of=method: self.seen.append(of.__name__) or of(*x))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, called = torch.ops.aten, func.overloadpacket
        chosen = args[1] if called in (aten.index, aten.index_put, aten.index_put_) else ()
        if called in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2) or any(
            x is not None and x.dtype == torch.bool for x in chosen
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", [
    lambda x: x[0].item(), lambda x: float(x[0]), lambda x: bool(x[0] > 0), lambda x: x.tolist(), lambda x: x.cpu(),
    lambda x: x.numpy(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique(),
])  # fmt: skip
def test_what_waits_is_seen(wait):
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.seen


interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; a GPU has its own test")


@interpreted
@pytest.mark.parametrize(("loss", "form"), [("kl", {}), ("lk", EAGLE31[2]), ("tv", EAGLE31[1])])
def test_a_whole_step_of_the_kernels_is_that_of_the_definition(loss, form):
    case = random_case(2, [9, 2, 7], learnt=lambda length: torch.arange(length) >= length // 2, **form)
    assert_equals_reference(case, 3, loss)


@interpreted
@pytest.mark.parametrize("loss", ["tv", "kl", "lk"])
@pytest.mark.parametrize("form", [{}, {"dpace_alpha": 0.5}, DFLASH])
def test_a_whole_step_of_blocks_is_that_of_the_definition(loss, form):
    assert_is_the_definition(random_blocks(3, [9, 2, 8], num_anchors=4, **form), loss)


@interpreted
def test_the_step_asks_for_no_number(monkeypatch):
    from draft_model.drafts.eagle3 import objective as step

    case = random_case(0, [9, 14], learnt=lambda length: torch.arange(length) >= length // 2)
    objective, states = case.on("cpu", 3)
    plan = step.plan_unroll(case.batch, 3)  # on the host, where it may ask
    monkeypatch.setattr(step, "plan_unroll", lambda *_: plan)
    gradients, muon = Gradients(objective.draft.parameters()), make_optimizer("muon", objective.draft, 1e-3, 0.9)
    with Waits() as waits:
        loss, sums = objective(case.batch, states)
        loss.backward()
        norm = gradients.norm(sums.supervised[0])
        gradients.update(muon, sums.supervised[0], norm, 0.5, norm.isfinite())
    assert waits.seen == []


@pytest.mark.parametrize("form", [{}, {"dpace_alpha": 0.5}, DFLASH])
def test_a_step_of_blocks_asks_for_no_number(form, monkeypatch):
    case = random_blocks(0, [9, 14], **form)
    objective = case.objective("lk", torch.bfloat16)
    states = [states.bfloat16() for states in case.states]
    blocks = place_blocks(case.batch, objective.draft.config.proposals, 4)  # on the host, where it may ask
    monkeypatch.setattr(objective_of_blocks, "place_blocks", lambda *_: blocks)
    gradients, muon = Gradients(objective.draft.parameters()), make_optimizer("muon", objective.draft, 1e-3, 0.9)
    with Waits() as waits:
        block_mask(blocks, objective.draft.config.block_size)
        with cast_once(objective.draft, torch.bfloat16):
            loss, sums = objective(case.batch, states)
            loss.backward()
        norm = gradients.norm(sums.supervised[0])
        gradients.update(muon, sums.supervised[0], norm, 0.5, norm.isfinite())
    assert waits.seen == []
