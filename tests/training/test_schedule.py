"""The learning rate against PyTorch's own schedulers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from draft_model.training.optimizer import learning_rate


def torch_rates(total, warmup, peak):
    """Linear from peak / warmup to peak, then half a cosine that would be 0 after the last step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    parts = []
    if warmup:
        iterations = max(1, warmup - 1)
        parts.append(LinearLR(optimizer, start_factor=1 / warmup, total_iters=iterations))
    parts.append(CosineAnnealingLR(optimizer, T_max=total - warmup))
    schedule = SequentialLR(optimizer, parts, milestones=[warmup] if warmup else [])
    for _ in range(total):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@given(st.integers(3, 80), st.floats(0, 0.9), st.sampled_from([1e-4, 3e-3]))
def test_rates_are_those_of_linear_warm_up_and_cosine(total, ratio, peak):
    rates = [learning_rate(step, total, peak, ratio) for step in range(total)]
    assert rates == pytest.approx(list(torch_rates(total, int(ratio * total), peak)), rel=1e-9, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, 10, 1e-3, 0.0) == 1e-3
    assert learning_rate(5, 10, 1e-3, 0.0) == pytest.approx(5e-4)


def test_warm_up_over_all_steps_never_comes_down():
    assert [learning_rate(step, 4, 1.0, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@given(st.integers(1, 50), st.floats(0, 1))
def test_no_step_is_wasted_at_rate_zero(total, ratio):
    rates = [learning_rate(step, total, 1.0, ratio) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] == pytest.approx(
        0.5 * (1 + math.cos(math.pi * (1 - 1 / (total - int(ratio * total))))) if int(ratio * total) < total else 1
    )
