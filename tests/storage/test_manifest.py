"""The record says the same for the same folder, and cannot be made to say something dangerous."""

import json
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.errors import DraftModelError
from draft_model.storage import FileRecord
from draft_model.storage.manifest import UnreadableManifest, from_bytes, make_manifest

HASH = "0123456789abcdef" * 4
NAMES = st.sets(st.sampled_from(["a", "b.c", "d/a", "d/b", "e/f/g", "é/ü", "z"]))
VALUES = st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.floats(-9, 9) | st.lists(st.text()))


@settings(max_examples=40)
@given(NAMES, VALUES, st.randoms())
def test_the_same_content_gives_the_same_bytes_and_reads_back(names, properties, random):
    files = [FileRecord(name, len(name), HASH) for name in sorted(names)]
    one = make_manifest("train", files, properties)
    assert [file.path for file in one.files] == sorted(names)
    random.shuffle(files)
    assert make_manifest("train", files, dict(reversed(properties.items()))).to_bytes() == one.to_bytes()
    assert from_bytes(one.to_bytes()) == one
    assert one.properties == properties
    assert one.size == sum(map(len, names))


def test_properties_are_what_json_makes_of_them():
    manifest = make_manifest("train", [], {"shape": (1, 2), "by_step": {3: "a"}})
    assert manifest.properties == {"shape": [1, 2], "by_step": {"3": "a"}}


def record(**changes):
    file = {"path": "a/b.bin", "size": 3, "sha256": HASH} | changes.pop("file", {})
    return json.dumps({"format": 1, "stage": "train", "files": [file], "properties": {}} | changes).encode()


def test_the_unchanged_record_is_fine():
    for older in ({}, {"file": {"crc32c": [1]}}):
        assert from_bytes(record(**older)).files == (FileRecord("a/b.bin", 3, HASH),)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", record()[:-2], record(format=2), record(stage=None), record(files=None),
        record(properties=[]), record(extra=1), record(file={"size": -1}), record(file={"size": "3"}),
        record(file={"sha256": HASH[1:]}), record(file={"sha256": HASH + "\n"}),
        record(files=[{"path": "a", "size": 1, "sha256": HASH}] * 2),
        record(files=[{"path": name, "size": 1, "sha256": HASH} for name in ("a", "a/b")]),
        *[record(file={"path": path}) for path in (
            "manifest.json", "manifest.json/a", "../a", "a/../../b", "/etc/passwd", "a//b", "a\\b", "C:a", "",
            "a\0", "./a", "a/.",
        )],
    ],
)  # fmt: skip
def test_a_damaged_or_dangerous_record_is_refused(data):
    with pytest.raises(UnreadableManifest):
        from_bytes(data)


@given(st.text(alphabet=st.sampled_from("ab./\\:\0"), max_size=10))
def test_every_name_that_is_read_is_below_its_folder(name):
    try:
        (file,) = from_bytes(record(file={"path": name})).files
    except UnreadableManifest:
        return
    assert not name.startswith("/")
    assert not set(PurePosixPath(file.path).parts) & {"..", "."}
    assert not set(file.path) & set("\\\0")


@pytest.mark.parametrize("name", ["manifest.json", "../a", "a\\b"])
def test_it_cannot_be_written_either(name):
    with pytest.raises(DraftModelError, match="cannot be published"):
        make_manifest("train", [FileRecord(name, 1, HASH)], {})
