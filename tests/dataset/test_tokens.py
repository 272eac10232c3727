"""Shards give back what was written, at random, however the rows arrived."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.dataset.encode import Encoded
from draft_model.dataset.tokens import INDEX, Shard, ShardWriter, Split, write_index


def write(folder, portions, rows_a_shard=None):
    """Writes rows of these lengths; the ids count on, so they tell where each token belongs."""
    token, line, shards, writer = 0, 1, [], None
    folder.mkdir()
    with ExitStack() as files:
        for lengths in portions:
            if writer is None or (rows_a_shard and writer.rows >= rows_a_shard):
                name, before = f"part-{len(shards)}.parquet", line - 1
                writer = files.enter_context(ShardWriter(folder / name))
                shards.append((name, writer, before))
            ids = np.arange(token, token + sum(lengths), dtype=np.int32)
            numbers = np.arange(line, line + len(lengths)) - before
            turns = np.ones(len(lengths), np.int64)
            writer.add(Encoded(ids, ids % 3 == 0, np.array(lengths, np.int64), numbers, turns))
            token, line = token + len(ids), line + len(lengths)
    write_index([Shard(name, writer.rows, "a.jsonl", before) for name, writer, before in shards if writer.rows],
                folder / INDEX)  # fmt: skip


@settings(max_examples=30)
@given(
    portions=st.lists(st.lists(st.integers(1, 5), max_size=200), min_size=1, max_size=5).filter(lambda p: any(p)),
    order=st.randoms(use_true_random=False),
)
def test_rows_come_back_in_any_order(tmp_path_factory, portions, order):
    folder = tmp_path_factory.mktemp("split")
    write(folder / "a", portions, 100)
    lengths = [length for portion in portions for length in portion]
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
        assert split.origin(index) == ("a.jsonl", index + 1)
    assert split[-1].input_ids.tolist() == split[len(split) - 1].input_ids.tolist()
    assert split.line(-1) == len(split)
    with pytest.raises(IndexError):
        split[len(split)]


def test_a_shard_depends_on_its_rows_and_not_on_their_portions(tmp_path):
    lengths = [1 + n % 7 for n in range(300)]
    write(tmp_path / "a", [lengths])
    write(tmp_path / "b", [lengths[:1], lengths[1:180], [], lengths[180:]])
    assert (tmp_path / "a" / "part-0.parquet").read_bytes() == (tmp_path / "b" / "part-0.parquet").read_bytes()


def test_shards_that_the_index_does_not_name_are_not_read_and_missing_ones_are_noticed(tmp_path):
    write(tmp_path / "split", [[1] * 100] * 2, 100)
    (tmp_path / "split" / "part-9.parquet").write_bytes(b"of an earlier build")
    assert len(Split(tmp_path / "split")) == 200
    (tmp_path / "split" / "part-1.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.parquet"):
        Split(tmp_path / "split")


def test_reading_holds_a_row_group_and_not_the_data_set(tmp_path):
    import pyarrow as pa

    write(tmp_path / "split", [[500] * 256] * 40, 2048)  # 20 MB of tokens in five shards
    split = Split(tmp_path / "split")
    before = held = pa.total_allocated_bytes()
    for index in [*range(len(split)), *range(0, len(split), 97)]:  # in order, and here and there
        assert split[index].loss_mask.shape == (500,)
        held = max(held, pa.total_allocated_bytes())
    assert 0 < held - before < 2 << 20


def test_the_datasets_library_reads_the_shards_that_the_index_names(tmp_path):
    from datasets import load_dataset

    write(tmp_path / "train", [[3, 1, 2], [2]], 3)
    (tmp_path / "train" / "part-9.parquet").write_bytes(b"of an earlier build")
    names = [shard["name"] for shard in json.loads((tmp_path / "train" / INDEX).read_text())]
    files = [str(tmp_path / "train" / name) for name in names]
    read = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert read["input_ids"][:] == [[0, 1, 2], [3], [4, 5], [6, 7]]
    assert read["loss_mask"][:] == [[True, False, False], [True], [False, False], [True, False]]
    streamed = load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert [row["length"] for row in streamed] == [3, 1, 2, 2]
