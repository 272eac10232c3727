"""Shards give back what was written, at random, however the rows arrived."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.dataset import tokens
from draft_model.dataset.encode import Encoded
from draft_model.dataset.tokens import ShardWriter, Split


def write(folder, portions):
    """Writes rows of these lengths; the ids count on, so they tell where each token belongs."""
    token, line = 0, 1
    with ShardWriter(folder) as writer:
        for lengths in portions:
            ids = np.arange(token, token + sum(lengths), dtype=np.int32)
            numbers = np.arange(line, line + len(lengths))
            writer.add(Encoded(ids, ids % 3 == 0, np.array(lengths, np.int64), numbers))
            token, line = token + len(ids), line + len(lengths)


@settings(max_examples=30)
@given(
    portions=st.lists(st.lists(st.integers(1, 5), max_size=200), min_size=1, max_size=5).filter(lambda p: any(p)),
    order=st.randoms(use_true_random=False),
)
def test_rows_come_back_in_any_order(tmp_path_factory, portions, order):
    folder = tmp_path_factory.mktemp("split")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SHARD_ROWS", 128)
        write(folder / "a", portions)
        lengths = [length for portion in portions for length in portion]
        write(folder / "b", [lengths])
    split = Split(folder / "a")
    assert len(split) == len(lengths)
    assert split.lengths.tolist() == lengths
    first = np.cumsum([0, *lengths])
    for index in order.sample(range(len(lengths)), len(lengths)):
        row = split[index]
        assert row.input_ids.dtype == np.int32
        assert row.loss_mask.dtype == np.bool_
        assert row.input_ids.tolist() == list(range(first[index], first[index] + lengths[index]))
        assert row.loss_mask.tolist() == (row.input_ids % 3 == 0).tolist()
    assert split[-1].input_ids.tolist() == split[len(split) - 1].input_ids.tolist()
    with pytest.raises(IndexError):
        split[len(split)]
    files = {path.name: path.read_bytes() for path in (folder / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (folder / "b").iterdir()}
    assert len(files) == -(-len(lengths) // 128)


def test_later_shards_of_an_earlier_data_set_are_not_read_and_missing_ones_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_ROWS", 64)
    write(tmp_path / "old", [[1] * 200])
    write(tmp_path / "new", [[2] * 128])
    for path in (tmp_path / "new").iterdir():
        path.rename(tmp_path / "old" / path.name)
    split = Split(tmp_path / "old")
    assert split.lengths.tolist() == [2] * 128
    (tmp_path / "old" / "part-00001.parquet").unlink()
    (tmp_path / "old" / "part-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00001\.parquet"):
        Split(tmp_path / "old")


def test_the_datasets_library_reads_the_shards(tmp_path):
    from datasets import Dataset

    write(tmp_path / "train", [[3, 1, 2]])
    paths = [str(path) for path in (tmp_path / "train").iterdir()]
    read = Dataset.from_parquet(paths, cache_dir=str(tmp_path / "cache"))
    assert read["input_ids"][:] == [[0, 1, 2], [3], [4, 5]]
    assert read["loss_mask"][:] == [[True, False, False], [True], [False, False]]
    assert json.dumps(read["line"][:]) == "[1, 2, 3]"
