"""What a plan and a report promise: in line with what was measured and published, and never absurd."""

from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from draft_model.cli import cli
from draft_model.training.plan import expected_acceptance_length

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("tokens", "own", "lengths"),
    [
        (41_500, True, [1.33, 1.48]),  # benchmarks/recipe.py, 160 conversations, AdamW and Muon
        (102_000, True, [1.60, 1.72]),  # 400 conversations, likewise
        (102_000 * 2, True, [1.66]),  # the demo of 391 conversations, two epochs
        (408_000, True, [1.82]),  # 1,564 conversations, one epoch
        (2_500_000, True, [1.89]),  # speculators #751 and the like: 5,000 conversations
        (2_500_000, False, [1.45, 1.49]),
        (250_000_000, True, [2.26, 2.56, 2.60]),  # vLLM's regression tests of published drafts
    ],
)
def test_the_range_holds_what_was_measured(tokens, own, lengths):
    low, high = expected_acceptance_length(tokens, 3, own)
    assert all(low <= length <= high for length in lengths)
    assert high - low < 0.7


@pytest.mark.parametrize("own", [True, False])
def test_more_tokens_and_more_proposals_promise_more_and_never_more_than_is_proposed(own):
    for proposals in (1, 3, 7):
        ranges = [expected_acceptance_length(10**power, proposals, own) for power in range(13)]
        assert all(1 <= low < high < proposals + 1 for low, high in ranges)
        assert all(before <= after for before, after in pairwise(ranges))
        assert ranges[6] < expected_acceptance_length(10**6, proposals + 1, own)


def test_the_plan_says_what_to_expect_and_what_to_change():
    command = ["plan", "--config", str(DOCS / "targets/llama-3.1-8b.json"), "--tokens", "500", "--supervised", "0.5"]
    few, many = (
        CliRunner().invoke(cli, [*command, "--conversations", count, *more]).output
        for count, more in (("2000", []), ("400000", ["--draft_optimizer", "muon", "--num_epochs", "1"]))
    )
    assert "after 1 M supervised tokens" in few
    assert "after 100 M" in many
    assert "draft_optimizer=muon" in few
    assert "draft_optimizer=muon" not in many
