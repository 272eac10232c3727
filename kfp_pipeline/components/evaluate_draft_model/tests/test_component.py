"""The evaluation step: report, card and numbers."""

from .. import evaluate_draft_model


def test_it_shows_a_report_a_card_and_numbers(call, world, imported, dataset, trained):
    given = {"model_uri": imported[2], "dataset_uri": dataset, "draft_uri": trained}
    done = call(evaluate_draft_model, **given, evaluation_conversations=2, evaluation_max_new_tokens=8)
    assert done.metrics["acceptance_length"] >= 1
    assert {"untrained_acceptance_length", "compared_tokens", "acceptance_at_position_1"} <= done.metrics.keys()
    assert done.text("report").lower().startswith("<!doctype html>")
    assert "vllm serve" in done.text("card")


def test_what_was_deleted_since_is_named(refusal, imported, dataset, tmp_path):
    given = {"model_uri": imported[2], "dataset_uri": dataset, "draft_uri": str(tmp_path / "none")}
    (problem,) = refusal(evaluate_draft_model, **given)
    assert problem.startswith(f"{tmp_path / 'none'} has no manifest.json")
