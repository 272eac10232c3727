"""Stopped in mid-epoch and resumed on another number of processes: no conversation repeated, none skipped."""

from collections import Counter
from itertools import chain, islice

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from draft_model.ranks import Ranks
from draft_model.training.order import plan_steps, total_steps

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


@given(st.integers(24, 200), st.sampled_from([4, 12]), st.data())
def test_the_rest_of_an_epoch_has_exactly_what_its_beginning_had_not(count, batch, data):
    steps = total_steps(count, batch, 1)
    stop = data.draw(st.integers(0, steps))
    plan = [step.conversations.tolist() for step in islice(plan_steps(np.arange(count), batch, 7), steps)]
    before, after = (set(chain.from_iterable(part)) for part in (plan[:stop], plan[stop:]))
    assert not before & after
    assert len(before) + len(after) == steps * batch  # those that fill no step open the next epoch
