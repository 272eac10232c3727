"""Muon and the learning rate beside PyTorch's own, and checkpoints of Muon."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from draft_model.drafts import family
from draft_model.errors import DraftModelError
from draft_model.training.optimizer import RATIO, learning_rate, make_optimizer
from training.test_resume import interrupted_at


def make_draft():
    eagle3 = family("eagle3")
    shape = eagle3.default_shape(tiny.llama_config().to_dict())
    torch.manual_seed(0)
    return eagle3.create(shape, torch.ones(shape.vocab_size, dtype=torch.bool), torch.zeros(shape.draft_vocab_size))


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_draft_optimizer_muon_is_pytorchs_muon_for_the_layer_and_adamw_for_head_and_norms(momentum):
    ours, theirs = make_draft(), make_draft()
    named = dict(theirs.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() == 2 and name != "lm_head.weight"}
    assert matrices.keys() >= {"fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"}
    rest = [p for name, p in named.items() if name not in matrices]
    references = (
        torch.optim.Muon(
            [*matrices.values()], lr=RATIO * 1e-3, momentum=momentum, weight_decay=0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=1e-3, betas=(momentum, 0.999), weight_decay=0),
    )
    optimizer = make_optimizer("muon", ours, 1e-3, momentum)
    generator = torch.Generator().manual_seed(1)
    for scale, useful in ((4.0, True), (2.0, False), (8.0, True)):
        for name, parameter in ours.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient * scale if useful else torch.full_like(gradient, torch.nan)
            named[name].grad = gradient
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(not useful))
        optimizer.step()
        for reference in references if useful else ():
            reference.step()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-6, msg=name)


def test_muon_resumes_to_the_bit_and_not_with_the_other_optimizer(train):
    muon = {"draft_optimizer": "muon"}
    whole, output = train(**muon), interrupted_at(train, 5, **muon)
    with pytest.raises(DraftModelError, match=r"draft_optimizer: the training in .* used the other optimizer"):
        train(output, resume="true")
    resumed = train(output, resume="true", **muon)
    assert resumed.losses == whole.losses != train().losses
    assert resumed.read("final/model.safetensors") == whole.read("final/model.safetensors")


def torch_rates(total, warmup, peak, floor):
    """Linear from peak / warmup to peak, then half a cosine that would be at `floor` of peak after the last step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    parts = []
    if warmup:
        iterations = max(1, warmup - 1)
        parts.append(LinearLR(optimizer, start_factor=1 / warmup, total_iters=iterations))
    parts.append(CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=floor * peak))
    schedule = SequentialLR(optimizer, parts, milestones=[warmup] if warmup else [])
    for _ in range(total):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@given(st.integers(3, 80), st.floats(0, 0.9), st.sampled_from([1e-4, 3e-3]), st.sampled_from([0.0, 0.1, 1.0]))
def test_rates_are_those_of_linear_warm_up_and_cosine(total, ratio, peak, floor):
    rates = [learning_rate(step, total, peak, ratio, floor) for step in range(total)]
    assert rates == pytest.approx(list(torch_rates(total, int(ratio * total), peak, floor)), rel=1e-9, abs=1e-12)


def test_warm_up_over_all_steps_never_comes_down():
    assert [learning_rate(step, 4, 1.0, 1.0, 0.1) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
