"""Parameters of the training whose effect no other test shows by their name; see tests/test_effects.py."""

import json
import logging
from datetime import timedelta

import pytest

from draft_model.parameters.rules import problems_with
from draft_model.training import job
from training.case import QUICK


def rates(trained):
    return [record["learning_rate"] for record in trained.record["log"]]


def test_learning_rate_is_the_peak(train, plain):
    assert max(rates(plain)) == pytest.approx(QUICK["learning_rate"])
    higher = train(learning_rate=2 * QUICK["learning_rate"])
    assert rates(higher) == pytest.approx([2 * rate for rate in rates(plain)])
    assert higher.losses != plain.losses


def test_warmup_ratio_is_the_share_of_the_steps_before_the_peak(train, plain):
    # 13 steps: 0.2 of them are two, 0.5 six.
    for trained, steps in ((plain, 2), (train(warmup_ratio=0.5), 6)):
        assert rates(trained).index(max(rates(trained))) == steps - 1


def test_learning_rate_floor_is_the_share_that_is_left_at_the_end(train, plain):
    high, low = rates(train(learning_rate_floor=0.5)), rates(plain)
    peak = QUICK["learning_rate"]
    assert high[2:] == pytest.approx([0.5 * (peak + rate) for rate in low[2:]])


def test_ttt_length_is_the_number_of_unrolled_steps(train, plain):
    assert {len(losses) for losses in plain.losses.values()} == {QUICK["ttt_length"]}
    assert {len(losses) for losses in train(ttt_length=5, total_steps=1).losses.values()} == {5}


def test_draft_loss_is_what_is_minimised(train, plain):
    rejected, mixed = (train(draft_loss=loss, total_steps=1).record["log"][0] for loss in ("tv", "lk"))
    assert rejected["loss"] == pytest.approx([1 - alpha for alpha in rejected["alpha"]], rel=1e-5)
    assert rejected["alpha"] == mixed["alpha"] == plain.record["log"][0]["alpha"]
    found = zip(rejected["loss"], mixed["loss"], plain.losses[1], strict=True)
    assert all(tv < lk < kl for tv, lk, kl in found)


def test_draft_architecture_is_the_family_of_a_new_draft(train):
    trained = train(draft_architecture="eagle3.1", total_steps=1)
    assert b"fc_norm.2.weight" in trained.read("final/model.safetensors")
    assert json.loads(trained.read("final/config.json"))["norm_output"]


def test_draft_global_batch_size_is_the_conversations_of_a_step(train, plain):
    assert plain.result.steps == 13 * 4 // 4
    assert train(draft_global_batch_size=6).result.steps == 13 * 4 // 6


def test_draft_accumulation_steps_is_what_the_batches_come_to_or_refused(train, plain):
    assert train(draft_accumulation_steps=2).losses == plain.losses  # 4 = 2 forward passes x 2 conversations
    given = {"draft_global_batch_size": 4, "draft_micro_batch_size": 2, "draft_accumulation_steps": 3}
    (problem,) = problems_with(given, ["train"])
    assert problem.startswith("draft_accumulation_steps: given 3")


def test_dist_timeout_is_how_long_processes_wait_for_one_another(train, monkeypatch):
    begun, start = [], job.start_ranks
    monkeypatch.setattr(job, "start_ranks", lambda timeout, *given: begun.append(timeout) or start(timeout, *given))
    assert train(dist_timeout=33, total_steps=1).result.steps == 1
    assert begun == [timedelta(minutes=33)]


def test_attention_backend_says_how_the_draft_attends(train, plain, caplog):
    with caplog.at_level(logging.INFO):
        chosen = train(attention_backend="sdpa")
        assert "flex_attention" not in caplog.text
        train(attention_backend="flex_attention", total_steps=1)
    assert "flex_attention" in caplog.text  # runs as sdpa here, and says so
    assert chosen.losses == plain.losses
