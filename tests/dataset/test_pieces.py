"""Pieces: no line is lost between them, and after a kill the stage goes on from whole shards."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model import storage
from draft_model.dataset import DatasetConfig, Split, build, run
from draft_model.dataset.files import find
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters

from .test_build import files, some_rows, write


def compress(content, ending):
    if ending == ".gz":
        return gzip.compress(content)
    return bytes(pa.Codec("zstd").compress(content)) if ending == ".zst" else content


line = st.binary(max_size=30).map(lambda content: re.sub(rb"\n|\xef\xbb\xbf", b"", content))


@settings(max_examples=100)
@given(
    lines=st.lists(line | st.just(b"") | st.just(b"x" * 50), max_size=25),
    size=st.integers(1, 40),
    ending=st.sampled_from(["", ".gz", ".zst"]),
    end=st.sampled_from([b"", b"\n"]),
    bom=st.booleans(),
)
def test_every_line_is_in_one_piece_under_its_number(tmp_path_factory, lines, size, ending, end, bom):
    content = b"#" * bool(lines) + b"\n".join(lines) + end  # no file of another format by its first bytes
    path = tmp_path_factory.mktemp("data") / f"a.jsonl{ending}"
    path.write_bytes(compress(b"\xef\xbb\xbf" * bom + content, ending))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PIECE_BYTES", size)
        pieces = list(build._Source("train", 0, find(str(path))[0], "key").pieces())
    found = [(before + n, text) for _, before, piece in pieces for n, text in enumerate(io.BytesIO(piece), start=1)]
    assert found == list(enumerate(io.BytesIO(content), start=1))
    assert len({name for name, *_ in pieces}) == len(pieces)
    assert all(size <= len(piece) <= size + 52 for _, _, piece in pieces[:-1])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of three files, of which one is compressed, with faulty lines, of several pieces each."""
    monkeypatch.setattr(build, "PIECE_BYTES", 8_000)
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", [*some_rows(60), b"bad", *some_rows(20, seed=2), b"", b"worse"])
    write(folder / "b.jsonl.gz", [*some_rows(50, seed=3), {"messages": []}])
    write(folder / "c.jsonl", some_rows(5, seed=4))
    return folder


def config(tmp_path, models, data, out):
    parameters = Parameters(
        dataset_train_split=str(data), dataset_validation_split=str(data / "c.jsonl"), chat_template="qwen",
        build_dataset_num_proc=1, max_rejected_fraction=0.1,
    )  # fmt: skip
    return DatasetConfig(str(models["qwen2"]), str(tmp_path / out), parameters, tmp_path / f"work-{out}")


def test_lines_of_several_files_keep_their_names_and_numbers(tmp_path, models, data):
    result = run(config(tmp_path, models, data, "out"))
    assert (result.train.rows_kept, result.train.rows_rejected) == (135, 3)
    made = files(tmp_path / "out")
    assert sum(name.endswith(".parquet") for name in made) > 8
    rejected = [json.loads(line) for line in made["rejected.jsonl"].splitlines()]
    assert [(record["file"], record["line"]) for record in rejected] == [
        ("a.jsonl", 61), ("a.jsonl", 83), ("b.jsonl.gz", 51)
    ]  # fmt: skip
    split = Split(tmp_path / "out" / "train")
    assert [split.line(index) for index in (0, 60, 80, 134)] == [1, 62, 1, 5]
    named = {shard["name"]: shard["file"] for shard in json.loads(made["train/shards.json"])}
    assert set(named.values()) == {"a.jsonl", "b.jsonl.gz", "c.jsonl"}


PROGRAM = """
import sys, time
from pathlib import Path
from draft_model import storage, workers
from draft_model.dataset import DatasetConfig, build, run
from draft_model.parameters import Parameters
build.PIECE_BYTES = 8_000
workers._PRELOADED.clear()  # a data set needs no torch
own, done = storage.write_bytes, []
def slowly(uri, data):
    if len(done) == 5:
        print("busy", flush=True)
        time.sleep(1000)
    done.append(own(uri, data))
storage.write_bytes = slowly
if __name__ == "__main__":
    model, output, data, work = sys.argv[1:]
    parameters = Parameters(dataset_train_split=data, dataset_validation_split=data + "/c.jsonl", chat_template="qwen",
                            build_dataset_num_proc=1, max_rejected_fraction=0.1)
    run(DatasetConfig(model, output, parameters, Path(work)))
"""


def test_after_kill_9_it_goes_on_from_whole_shards(tmp_path, models, data):
    given = config(tmp_path, models, data, "killed")
    arguments = [given.model, given.output, str(data), str(given.work)]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, env=dict(os.environ)
    ) as it:
        assert it.stdout.readline() == b"busy\n"
        it.send_signal(signal.SIGKILL)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "train").iterdir()}
    assert 2 <= len(shards) <= 6
    assert not storage.exists(given.output)
    shutil.copytree(given.output, tmp_path / "holed")
    run(given)
    kept = {path: at for path, at in shards.items() if path.stat().st_mtime_ns == at}
    assert len(shards) - len(kept) <= 1, "those with counts were not written again"
    run(config(tmp_path, models, data, "one"))
    assert files(tmp_path / "one") == files(tmp_path / "killed")
    holed = config(tmp_path, models, data, "holed")
    min((tmp_path / "holed" / "train").iterdir()).unlink()
    with pytest.raises(DraftModelError, match="run the dataset stage again"):
        run(holed)
    run(holed)
    assert files(tmp_path / "one") == files(tmp_path / "holed")


def test_a_changed_file_is_built_anew_and_what_is_no_longer_used_is_removed(tmp_path, models, data):
    given = config(tmp_path, models, data, "out")
    first = run(given)
    before = set(files(tmp_path / "out"))
    time_of = (data / "c.jsonl").stat()
    content = (data / "c.jsonl").read_bytes()
    (data / "c.jsonl").write_bytes(content.replace(b"the", b"dog"))  # as long as it was
    os.utime(data / "c.jsonl", ns=(time_of.st_atime_ns, time_of.st_mtime_ns))
    second = run(given)
    assert not second.reused
    assert second.fingerprint != first.fingerprint
    after = set(files(tmp_path / "out"))
    assert len(after) == len(before)
    assert {name for name in before - after if "/part-" in name} == before - after != set()
    assert run(given).reused


def test_damaged_files_are_told_by_name(tmp_path, models, data):
    whole = gzip.compress(b'{"a": 1}\n' * 10_000)
    for name, content, said in (
        ("b.jsonl.gz", whole[:-9], "is damaged gzip data"),
        ("b.jsonl.gz", whole[:100] + bytes([whole[100] ^ 8]) + whole[101:], "is damaged gzip data"),
        ("z.jsonl.zst", compress(b'{"a": 1}\n' * 10_000, ".zst")[:-9], "cannot be read"),
    ):
        damaged = data / name
        damaged.write_bytes(content)
        with pytest.raises(DraftModelError, match=rf"dataset_train_split: .*{name}: {said}"):
            run(config(tmp_path, models, data, "out"))
        damaged.unlink()
