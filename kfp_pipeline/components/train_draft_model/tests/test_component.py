"""The training step: the draft and its numbers; what it was handed must be there before anything starts."""

import shutil

import pytest

from draft_model import storage

from .. import train_draft_model


def test_the_draft_is_at_the_artifacts_uri_with_its_numbers(world, trained):
    done = world.calls["train_draft_model"]
    assert trained == f"{done.artifacts['output_model_path'].uri}/final"
    assert storage.read_manifest(trained, stage="train").files
    assert done.metrics["steps"] == 2
    assert {"final_loss", "simulated_acceptance_length"} <= done.metrics.keys()


@pytest.mark.parametrize("gone", ["model", "dataset"])
@pytest.mark.parametrize("what", ["all of it", "a file"])
def test_what_was_handed_and_deleted_since_stops_it_before_a_job_starts(
    refusal, world, imported, dataset, gone, what, tmp_path
):
    handed = {"model": imported[2], "dataset": dataset}
    copy = shutil.copytree(handed[gone], tmp_path / "copy")
    if what == "all of it":
        shutil.rmtree(copy)
    else:
        next(path for path in sorted(copy.rglob("*")) if path.suffix in (".safetensors", ".parquet")).unlink()
    given = {f"{name}_uri": str(copy) if name == gone else uri for name, uri in handed.items()}
    (problem,) = refusal(train_draft_model, **given, **world.training, run_id="r")
    assert problem.startswith(str(copy))
    assert "without the cache (draft-model submit --no-cache)" in problem
    assert not (tmp_path / "train_draft_model/output_model_path").exists()
