"""One pod's part of the data set."""

from draft_model import storage

from .. import encode_dataset


def test_it_shows_which_pieces_were_its(world, dataset):
    done = world.calls["encode_dataset"]  # the second part: the validation split
    assert done.output == dataset
    assert done.text("summary").splitlines() == [
        "| file | pieces |", "| --- | --- |", f"| {world.data['dataset_validation_split']} | 1 to 1 of 1 |",
    ]  # fmt: skip


def test_a_part_is_no_whole_data_set(call, world, imported, tmp_path):
    part = {"number": 0, "parts": 2, "model_uri": imported[0], "uri": str(tmp_path / "part")}
    assert call(encode_dataset, **world.data, part=part).output == part["uri"]
    assert not storage.exists(part["uri"])
