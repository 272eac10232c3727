"""Files that stream from where they are to where they shall be: checked, resumed file by file, bounded in memory."""

import hashlib
import random
import subprocess
import sys
import uuid

import pytest

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.storage import s3, stream
from draft_model.storage.contents import BytesContent, JoinedContent, LocalContent, Piece

from .test_object_store import raw

LARGE = 20 * 2**20 + 5


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "place")
    return f"s3://{request.getfixturevalue('object_store').bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def source(object_store):
    """A folder of a stranger in the store: one large object, one small."""
    uri = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
    files = {"large": random.Random(0).randbytes(LARGE), "sub/small": b"small"}
    for name, data in files.items():
        s3.client().put_object(**raw(f"{uri}/{name}"), Body=data)
    return uri, files


def send(contents, place):
    return storage.publish_contents(contents, place, stage="import", properties={})


def test_an_object_goes_in_parts_and_no_file_is_written(source, place, tmp_path):
    uri, files = source
    manifest = send(storage.contents_of(uri), place)
    found = {record.path: record.sha256 for record in manifest.files}
    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    folder = storage.fetch(place, tmp_path / "back")
    assert {name: (folder / name).read_bytes() for name in files} == files
    if place.startswith("s3"):
        assert s3.client().head_object(**raw(f"{place}/large"))["ETag"].strip('"').endswith("-3")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["back"]


def test_memory_holds_a_few_parts_whatever_the_size(place):
    under_way, most = 0, 0

    class Endless:
        size, stamp, sha256, on_disk = 400 * 2**20, "x", "", 0

        def open(self):
            import contextlib

            @contextlib.contextmanager
            def reader():
                def read(offset, length):
                    nonlocal under_way, most
                    under_way += 1
                    most = max(most, under_way)
                    return bytes(length)

                yield read

            return reader()

    content = Endless()
    with content.open() as reader, stream.ThreadPoolExecutor(4) as pool:
        parts = stream.Parts(reader, content.size, 8 * 2**20, pool, stream.threading.Event(), lambda _: None)
        for _ in parts:
            under_way -= 1
    assert under_way == 0
    assert most <= 6


def test_large_objects_pass_through_little_memory(object_store):
    uri, size = f"s3://{object_store.bucket}/{uuid.uuid4().hex}", 192 * 2**20
    for name in ("a", "b"):
        s3.client().put_object(**raw(f"{uri}/{name}"), Body=bytes(size))
    program = f"""
import resource
from draft_model import storage
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
contents = storage.contents_of("{uri}")
before = peak()
storage.publish_contents(contents, "{uri}-copy", stage="import", properties={{}})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300e6
    assert [file.size for file in storage.read_manifest(f"{uri}-copy").files] == [size, size]


def test_a_transfer_that_was_cut_goes_on_with_the_next_file(source, place, relay, monkeypatch):
    uri, files = source
    s3.client().put_object(**raw(f"{uri}/more"), Body=files["large"][::-1])
    contents = storage.contents_of(uri)

    class Broken:
        size, stamp, sha256, on_disk = LARGE, "other", "", 0

        def open(self):
            raise DraftModelError("the source is gone")

    monkeypatch.setattr(stream, "LARGE_AT_ONCE", 1)  # so that the one file is there when the other fails
    with pytest.raises(DraftModelError, match="the source is gone"):
        send({"large": contents["large"], "more": Broken()}, place)
    assert not storage.exists(place)
    relay.seen.clear()
    send(contents, place)
    assert "large" not in relay.keys("GET")
    assert "more" in relay.keys("GET")
    assert storage.is_whole(place, storage.read_manifest(place))
    assert storage.read_manifest(place).size == sum(map(len, files.values())) + LARGE


def test_the_journal_names_what_has_arrived_and_is_gone_at_the_end(source, place, relay, monkeypatch):
    uri, _ = source
    contents = storage.contents_of(uri)
    with monkeypatch.context() as cut:
        cut.setattr(stream.manifest, "make_manifest", lambda *_: 1 / 0)  # cut just before the manifest
        with pytest.raises(ZeroDivisionError):
            send(contents, place)
    relay.seen.clear()
    send(contents, place)
    assert "large" not in relay.keys("GET")
    assert "small" in relay.keys("GET")
    with pytest.raises(DraftModelError):
        storage.read_bytes(f"{place}/{stream.JOURNAL}")


def test_a_source_that_changes_is_read_again_and_not_mixed(source, place, monkeypatch):
    uri, files = source
    old = storage.contents_of(uri)
    s3.client().put_object(**raw(f"{uri}/large"), Body=files["large"][::-1])
    with pytest.raises(DraftModelError, match="changed while it was read"):
        send(old, place)
    assert not storage.exists(place)
    manifest = send(storage.contents_of(uri), place)
    assert manifest.files[0].sha256 == hashlib.sha256(files["large"][::-1]).hexdigest()


def test_a_known_hash_that_does_not_fit_is_refused_and_a_fitting_one_saves_the_transfer(place, relay, tmp_path):
    data = random.Random(1).randbytes(LARGE)
    (tmp_path / "file").write_bytes(data)
    good = LocalContent(tmp_path / "file").hashed()
    with pytest.raises(DraftModelError, match=r"large: its SHA-256 is .* changed or damaged"):
        send({"large": LocalContent(tmp_path / "file", "0" * 64)}, place)
    assert not storage.exists(place)
    send({"large": good}, place)
    relay.seen.clear()
    send({"large": good}, place)
    assert "large" not in relay.keys("PUT")


def test_what_a_new_publication_leaves_out_is_removed(place):
    send({"a": BytesContent(b"1"), "b": BytesContent(b"2")}, place)
    send({"a": BytesContent(b"3")}, place)
    with pytest.raises(DraftModelError):
        storage.read_bytes(f"{place}/b")
    assert storage.is_whole(place, storage.read_manifest(place))
    storage.write_bytes(f"{place}/a", b"longer")
    assert not storage.is_whole(place, storage.read_manifest(place))


def test_a_failed_upload_leaves_no_parts_behind(object_store, relay, tmp_path, monkeypatch):
    uri = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
    (tmp_path / "file").write_bytes(bytes(LARGE))

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    relay.cuts["PUT", "large"] = 100
    with pytest.raises(DraftModelError, match="cannot be reached"):
        send({"large": LocalContent(tmp_path / "file")}, uri)
    assert "large" in relay.keys("DELETE")
    left = s3.client().list_multipart_uploads(Bucket=object_store.bucket).get("Uploads", [])
    assert not [upload for upload in left if upload["Key"] in uri]


def test_joined_pieces_read_as_one_file(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    whole = LocalContent(tmp_path / "file")
    joined = JoinedContent([Piece(BytesContent(b"<>"), 0, 2), Piece(whole, 3, 4), Piece(whole, 0, 1)])
    expected = b"<>34560"
    assert joined.size == len(expected)
    with joined.open() as reader:
        for offset in range(len(expected)):
            for length in range(len(expected) - offset + 1):
                assert reader(offset, length) == joined.read(offset, length) == expected[offset : offset + length]
