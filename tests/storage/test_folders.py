"""A folder is handed over whole or not at all, on a disk and in an object store alike."""

import json
import os
import sys
import uuid
from pathlib import Path

import pytest

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.storage import join
from draft_model.storage.transfer import check_free_disk, local_errors, progress, run_all

FILES = {"config.json": b"{}", "weights/model-1.bin": b"\0\1\2" * 1000, "weights/ü n.txt": b"x", "empty": b""}


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """The URI of a folder that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"s3://{request.getfixturevalue('object_store').bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "source", FILES)


def make(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def content(folder, names=FILES):
    return {name: (folder / name).read_bytes() for name in names}


def remove(uri):
    if storage.is_remote(uri):
        from draft_model.storage import s3

        bucket, _, key = uri.removeprefix("s3://").partition("/")
        s3.client().delete_object(Bucket=bucket, Key=key)
    else:
        Path(uri).unlink()


def test_what_is_published_can_be_fetched(place, source, tmp_path):
    published = storage.publish(source, place, stage="dataset", properties={"rows": 3, "names": ["é"]})
    assert content(storage.fetch(place, tmp_path / "into")) == FILES
    assert storage.read_manifest(place, stage="dataset") == published
    assert {file.path: file.size for file in published.files} == {name: len(data) for name, data in FILES.items()}
    assert published.properties == {"rows": 3, "names": ["é"]}
    assert storage.exists(place)


def test_the_manifest_has_the_same_bytes_wherever_and_whenever_it_is_written(place, source, tmp_path):
    storage.publish(source, place, stage="dataset", properties={"b": 1, "a": 2})
    storage.publish(source, str(tmp_path / "other"), stage="dataset", properties={"a": 2, "b": 1})
    assert storage.read_bytes(join(place, "manifest.json")) == (tmp_path / "other/manifest.json").read_bytes()


def test_only_the_chosen_files_are_fetched_and_checked(place, source, tmp_path):
    storage.publish(source, place, stage="dataset", properties={})
    storage.write_bytes(join(place, "config.json"), b"damaged")
    folder = storage.fetch(place, tmp_path / "into", only=lambda name: name.startswith("weights/"))
    names = [name for name in FILES if name.startswith("weights/")]
    assert content(folder, names) == {name: FILES[name] for name in names}
    if storage.is_remote(place):
        assert not (folder / "config.json").exists()


def test_half_a_folder_is_refused_and_the_stage_to_run_is_named(place, source, tmp_path):
    storage.publish(source, place, stage="dataset", properties={})
    storage.remove_manifest(place)
    storage.remove_manifest(place)
    assert not storage.exists(place)
    for read in (
        lambda: storage.read_manifest(place, stage="dataset"),
        lambda: storage.fetch(place, tmp_path / "into"),
    ):
        with pytest.raises(DraftModelError, match=r"not whole; run the .*stage"):
            read()


def test_another_stages_folder_is_refused(place, source):
    storage.publish(source, place, stage="dataset", properties={})
    with pytest.raises(DraftModelError, match=r"output of the dataset stage; give .* the train stage"):
        storage.read_manifest(place, stage="train")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 2}'])
def test_a_damaged_manifest_is_refused(place, source, damage):
    storage.publish(source, place, stage="dataset", properties={})
    storage.write_bytes(join(place, "manifest.json"), damage)
    with pytest.raises(DraftModelError, match="damaged"):
        storage.read_manifest(place)
    storage.publish(source, place, stage="dataset", properties={})  # and replaced by a new publication
    assert storage.read_manifest(place).stage == "dataset"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(b"\1" * 3000, "has another checksum"), (b"short", "has 5 bytes where its manifest says 3000")],
)
def test_a_file_that_was_changed_is_found(place, source, tmp_path, data, complaint):
    storage.publish(source, place, stage="dataset", properties={})
    storage.write_bytes(join(place, "weights/model-1.bin"), data)
    with pytest.raises(DraftModelError, match=f"weights/model-1.bin {complaint}"):
        storage.fetch(place, tmp_path / "into")
    assert not (tmp_path / "into/weights/model-1.bin").exists()


def test_a_file_that_is_gone_is_found_and_nothing_half_written_stays(place, source, tmp_path):
    storage.publish(source, place, stage="dataset", properties={})
    remove(join(place, "weights/model-1.bin"))
    with pytest.raises(DraftModelError, match=r"weights/model-1\.bin"):
        storage.fetch(place, tmp_path / "into")
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_manifest_that_points_outside_its_folder_is_refused(place, source, tmp_path):
    storage.publish(source, place, stage="dataset", properties={})
    manifest = json.loads(storage.read_bytes(join(place, "manifest.json")))
    manifest["files"][0]["path"] = "../../outside"
    storage.write_bytes(join(place, "manifest.json"), json.dumps(manifest).encode())
    with pytest.raises(DraftModelError, match="outside"):
        storage.fetch(place, tmp_path / "into")
    assert not list(tmp_path.rglob("outside"))


def test_a_second_publication_removes_what_the_first_one_listed(place, source, tmp_path):
    storage.publish(source, place, stage="dataset", properties={})
    storage.write_bytes(join(place, "not-ours"), b"stays")
    (source / "weights/model-1.bin").unlink()
    storage.publish(source, place, stage="dataset", properties={})
    assert not storage.exists(join(place, "weights/model-1.bin"))
    assert storage.exists(join(place, "weights/ü n.txt"))
    assert storage.exists(join(place, "not-ours"))


def test_extend_adds_and_replaces_files_and_properties(place, source, tmp_path):
    storage.publish(source, place, stage="train", properties={"steps": 1, "loss": 2.5})
    new = make(tmp_path / "new", {"c": b"checkpoint", "d": b"[]"})
    extended = storage.extend(place, {"checkpoints/2/c": new / "c", "config.json": new / "d"}, properties={"steps": 2})
    assert extended == storage.read_manifest(place, stage="train")
    assert extended.properties == {"steps": 2, "loss": 2.5}
    expected = FILES | {"checkpoints/2/c": b"checkpoint", "config.json": b"[]"}
    assert content(storage.fetch(place, tmp_path / "into"), expected) == expected
    assert {file.path for file in extended.files} == set(expected)


def test_extend_needs_a_whole_folder_and_safe_names(place, source):
    with pytest.raises(DraftModelError, match="not whole"):
        storage.extend(place, {"a": source / "empty"})
    storage.publish(source, place, stage="train", properties={})
    for name in ("../a", "/a", "manifest.json", "config.json/a"):
        with pytest.raises(DraftModelError):
            storage.extend(place, {name: source / "empty"})
    assert {file.path for file in storage.read_manifest(place).files} == set(FILES)


def test_small_files_by_themselves(place):
    file = join(place, "deep/er/state.json")
    assert not storage.exists(file)
    with pytest.raises(DraftModelError, match="no such file"):
        storage.read_bytes(file)
    storage.write_bytes(file, b"1")
    storage.write_bytes(file, b"2")
    assert storage.read_bytes(file) == b"2"
    assert storage.exists(file)
    assert not storage.exists(join(place, "deep"))


def test_an_empty_folder_can_be_handed_over(place, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert storage.publish(tmp_path / "nothing", place, stage="import", properties={}).files == ()
    assert storage.fetch(place, tmp_path / "into").is_dir()


def test_a_local_folder_is_fetched_in_place_and_published_in_place(source, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()}
    storage.publish(source, str(source), stage="dataset", properties={})
    storage.publish(source, source.as_uri(), stage="dataset", properties={})
    assert storage.fetch(str(source), tmp_path / "into") == source
    assert not (tmp_path / "into").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_local_publication_writes_only_what_is_missing(source, tmp_path):
    place = tmp_path / "place"
    storage.publish(source, str(place), stage="dataset", properties={})
    inodes = {name: (place / name).stat().st_ino for name in FILES}
    (place / "weights/model-1.bin").write_bytes(b"\1" * 3000)
    storage.publish(source, str(place), stage="dataset", properties={})
    assert content(storage.fetch(str(place), tmp_path)) == FILES
    assert {n for n in FILES if (place / n).stat().st_ino != inodes[n]} == {"weights/model-1.bin"}


def test_a_publication_that_fails_leaves_no_manifest(source, tmp_path):
    place = tmp_path / "place"
    storage.publish(source, str(place), stage="dataset", properties={})
    (place / "config.json").unlink()
    make(place / "config.json", {"in the way": b""})
    with pytest.raises(DraftModelError, match="a file is needed where there is a folder"):
        storage.publish(source, str(place), stage="dataset", properties={})
    assert not storage.exists(str(place))


def test_every_damaged_local_file_is_named_at_once(source, tmp_path):
    storage.publish(source, str(source), stage="dataset", properties={})
    (source / "config.json").write_bytes(b"[]")
    (source / "empty").unlink()
    with pytest.raises(DraftModelError) as refused:
        storage.fetch(str(source), tmp_path)
    assert len(refused.value.problems) == 2


def test_what_a_killed_writer_left_is_not_published(source, tmp_path):
    make(
        source,
        {"weights/.0123.draft-model-partial": b"half", "weights/.0123.draft-model-partial.Ab12": b"half"},
    )
    published = storage.publish(source, str(tmp_path / "place"), stage="dataset", properties={})
    assert {file.path for file in published.files} == set(FILES)


def test_a_place_inside_the_folder_itself_is_refused(source):
    with pytest.raises(DraftModelError, match="inside"):
        storage.publish(source, str(source / "weights/out"), stage="dataset", properties={})


def test_links_inside_are_followed_and_all_that_cannot_be_published_is_named(source, tmp_path):
    (source / "link").symlink_to("weights/model-1.bin")
    published = storage.publish(source, str(tmp_path / "place"), stage="dataset", properties={})
    assert {file.path for file in published.files} == {*FILES, "link"}
    assert (tmp_path / "place/link").read_bytes() == FILES["weights/model-1.bin"]
    assert not (tmp_path / "place/link").is_symlink()

    secret = make(tmp_path / "elsewhere", {"secret": b"s"})
    (source / "a").symlink_to(secret / "secret")
    (source / "b").symlink_to(secret, target_is_directory=True)
    (source / "c").symlink_to("nowhere")
    (source / "d\\e").write_bytes(b"")
    os.mkfifo(source / "f")
    with pytest.raises(DraftModelError) as refused:
        storage.publish(source, str(tmp_path / "place2"), stage="dataset", properties={})
    assert len(refused.value.problems) == 5
    assert not (tmp_path / "place2").exists()


def test_publishing_no_folder_is_refused(tmp_path):
    with pytest.raises(DraftModelError, match="not a folder"):
        storage.publish(tmp_path / "none", str(tmp_path / "place"), stage="dataset", properties={})


def test_foreign_local_things_are_used_in_place(source, tmp_path):
    assert storage.fetch_tree(str(source), tmp_path / "into") == source
    assert storage.fetch_file(f"file://{source}/config.json", tmp_path / "into") == source / "config.json"
    for fetch, uri in ((storage.fetch_tree, f"{source}/config.json"), (storage.fetch_file, f"{source}/none")):
        with pytest.raises(DraftModelError, match="give an existing one"):
            fetch(uri, tmp_path / "into")
    assert not (tmp_path / "into").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/sys and /dev/full are Linux's")
def test_a_place_that_takes_no_files_is_refused_in_words(source):
    with pytest.raises(DraftModelError, match=r"/sys/draft-model: .*choose another place"):
        storage.publish(source, "/sys/draft-model", stage="dataset", properties={})
    with pytest.raises(DraftModelError, match="/dev/full: the disk is full"), local_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_a_download_that_does_not_fit_is_refused_before_it_starts(tmp_path):
    with pytest.raises(DraftModelError, match=r"1000000000\.0 GB are needed and .* are free"):
        check_free_disk(tmp_path / "new/folder", 10**18)


@pytest.mark.parametrize("size", [10**6, 2 * 10**9])
def test_a_large_transfer_shows_its_speed_in_few_lines(size, capsys):
    with progress("to s3://bucket/run", size) as advance:
        for _ in range(1000):
            advance(size // 1000)
    shown = capsys.readouterr().err
    assert ("B/s" in shown and "to s3://bucket/run" in shown) == (size >= 10**9)
    assert len(shown.split("\r")) < 10


def test_the_first_failure_ends_the_work_that_is_under_way():
    import threading

    aborted = threading.Event()

    def work(number):
        if number == 0:
            raise ValueError("first")
        assert aborted.wait(60)

    with pytest.raises(ValueError, match="first"):
        run_all(work, range(50), abort=aborted.set)
