"""The record says the same for the same folder, and cannot be made to say something dangerous."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    odd = make_manifest("train", files, {"shape": (1, 2), "by_step": {3: "a"}})  # what JSON makes of them
    assert odd.properties == {"shape": [1, 2], "by_step": {"3": "a"}}
    assert one.size == sum(map(len, names))


def record(**changes):
    file = {"path": "a/b.bin", "size": 3, "sha256": HASH} | changes.pop("file", {})
    return json.dumps({"format": 1, "stage": "train", "files": [file], "properties": {}} | changes).encode()


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
    for older in ({}, {"file": {"crc32c": [1]}}):
        assert from_bytes(record(**older)).files == (FileRecord("a/b.bin", 3, HASH),)
    with pytest.raises(UnreadableManifest):
        from_bytes(data)
