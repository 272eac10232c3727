"""Shards give back what was written, at random."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.dataset.encode import Encoded
from draft_model.dataset.tokens import INDEX, Shard, Split, write_index, write_shard


def write(folder, shards):
    """Writes shards with rows of these lengths; the ids count on, so they tell where each token belongs."""
    token, before, index = 0, 0, []
    for number, lengths in enumerate(shards):
        ids = np.arange(token, token + sum(lengths), dtype=np.int32)
        numbers, turns = np.arange(1, len(lengths) + 1), np.ones(len(lengths), np.int64)
        name = f"part-{number}.parquet"
        write_shard(Encoded(ids, ids % 3 == 0, np.array(lengths, np.int64), numbers, turns), folder / name)
        index.append(Shard(name, len(lengths), "a.jsonl", before))
        token, before = token + len(ids), before + len(lengths)
    write_index(index, folder / INDEX)


@settings(max_examples=30)
@given(
    shards=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=200), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_rows_come_back_in_any_order(tmp_path_factory, shards, order):
    folder = tmp_path_factory.mktemp("split")
    write(folder / "a", shards)
    lengths = [length for shard in shards for length in shard]
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
        assert split.line(index) == index + 1
    assert split[-1].input_ids.tolist() == split[len(split) - 1].input_ids.tolist()
    assert split.line(-1) == len(split)
    with pytest.raises(IndexError):
        split[len(split)]


def test_shards_that_the_index_does_not_name_are_not_read_and_missing_ones_are_noticed(tmp_path):
    write(tmp_path / "split", [[1] * 100] * 2)
    (tmp_path / "split" / "part-9.parquet").write_bytes(b"of an earlier build")
    assert len(Split(tmp_path / "split")) == 200
    (tmp_path / "split" / "part-1.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.parquet"):
        Split(tmp_path / "split")


def test_reading_holds_a_row_group_and_not_the_data_set(tmp_path):
    import pyarrow as pa

    write(tmp_path / "split", [[500] * 2048] * 5)  # 20 MB of tokens in five shards
    split = Split(tmp_path / "split")
    before = held = pa.total_allocated_bytes()
    for index in [*range(len(split)), *range(0, len(split), 97)]:  # in order, and here and there
        assert split[index].loss_mask.shape == (500,)
        held = max(held, pa.total_allocated_bytes())
    assert 0 < held - before < 2 << 20


def test_the_datasets_library_reads_the_shards_that_the_index_names(tmp_path):
    from datasets import load_dataset

    write(tmp_path / "train", [[3, 1, 2], [2]])
    (tmp_path / "train" / "part-9.parquet").write_bytes(b"of an earlier build")
    names = [shard["name"] for shard in json.loads((tmp_path / "train" / INDEX).read_text())]
    files = [str(tmp_path / "train" / name) for name in names]
    read = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert read["input_ids"][:] == [[0, 1, 2], [3], [4, 5], [6, 7]]
    assert read["loss_mask"][:] == [[True, False, False], [True], [False, False], [True, False]]
    streamed = load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert [row["length"] for row in streamed] == [3, 1, 2, 2]
