"""The whole training step on a GPU: the same numbers as the reference, and not one wait for the device."""

from __future__ import annotations

import pytest
import torch

from draft_model.training.gradients import Gradients

from .case import random_case, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 64, "intermediate_size": 96}


def reply(length):
    return torch.arange(length) >= length // 2


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("lengths", [[200], [40, 300, 2, 129], [65, 64]])
@pytest.mark.parametrize("learnt", [1.0, 0.3, reply], ids=["all", "some", "reply"])
def test_bfloat16_equals_the_reference(backend, lengths, learnt):
    if backend == "flex_attention" and len(lengths) == 2:
        pytest.skip("one more length says nothing new of it")
    case = random_case(len(lengths), lengths, learnt=learnt, vocab=300, draft_vocab=200, **HEADS)
    ours = case.ours(4, backend, torch.bfloat16, device="cuda")
    host = case.ours(4, "sdpa", torch.float32)
    for name in ("supervised", "candidates"):
        assert torch.allclose(getattr(ours.sums, name).cpu(), getattr(host.sums, name), atol=2)  # a favourite may tip
    assert float(ours.loss) == pytest.approx(float(host.loss), rel=2e-2)
    flat, truth = (torch.cat([g.flatten().double().cpu() for g in x.gradients.values()]) for x in (ours, host))
    assert relative_error(flat, truth) < 4e-2


@pytest.mark.parametrize("lengths", [[200], [40, 130, 2, 129]])
def test_float32_equals_the_host(lengths):
    case = random_case(1, lengths, learnt=reply, vocab=300, draft_vocab=200, **HEADS)
    ours, host = case.ours(4, "flex_attention", torch.float32, device="cuda"), case.ours(4, "sdpa", torch.float32)
    assert ours.sums.tensor().cpu().numpy() == pytest.approx(host.sums.tensor().numpy(), rel=1e-3)
    for name, gradient in host.gradients.items():
        assert relative_error(ours.gradients[name].cpu(), gradient) < 1e-3, name


def test_a_step_never_waits_for_the_gpu():
    case = random_case(3, [120, 90], learnt=reply, vocab=300, draft_vocab=200, **HEADS)
    case.ours(4, "sdpa", torch.bfloat16, device="cuda")  # compiles, allocates
    objective, states = case.on("cuda", 4, "sdpa", torch.bfloat16)
    draft = objective.draft
    gradients = Gradients(draft.parameters())
    optimizer = torch.optim.AdamW(draft.parameters(), fused=True)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients.clear()
            loss, sums = objective(case.batch, states)
            loss.backward()
            norm = gradients.norm(sums.supervised[0])
            gradients.update(optimizer, sums.supervised[0], norm, 0.5, norm.isfinite())
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_new_row_counts_compile_nothing():
    from draft_model.drafts import triton_kernels

    kernels = [value for value in vars(triton_kernels).values() if hasattr(value, "device_caches")]
    assert kernels

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def step(lengths):
        random_case(0, lengths, learnt=reply, vocab=300, draft_vocab=200, **HEADS).ours(
            3, "sdpa", torch.bfloat16, device="cuda"
        )

    for lengths in ([64, 50], [33], [129, 40]):
        step(lengths)
    before = compiled()
    for lengths in ([65, 51], [34], [96], [17, 18, 19], [200, 3]):
        step(lengths)
    assert compiled() == before
