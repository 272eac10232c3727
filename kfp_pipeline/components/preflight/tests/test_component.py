"""The first step succeeds and shows what it found."""

from .. import preflight


def test_a_run_that_can_start_is_shown_in_a_table(call, world):
    done = call(preflight, **world.source, **world.data, num_epochs=3, training_backend="local")
    assert done.output == []
    shown = done.text("summary")
    assert shown.startswith("# All that the run names is there\n")
    assert "| num\\_epochs | 3 | 2 |\n" in shown
    assert "| log\\_steps | 50 |  |\n" in shown


def test_all_problems_are_handed_on_and_shown(call, world, tmp_path):
    missing = {"dataset_validation_split": str(tmp_path / "none.jsonl"), "compute_model_import": "nowhere"}
    done = call(preflight, **{**world.source, **world.data, **missing}, num_epochs=0, training_backend="local")
    assert [problem.partition(":")[0] for problem in done.output] == [
        "num_epochs", "dataset_validation_split", "compute_model_import",
    ]  # fmt: skip
    shown = done.text("summary")
    assert shown.startswith("# This run cannot start: 3 problems\n\n- num\\_epochs: given 0; allowed: ")
    assert shown.count("\n- ") == 3
