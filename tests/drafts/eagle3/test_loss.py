"""Plan, unroll and heads together: loss, gradients and counts are the reference's, and nothing leaks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.drafts import kernels
from draft_model.drafts.counts import Counts
from drafts.step import relative_error

from .case import Case, random_case

COUNTS = ("supervised", "agree", "candidates", "reached", "accepted")


def assert_equals_reference(case: Case, steps: int, loss: str = "kl") -> Counts:
    ours = case.ours(steps, loss=loss)
    sums, gradients = case.theirs(steps, loss)
    for name in COUNTS:
        assert getattr(ours.sums, name).tolist() == getattr(sums, name), name
    assert float(ours.loss) == pytest.approx(float(sums.total.detach()), rel=1e-5)
    assert ours.sums.loss.tolist() == pytest.approx(sums.loss, rel=1e-5)
    assert ours.sums.overlap.tolist() == pytest.approx(sums.overlap, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients, 1e-5)
    return ours.sums


def assert_same_gradients(found, truth, tolerance: float) -> None:
    """Relative to each parameter's norm; where q - p cancels, the rounding of its terms, about 1, is left."""
    assert found.keys() == truth.keys()
    scale = max(1.0, *(float(gradient.norm()) for gradient in truth.values()))
    for name, gradient in truth.items():
        error = float((found[name].double() - gradient.double()).norm())
        assert error <= tolerance * float(gradient.norm()) + 0.5 * tolerance * scale, name


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    steps=st.integers(1, 7),
    draft_vocab=st.sampled_from([1, 2, 9, 30, 37]),
    learnt=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (4, 1)]),
    size=st.sampled_from([2, 4, 6, 10]),
    loss=st.sampled_from(["kl", "lk", "tv"]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_reference(seed, lengths, steps, draft_vocab, learnt, heads, size, loss):
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": size}
    case = random_case(seed, lengths, draft_vocab=draft_vocab, learnt=learnt, **shape)
    assert_equals_reference(case, steps, loss)


EAGLE31 = [
    {"fc_norm": True, "norm_output": True},
    {"norm_before_fc": True, "aux_layers": (1, 2, 3, 4, 5)},
    {"fc_norm": True, "norm_before_fc": True, "norm_output": True, "aux_layers": (2, 5)},
    {"norm_output": True, "aux_layers": (3,)},
]


@pytest.mark.parametrize("switches", EAGLE31)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_eagle31_equals_the_reference(steps, switches):
    case = random_case(steps, [17, 9, 3, 12], learnt=lambda n: torch.arange(n) >= n // 2, **switches)
    assert_equals_reference(case, steps)


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_reply_after_a_prompt(steps):
    case = random_case(steps, [17, 9, 12], learnt=lambda length: torch.arange(length) >= length // 2)
    sums = assert_equals_reference(case, steps)
    assert (sums.supervised > 0).all()
    # Chains that start in the prompt are taught but can reach nothing.
    assert sums.reached[0] == sums.candidates[0]
    assert (sums.reached <= sums.candidates).all()


def test_more_teachers_than_one_chunk_of_the_heads():
    case = random_case(1, [90, 70, 110], learnt=1.0, hidden_size=8, intermediate_size=8)
    assert_equals_reference(case, 7)


@pytest.mark.parametrize("loss", ["lk", "tv"])
def test_losses_that_count_the_rejection(loss):
    case = random_case(7, [19, 3, 12], learnt=lambda n: torch.arange(n) >= n // 2)
    assert_equals_reference(case, 4, loss)
    sums = case.ours(4, loss=loss).sums
    rejection = sums.supervised - sums.overlap
    assert torch.allclose(sums.loss, rejection) == (loss == "tv")
    bfloat16, (exact, gradients) = case.ours(4, loss=loss, dtype=torch.bfloat16), case.theirs(4, loss)
    assert float(bfloat16.loss) == pytest.approx(float(exact.total.detach()), rel=2e-2)
    flat, truth = (
        torch.cat([g.flatten().double() for g in given.values()]) for given in (bfloat16.gradients, gradients)
    )
    assert relative_error(flat, truth) < 0.1  # the gradient of min(p, q) jumps where they are equal


@pytest.mark.parametrize("draft_vocab", [1, 5, 16, 30, 37])
def test_draft_vocabularies_smaller_and_larger_than_what_is_learnt(draft_vocab):
    """16 tokens to learn of a target that knows 37."""
    case = random_case(3, [20, 3], draft_vocab=draft_vocab, learnt=lambda length: torch.arange(length) >= 4)
    sums = assert_equals_reference(case, 3)
    assert sums.candidates.tolist() == [16.0, 16.0, 16.0]
    if draft_vocab == 37:
        assert sums.supervised.tolist() == sums.candidates.tolist()
    else:
        assert sums.supervised[0] < 16


@pytest.mark.parametrize("lengths", [[1], [2], [3], [1, 1], [2, 1, 2], [3, 1], [3, 2, 3], [1, 12, 2, 3]])
def test_conversations_too_short_to_learn_from(lengths):
    sums = assert_equals_reference(random_case(0, lengths, learnt=1.0), 7)
    assert sums.candidates[0] == sum(max(length - 2, 0) for length in lengths)


@pytest.mark.parametrize("lengths", [[1], [2, 2], [3], [9, 5]])
def test_nothing_supervised_is_a_loss_of_zero(lengths):
    outcome = random_case(0, lengths, learnt=0.0).ours(4)
    assert outcome.loss == 0
    assert not any(gradient.any() for gradient in outcome.gradients.values())
    assert not outcome.sums.tensor().any()
    assert outcome.sums.means()["agreement"] == [0.0] * 4
    assert outcome.sums.acceptance_length(4) == 1.0


def with_one_top_token(token: int) -> Case:
    """A target that always says `token`, and a draft that only knows token 4."""
    case = random_case(0, [9, 6], draft_vocab=1, learnt=1.0)
    case.draft.d2t.fill_(4)
    head = torch.zeros_like(case.head)
    head[token] = 1.0
    return replace(case, states=[torch.ones_like(states) for states in case.states], head=head)


def test_a_draft_that_is_always_right_is_accepted_whole():
    sums = with_one_top_token(4).ours(3).sums
    assert sums.means()["agreement"] == sums.means()["conditional_acceptance"] == [1.0] * 3
    assert sums.means()["alpha"] == pytest.approx([1.0] * 3)
    assert sums.acceptance_length(1) == 2.0
    assert 3.0 < sums.acceptance_length(3) <= 4.0  # the last round of a reply has fewer tokens to keep


def test_a_target_outside_the_draft_vocabulary_is_a_miss_that_is_not_taught():
    outcome = with_one_top_token(5).ours(3)
    assert outcome.loss == 0
    assert outcome.sums.supervised.tolist() == [0.0] * 3
    assert outcome.sums.candidates.tolist() == [11.0, 9.0, 7.0]
    assert outcome.sums.means()["agreement"] == [0.0] * 3
    assert outcome.sums.acceptance_length(3) == 1.0


def learnable(masks: list[torch.Tensor], steps: int, shift: int) -> list[int]:
    """How many positions t have a token x[t+2+i] and a true mask at t+i+shift, for each step i."""
    counts = [0] * steps
    for mask in masks:
        for step in range(steps):
            for t in range(len(mask) - 2 - step):
                counts[step] += bool(mask[t + step + shift])
    return counts


@pytest.mark.parametrize(("shift", "behind"), [(2, 0), (0, 2)])
def test_the_convention_of_supervision_is_an_argument(shift, behind):
    """`collate` learns x[t+2+i] where the mask holds that very token; another takes the one at t+i."""
    masks = [torch.rand(length, generator=torch.Generator().manual_seed(length)) < 0.5 for length in (11, 16, 5)]
    case = random_case(0, [11, 16, 5], draft_vocab=37, learnt=lambda length: masks[[11, 16, 5].index(length)])
    predicted = torch.zeros_like(case.batch.predicted)
    predicted[:, behind:] = case.batch.predicted[:, : predicted.shape[1] - behind]
    if behind:
        predicted[:, 1] = torch.stack([mask[0] for mask in masks])  # which no default position learns
    case = replace(case, batch=replace(case.batch, predicted=predicted))
    sums = assert_equals_reference(case, 4)
    assert sums.candidates.tolist() == learnable(masks, 4, shift)


def test_the_gradient_of_one_conversations_features_does_not_depend_on_its_neighbours():
    def features_gradient(case: Case, rows: list[int]) -> torch.Tensor:
        states = case.states[rows[0]].clone().requires_grad_()
        kept = case.only(rows)
        replace(kept, states=[states, *kept.states[1:]]).ours(5)
        return states.grad

    case, other = random_case(8, [9, 14, 30]), random_case(8, [9, 14, 30], learnt=1.0)
    truth = features_gradient(case, [0])
    assert truth.any()
    for rows in ([0, 1], [0, 2], [0, 2, 1]):
        assert relative_error(features_gradient(case, rows), truth) < 1e-6
    batch = replace(
        case.batch,
        tokens=torch.cat([case.batch.tokens[:1], other.batch.tokens[1:].flip(1)]),
        predicted=torch.cat([case.batch.predicted[:1], other.batch.predicted[1:]]),
    )
    changed = replace(case, batch=batch, states=[case.states[0], *(-states for states in case.states[1:])])
    assert relative_error(features_gradient(changed, [0, 1, 2]), truth) < 1e-6


def test_padding_is_never_read():
    case = random_case(5, [9, 14, 4])
    plain = case.ours(6)
    tokens, predicted = case.batch.tokens.clone(), case.batch.predicted.clone()
    for row, length in enumerate(case.batch.lengths.tolist()):
        tokens[row, length:] = 31
        predicted[row, length - 1 :] = True
    junk = replace(case, batch=replace(case.batch, tokens=tokens, predicted=predicted)).ours(6)
    assert torch.equal(junk.loss, plain.loss)
    assert torch.equal(junk.sums.tensor(), plain.sums.tensor())
    assert all(torch.equal(junk.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_the_amount_of_padding_changes_nothing():
    case = random_case(5, [9, 14, 4])
    tokens, predicted = torch.full((3, 40), 31), torch.ones(3, 40, dtype=torch.bool)
    tokens[:, :14], predicted[:, :14] = case.batch.tokens, case.batch.predicted
    wide, plain = replace(case, batch=replace(case.batch, tokens=tokens, predicted=predicted)).ours(6), case.ours(6)
    assert torch.allclose(wide.sums.tensor(), plain.sums.tensor())
    assert_same_gradients(wide.gradients, plain.gradients, 1e-6)


@pytest.mark.parametrize("parts", [[1, 1, 1, 1, 1, 1], [2, 4], [3, 2, 1]])
def test_splitting_a_global_batch_changes_nothing(parts):
    case = random_case(6, [14, 3, 8, 21, 2, 10])
    whole = case.ours(5)
    pieces, start = [], 0
    for count in parts:
        batch, states = case.batch.narrow(start, count), case.states[start : start + count]
        pieces.append(replace(case, batch=batch, states=states).ours(5))
        start += count
    sums = sum((piece.sums for piece in pieces), Counts.zeros(5))
    assert float(sum(piece.loss for piece in pieces)) == pytest.approx(float(whole.loss), rel=1e-6)
    for name in COUNTS:
        assert getattr(sums, name).tolist() == getattr(whole.sums, name).tolist()
    count = sums.supervised[0]
    found = {name: sum(piece.gradients[name] for piece in pieces) / count for name in whole.gradients}
    assert_same_gradients(found, {name: g / count for name, g in whole.gradients.items()}, 1e-6)


def test_gate_and_up_computed_again_give_the_same_gradients(monkeypatch):
    case = random_case(4, [12, 9], learnt=1.0)
    kept = case.ours(4)
    products, addmm = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: products.append(y.shape) or addmm(x, y))
    case.ours(4)
    usual = len(products)
    monkeypatch.setattr(kernels, "memory_of", lambda _device: 0.0)
    again = case.ours(4)
    assert len(products) == 2 * usual + 4  # one for each step
    assert torch.equal(again.loss, kept.loss)
    assert all(torch.equal(again.gradients[name], gradient) for name, gradient in kept.gradients.items())


def test_bfloat16_is_close():
    case = random_case(4, [30, 24], learnt=1.0)
    ours = case.ours(7, dtype=torch.bfloat16)
    sums, gradients = case.theirs(7)
    assert float(ours.loss) == pytest.approx(float(sums.total.detach()), rel=1e-2)
    flat, truth = (torch.cat([g.flatten().double() for g in given.values()]) for given in (ours.gradients, gradients))
    assert relative_error(flat, truth) < 3e-2
    assert all(gradient.dtype == torch.float32 for gradient in ours.gradients.values())


def test_an_evaluation_gives_the_same_sums():
    case = random_case(4, [12, 9])
    with torch.no_grad():
        objective, states = case.on("cpu", 5)
        loss, sums = objective(case.batch, states)
    assert torch.equal(sums.tensor(), case.ours(5).sums.tensor())
    assert not loss.requires_grad


# 3 steps of 2,048 positions by 32,000 tokens: 786 MB of float32 logits, were they held.
STEPS, SHORT, LONG, VOCAB = 3, 512, 2048, 32_000


def print_peak_growth() -> None:
    """Prints by how many bytes the peak memory grows for a short step, and then for a long one."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    short, long = (random_case(0, [length + 2], vocab=VOCAB, draft_vocab=VOCAB, learnt=1.0) for length in (SHORT, LONG))
    short.draft.lm_head.weight.sum().backward()  # starts what autograd needs
    start = peak()
    short.ours(STEPS)
    between = peak()
    long.ours(STEPS)
    print(between - start, peak() - between)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_logits_of_all_positions_are_never_held():
    command = [sys.executable, "-c", f"from {__name__} import print_peak_growth; print_peak_growth()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, more = map(int, result.stdout.split())
    row = STEPS * VOCAB * 4
    assert first < LONG * row
    assert more < 0.3 * (LONG - SHORT) * row
