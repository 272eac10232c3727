"""The objective of block drafts against the definition in float64, and what it must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draft_model.drafts import kernels
from draft_model.drafts.dspark import blocks as attention
from draft_model.drafts.dspark import objective
from draft_model.drafts.dspark.blocks import place_blocks
from drafts.flex import assert_is_mask, dense_flex
from drafts.step import relative_error

from .case import DFLASH, HIDDEN, VOCABULARY, random_case

FORMS = {
    "dspark": {},
    "no confidence": {"enable_confidence_head": False},
    "fill-in": {"sample_from_anchor": False},
    "dflash": DFLASH,
    "dspark, D-PACE": {"dpace_alpha": 0.5},
    "dflash, D-PACE": {**DFLASH, "dpace_alpha": 0.3},
}


def assert_is_the_definition(case, kind, backend="sdpa"):
    loss, sums, gradients = case.ours(kind, backend)
    truth, told, expected = case.theirs(kind)
    assert float(loss) == pytest.approx(float(truth), rel=2e-6)
    torch.testing.assert_close(torch.stack((sums.loss, sums.agree, sums.overlap)), told, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 2e-5, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["tv", "kl", "lk"])
def test_loss_sums_and_gradients_are_those_of_the_definition(form, kind, monkeypatch):
    monkeypatch.setitem(objective.CHUNK_PAIRS, "cpu", 11)
    monkeypatch.setattr(objective, "CACHED_ROWS", 4)
    monkeypatch.setattr(attention, "SCORES", 700)  # several chunks a conversation
    assert_is_the_definition(random_case(3, [17, 2, 11, 9], num_anchors=6, **FORMS[form]), kind)


class _Rows(TorchDispatchMode):
    """Most rows of a matrix as wide as the vocabulary."""

    most = 0

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.most = max(self.most, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("anchors", [4, 40])
def test_logits_do_not_grow_with_the_anchors(anchors, monkeypatch):
    monkeypatch.setitem(objective.CHUNK_PAIRS, "cpu", 8)
    case = random_case(12, [60, 50], num_anchors=anchors)
    with _Rows() as rows:
        case.ours()
    assert rows.most == HIDDEN + case.draft.config.markov_rank  # head and w2, transposed


def test_flex_attention_computes_the_same_values():
    case = random_case(4, [17, 12, 9], num_anchors=6)
    with torch.no_grad():  # it has no backward on a CPU
        dense, flex = (case.ours(backend=backend)[0] for backend in ("sdpa", "flex_attention"))
    assert float(flex) == pytest.approx(float(dense), rel=1e-5)


def test_gradients_around_flex_attention_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(attention, "compiled_flex", lambda _on_gpu: dense_flex)
    assert_is_the_definition(random_case(4, [17, 2, 140, 9], num_anchors=6), "kl", "flex_attention")


@given(
    seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    limit=st.sampled_from([1, 7, None]), size=st.sampled_from([3, 4, 130]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_the_tiles_of_flex_attentions_mask_are_those_of_the_mask(seed, lengths, limit, size):
    case = random_case(seed, lengths, learnt=0.5)
    blocks = place_blocks(case.batch, 3, limit)
    mask, length = attention.block_mask(blocks, size), sum(lengths)
    begins = torch.cat([torch.full((n,), sum(lengths[:row])) for row, n in enumerate(lengths)])  # of each token's row
    truth = torch.zeros(mask.seq_lengths, dtype=torch.bool)
    for number, anchor in enumerate(blocks.anchors.tolist()):
        rows = slice(number * size, (number + 1) * size)
        truth[rows, begins[anchor] : anchor] = True
        truth[rows, length + rows.start : length + rows.stop] = True
    used, needed = assert_is_mask(mask, truth)
    if len(lengths) == 1:
        assert torch.equal(used, needed)


def test_flex_attention_is_not_compiled_again_for_other_row_counts(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(attention, "compiled_flex", lambda _on_gpu: kernels.compiled_flex(True, "eager"))

    def run(lengths):
        case = random_case(1, lengths, num_anchors=40)
        blocks, features = place_blocks(case.batch, 4, 40), torch.cat(case.states)[:, :-HIDDEN]
        objective = case.objective()
        objective.backend = "flex_attention"
        with torch.no_grad():
            objective._propose(blocks, features)

    run([160, 150])  # no size that is a number of heads, for equal sizes are taken to be one
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([160, 170, 90], [290, 240], [180, 141, 160, 150]):
            run(lengths)


def test_bfloat16_stays_near():
    case = random_case(5, [33, 20])
    loss, _, gradients = case.ours("kl", dtype=torch.bfloat16)  # of tv the gradient jumps where p and q cross
    truth, _, expected = case.theirs("kl")
    assert float(loss) == pytest.approx(float(truth), rel=0.02)
    assert max(relative_error(gradients[name], value) for name, value in expected.items()) < 0.1


@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_how_a_batch_is_split_changes_nothing(seed, lengths):
    case = random_case(seed, lengths, num_anchors=5)
    loss, sums, gradients = case.ours("kl")  # of tv the gradient jumps where p and q cross
    gradients = {name: torch.zeros(()) if g is None else g.clone() for name, g in gradients.items()}
    parts = [case.only([row]).ours("kl")[:2] for row in range(len(lengths))]
    assert float(loss) == pytest.approx(sum(float(part) for part, _ in parts), rel=1e-5, abs=1e-6)
    # All but rounds and kept, which are an estimate where a conversation has more anchors than it may.
    together = sum((part.tensor() for _, part in parts), torch.zeros_like(sums.tensor()))
    torch.testing.assert_close(sums.tensor()[:7], together[:7], rtol=1e-5, atol=1e-6)
    one_by_one = random_case(seed, lengths, num_anchors=5)
    one_by_one.draft.load_state_dict(case.draft.state_dict())
    added = {name: torch.zeros_like(weight) for name, weight in case.draft.named_parameters()}
    for row in range(len(lengths)):
        for name, gradient in one_by_one.only([row]).ours("kl")[2].items():
            added[name] += 0 if gradient is None else gradient
    for name, gradient in gradients.items():
        assert relative_error(gradient.expand_as(added[name]), added[name]) < 1e-5, name


@given(seed=st.integers(0, 1000), changed=st.integers(0, 35))
@settings(max_examples=20, deadline=None)
def test_a_feature_reaches_the_later_blocks_of_its_conversation_alone(seed, changed):
    case = random_case(seed, [20, 16])
    blocks = place_blocks(case.batch, case.draft.config.proposals, None)
    features = torch.cat(case.states)[:, :-HIDDEN]
    objective = case.objective()
    with torch.no_grad():
        before = objective._propose(blocks, features)
        features[changed] += 1.0
        after = objective._propose(blocks, features)
    for anchor, one, other in zip(blocks.anchors.tolist(), before, after, strict=True):
        behind = (anchor >= 20) == (changed >= 20) and changed < anchor
        assert torch.equal(one, other) != behind


def test_a_token_reaches_its_own_block_alone():
    case = random_case(11, [20, 16])
    blocks = place_blocks(case.batch, case.draft.config.proposals, None)
    features, objective = torch.cat(case.states)[:, :-HIDDEN], case.objective()
    tokens = blocks.tokens.clone()
    tokens[blocks.anchors[3]] += 1
    with torch.no_grad():
        before, after = (objective._propose(b, features) for b in (blocks, replace(blocks, tokens=tokens % 37)))
    assert [not torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [
        number == 3 for number in range(len(before))
    ]


def test_anchors_depend_on_the_conversations_key_alone():
    case = random_case(6, [200, 150, 120])
    blocks = place_blocks(case.batch, 4, 20)
    again = place_blocks(case.only([2, 0]).batch, 4, 20)
    assert blocks.anchors[blocks.anchors < 200].tolist() == (again.anchors[again.anchors >= 120] - 120).tolist()
    assert [end - first for first, end, _ in blocks.spans] == [20, 20, 20]
    other = place_blocks(replace(case.batch, keys=case.batch.keys + 3), 4, 20)
    assert other.anchors.tolist() != blocks.anchors.tolist()


def test_blocks_stand_in_replies_and_learn_up_to_their_ends():
    case = random_case(7, [30], learnt=0.7)
    mask = [False, *case.batch.predicted[0, :-1].tolist()]
    blocks = place_blocks(case.batch, 4, None)
    assert blocks.anchors.tolist() == [a for a in range(1, 29) if mask[a] and mask[a + 1]]
    for anchor, learnt in zip(blocks.anchors.tolist(), blocks.learnt.tolist(), strict=True):
        run = [anchor + 1 + j < 30 and mask[anchor + 1 + j] for j in range(4)]
        assert learnt == [all(run[: j + 1]) for j in range(4)]
    assert blocks.replies


def test_acceptance_length_is_that_of_walking_through_the_replies():
    case = random_case(8, [40, 25], learnt=0.9)
    # A teacher that often says what the draft does: chance alone would keep nothing.
    case = replace(case, head=case.head * (torch.arange(37) < 3).unsqueeze(1) * 3)
    with torch.no_grad():
        _, sums, _ = case.ours()
    config = case.draft.config
    rounds, kept = [0] * config.proposals, [0] * config.proposals
    blocks = place_blocks(case.batch, config.proposals, None)
    told = (told for _, told in case.by_reference("tv", blocks, case.exact_weights()))
    runs = [[*(agrees for _, agrees, _ in each), False].index(False) for each in told]
    for limit in range(1, config.proposals + 1):
        at = 0
        while at < len(blocks.anchors):
            end = int(blocks.replies.ends[at])
            while at < end:
                took = min(runs[at], limit)
                rounds[limit - 1] += 1
                kept[limit - 1] += took
                at += took + 1
            at = end
    assert sums.rounds.tolist() == rounds
    assert sums.kept.tolist() == kept


def test_a_batch_without_replies_learns_nothing():
    case = random_case(9, [8, 5], learnt=0.0)
    loss, sums, gradients = case.ours()
    assert float(loss) == 0.0
    assert not sums.tensor().any()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_the_same_and_never_waits(form):
    case = random_case(3, [150, 2, 65, 90], num_anchors=20, head_dim=16, **FORMS[form])
    objective, states = case.objective("kl", device="cuda"), [states.cuda() for states in case.states]
    draft = objective.draft
    for mode in ("default", "error"):  # the first time kernels are compiled
        draft.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, sums = objective(case.batch, states)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    truth, told, expected = case.theirs("kl")
    assert float(loss) == pytest.approx(float(truth), rel=1e-3)
    torch.testing.assert_close(torch.stack((sums.loss, sums.overlap)).cpu(), told[::2], rtol=1e-3, atol=1e-3)
    for name, weight in draft.named_parameters():
        assert relative_error(weight.grad.cpu(), expected[name]) < 5e-3, name
