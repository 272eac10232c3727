"""The data set, whole, of what the pods have encoded."""

from draft_model import storage

from .. import build_dataset


def test_it_shows_a_report_and_counts(world, dataset):
    done = world.calls["build_dataset"]
    assert storage.read_manifest(dataset, stage="dataset").properties["chat_template"] == "qwen"
    assert done.artifacts["dataset"].uri == dataset
    assert done.metrics["train_rows_kept"] == 16
    assert done.metrics["validation_rows_kept"] == 4
    assert done.metrics["draft_vocab_size"] == 200
    assert done.text("report").lower().startswith("<!doctype html>")


def test_parts_that_were_deleted_since_are_encoded_again(call, world, imported, dataset, tmp_path):
    uri = str(tmp_path / "deleted")
    assert call(build_dataset, **world.data, model_uri=imported[0], parts=[], uris=[uri]).output == uri
    made, again = (storage.read_manifest(place, stage="dataset").files for place in (dataset, uri))
    assert again == made
