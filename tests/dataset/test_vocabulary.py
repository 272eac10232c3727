"""The draft vocabulary holds the most frequent supervised tokens; offsets lead back to target ids."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draft_model.dataset.vocabulary import (
    choose,
    coverage,
    coverage_by_size,
)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.data())
def test_the_most_frequent_are_chosen_ties_and_filling_go_by_id(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    supervised = Counter({token: count for token, count in enumerate(counts) if count})
    ranked = sorted(supervised, key=lambda token: (-supervised[token], token))
    unseen = [token for token in range(len(counts)) if token not in supervised]
    expected = sorted((ranked + unseen)[:size])
    chosen = choose(np.array(counts), size)
    assert chosen.tolist() == expected
    share = sum(supervised[token] for token in expected) / max(1, sum(counts))
    assert coverage(np.array(counts), chosen) == pytest.approx(share, abs=1e-6)


def test_coverage_grows_with_size_to_all_of_it():
    train = np.random.default_rng(0).integers(0, 100, 5000)
    validation = np.roll(train, 7)
    curve = coverage_by_size(train, validation)
    assert [point["size"] for point in curve] == [1024, 2048, 4096, 5000]
    assert curve[-1] == {"size": 5000, "train": 1.0, "validation": 1.0}
    shares = [point["train"] for point in curve]
    assert shares == sorted(shares)
    assert coverage_by_size(train, None)[0]["validation"] is None
