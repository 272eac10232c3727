"""The plan of steps: fair, without loss, from the seed alone."""

from collections import Counter
from itertools import chain, islice, pairwise, takewhile

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from draft_model.ranks import Ranks
from draft_model.training.order import plan_steps, total_steps


def lengths_of(count):
    return np.random.default_rng(count).integers(5, 500, count)


def as_lists(steps):
    return [(step.epoch, step.last_of_epoch, step.conversations.tolist()) for step in steps]


sizes = st.integers(1, 60)
batches = st.integers(1, 24)  # larger than the data set too
seeds = st.integers(0, 2**31)


@given(sizes, batches, st.integers(1, 5), seeds)
def test_after_any_number_of_epochs_every_conversation_was_seen_equally_often(count, batch, epochs, seed):
    steps = list(islice(plan_steps(lengths_of(count), batch, seed), total_steps(count, batch, epochs)))
    assert all(len(step.conversations) == batch for step in steps)
    visits = Counter({index: 0 for index in range(count)})
    visits.update(index for step in steps for index in step.conversations.tolist())
    assert set(visits) == set(range(count))
    left_over = count * epochs - visits.total()
    assert 0 <= left_over < batch
    assert max(visits.values()) - min(visits.values()) <= 1
    assert max(visits.values()) <= epochs


@given(st.integers(1, 60), st.integers(1, 24), st.integers(1, 5), seeds)
def test_the_counts_that_are_announced_are_those_of_the_plan(count, batch, epochs, seed):
    planned = takewhile(lambda step: step.epoch < epochs, plan_steps(lengths_of(count), batch, seed))
    by_epoch = Counter(step.epoch for step in planned)
    totals = [sum(by_epoch[epoch] for epoch in range(end)) for end in range(1, epochs + 1)]
    assert totals == [total_steps(count, batch, end) for end in range(1, epochs + 1)]


@given(sizes, batches, seeds)
def test_an_epoch_ends_with_its_last_step_alone_and_a_step_has_its_longest_conversation_first(count, batch, seed):
    lengths = lengths_of(count)
    for step, following in pairwise(islice(plan_steps(lengths, batch, seed), 30)):
        assert step.last_of_epoch == (following.epoch > step.epoch)
        assert (np.diff(lengths[step.conversations]) <= 0).all()


@given(st.integers(20, 60), st.integers(1, 10), seeds)
def test_the_seed_alone_decides_the_order(count, batch, seed):
    plan = lambda seed: as_lists(islice(plan_steps(lengths_of(count), batch, seed), 20))  # noqa: E731
    assert plan(seed) == plan(seed)
    assert plan(seed) != plan(seed + 1)


def test_conversations_of_like_length_share_a_step():
    lengths = np.random.default_rng(0).permutation(np.repeat([10, 20, 40, 80], 16))
    steps = takewhile(lambda step: step.epoch == 0, plan_steps(lengths, 4, 0))
    assert all(len(set(lengths[step.conversations])) == 1 for step in steps)


def test_fewer_conversations_than_a_step_takes_fill_one_over_several_epochs():
    steps = list(islice(plan_steps(lengths_of(3), 8, 0), 3))
    assert [step.epoch for step in steps] == [2, 5, 7]
    assert Counter(int(i) for step in steps for i in step.conversations) == {0: 8, 1: 8, 2: 8}


WORLDS = {1: [1], 2: [1, 2], 4: [1, 2, 4], 6: [1, 2, 3]}  # processes, and how many may share a target


@st.composite
def stopped_runs(draw):
    """A data set, a batch, and stretches of a run: each so many steps on so many processes."""
    count = draw(st.integers(1, 70))
    batch = draw(st.sampled_from([12, 24]))
    total = total_steps(count, batch, draw(st.integers(1, 12)))
    stretches, left = [], total
    while left > 0:
        world = draw(st.sampled_from(sorted(WORLDS)))
        steps = draw(st.integers(1, left))
        stretches.append((world, draw(st.sampled_from(WORLDS[world])), steps))
        left -= steps
    return count, batch, total, stretches, draw(st.integers(0, 2**31))


@given(stopped_runs())
def test_a_run_in_stretches_on_any_processes_sees_what_a_whole_one_sees(run):
    count, batch, total, stretches, seed = run
    lengths = np.random.default_rng(seed).integers(5, 500, count)
    whole = [sorted(step.conversations.tolist()) for step in islice(plan_steps(lengths, batch, seed), total)]
    seen, done = [], 0
    for world, tp, steps in stretches:
        # Every process makes the plan anew, and goes on from the step that the checkpoint names.
        ranks = [Ranks(rank, world, torch.device("cpu"), tp) for rank in range(world)]
        plans = [islice(plan_steps(lengths, batch, seed), done, done + steps) for _ in ranks]
        for of_ranks in zip(*plans, strict=True):
            shares = [rank.share(step.conversations).tolist() for rank, step in zip(ranks, of_ranks, strict=True)]
            assert {len(share) for share in shares} == {batch // world}, "all processes have as much to do"
            seen.append(sorted(chain.from_iterable(shares)))
            for group in range(0, world, tp):  # those who share a target put in what they then train on
                together = sorted(chain.from_iterable(shares[group : group + tp]))
                assert sorted(ranks[group].group_share(of_ranks[group].conversations).tolist()) == together
        done += steps
    assert seen == whole
    visits = Counter(index for step in seen for index in step)
    assert max(visits.values(), default=0) - min((visits[index] for index in range(count)), default=0) <= 1
