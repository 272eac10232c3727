"""A folder is handed over whole or not at all, on a disk and in an object store alike."""

import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.storage import folders, join, local
from draft_model.storage.transfer import check_free_disk, in_parallel, local_errors

FILES = {"config.json": b"{}", "weights/model-1.bin": b"\0\1\2" * 1000, "weights/ü n.txt": b"x", "empty": b""}


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
    storage.delete(join(place, "weights/model-1.bin"))
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


@pytest.mark.parametrize("names", [("report.html",), ("report.html", "new")])
def test_extend_that_was_killed_leaves_the_folder_whole_without_the_files(place, source, tmp_path, monkeypatch, names):
    storage.publish(source, place, stage="train", properties={})
    new = make(tmp_path / "new", dict.fromkeys(names, b"first"))
    storage.extend(place, {"report.html": new / "report.html"})
    make(new, dict.fromkeys(names, b"second"))
    with monkeypatch.context() as killed:
        killed.setattr(type(folders.folder_of(place)), "put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            storage.extend(place, {name: new / name for name in names})
    assert content(storage.fetch(place, tmp_path / "into")) == FILES
    assert "report.html" not in {file.path for file in storage.read_manifest(place).files}
    storage.extend(place, {name: new / name for name in names})
    assert (storage.fetch(place, tmp_path / "into") / "report.html").read_bytes() == b"second"


def test_a_folder_grows_file_by_file_and_is_whole_at_the_end(place, source, tmp_path):
    storage.publish(source, place, stage="dataset", properties={})
    sources = {"config.json": "config.json", "shard": "weights/model-1.bin"}
    records = [storage.put_file(source / path, join(place, name)) for name, path in sources.items()]
    manifest = storage.write_manifest(place, "dataset", records, {"rows": 1})
    assert storage.read_manifest(place) == manifest
    assert storage.is_whole(place, manifest)
    assert set(storage.list_files(place)) == {*sources, "manifest.json"}
    storage.write_bytes(join(place, "config.json"), b"longer")
    assert not storage.is_whole(place, manifest)


def test_a_listing_has_sizes_and_stamps_that_change_with_the_content(place):
    storage.write_bytes(join(place, "a/b"), b"one")
    before = storage.list_files(place)
    assert {name: size for name, (size, _) in before.items()} == {"a/b": 3}
    assert (
        storage.list_files(place)
        == before
        == {f"a/{name}": at for name, at in storage.list_files(f"{place}/a/b").items()}
    )
    storage.write_bytes(join(place, "a/b"), b"two")
    assert storage.list_files(place) != before


def test_a_version_is_replaced_or_removed_only_while_it_is_the_newest(place):
    file = join(place, "lease.json")
    assert storage.read_versioned(file) is None
    assert not storage.replace(file, b"x", "none")
    assert storage.create(file, b"one")
    assert not storage.create(file, b"two")
    _, one = storage.read_versioned(file)
    assert storage.replace(file, b"three", one)
    assert not storage.replace(file, b"four", one)
    assert not storage.delete(file, one)
    data, three = storage.read_versioned(file)
    assert data == b"three"
    assert storage.delete(file, three)
    assert not storage.delete(file, three)
    assert storage.read_file(file) is None
    assert storage.delete(file)
    assert [name for name in storage.list_files(place) if "lock" in name] == []


@pytest.mark.parametrize("change", ["create", "replace"])
def test_of_many_writers_at_once_one_succeeds(place, change):
    file, begin = join(place, "file"), threading.Barrier(8)
    if change == "replace":
        storage.create(file, b"old")
        version = storage.read_versioned(file)[1]

    def write(number):
        data = f"of {number}".encode()
        begin.wait()
        return storage.create(file, data) if change == "create" else storage.replace(file, data, version)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(write, range(8)))
    assert made.count(True) == 1
    assert storage.read_file(file) == f"of {made.index(True)}".encode()


def test_the_lock_of_a_killed_process_expires(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "LOCK_SECONDS", 0.05)
    storage.create(str(tmp_path / "lease"), b"one")
    (tmp_path / "lease.lock.draft-model-partial").write_bytes(b"of a killed process")
    assert storage.replace(str(tmp_path / "lease"), b"two", storage.read_versioned(str(tmp_path / "lease"))[1])
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_a_holder_whose_lock_was_broken_writes_nothing(tmp_path, monkeypatch):
    file = tmp_path / "lease"
    storage.create(str(file), b"one")
    flush = local._flush

    def stopped(path):  # until another process has broken the lock and written
        if file.read_bytes() == b"one" and (lock := tmp_path / "lease.lock.draft-model-partial").exists():
            lock.write_bytes(b"of another process")
            file.write_bytes(b"of another process")
        flush(path)

    version = storage.read_versioned(str(file))[1]
    monkeypatch.setattr(local, "_flush", stopped)
    assert not storage.replace(str(file), b"two", version)
    assert file.read_bytes() == b"of another process"


@pytest.mark.parametrize("scheme", ["s3", "minio"])
def test_probe_finds_nothing_wrong_with_a_good_place_and_leaves_nothing(place, scheme):
    place = place.replace("s3://", f"{scheme}://")
    assert storage.probe(place) == []
    assert storage.list_files(place) == {}


def test_a_link_that_somebody_planted_leads_no_write_and_no_removal_out(source, tmp_path):
    victim = make(tmp_path / "victim", {"precious": b"kept", "manifest.json": b"kept"})
    shared = tmp_path / "shared"
    storage.publish(source, str(shared), stage="train", properties={})
    record = json.loads((shared / "manifest.json").read_bytes())
    record["files"].append({"path": "link/precious", "size": 4, "sha256": hashlib.sha256(b"kept").hexdigest()})
    (shared / "manifest.json").write_text(json.dumps(record))
    (shared / "link").symlink_to(victim)
    (shared / "plain").mkdir()
    (shared / "plain/manifest.json").symlink_to(victim / "manifest.json")
    (shared / "read").symlink_to(victim / "precious")
    assert storage.read_bytes(f"{shared}/read") == b"kept"  # as in the cache of the Hub
    for attempt in (
        lambda: storage.fetch(str(shared), tmp_path / "into"),
        lambda: storage.put_file(source / "empty", f"{shared}/link/precious"),
        lambda: storage.write_bytes(f"{shared}/link/precious", b""),
        lambda: storage.delete(f"{shared}/link/precious"),
        lambda: storage.remove_manifest(f"{shared}/link"),
        lambda: storage.remove(f"{shared}/link"),
        lambda: storage.read_manifest(f"{shared}/plain"),
        lambda: storage.publish(source, str(shared), stage="train", properties={}),
    ):
        with pytest.raises(DraftModelError, match="symbolic link"):
            attempt()
    (shared / "file").symlink_to(victim / "precious")
    storage.write_bytes(f"{shared}/file", b"new")  # replaces the link
    assert content(victim, ["precious", "manifest.json"]) == {"precious": b"kept", "manifest.json": b"kept"}


def test_a_manifest_is_a_plain_file_of_limited_size(source, tmp_path):
    storage.publish(source, str(tmp_path / "a"), stage="train", properties={})
    with (tmp_path / "a/manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DraftModelError, match="larger than"):
        storage.read_manifest(str(tmp_path / "a"))
    with (tmp_path / "lease.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DraftModelError, match="larger than"):
        storage.read_file(str(tmp_path / "lease.json"))
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b/manifest.json")
    with pytest.raises(DraftModelError, match=r"has no manifest\.json"):
        storage.read_manifest(str(tmp_path / "b"))


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


def test_a_range_of_a_file_is_read_alone_and_of_one_version(place):
    file = join(place, "a/b")
    storage.write_bytes(file, b"0123456789")
    version = storage.list_files(place)["a/b"][1]
    for offset, length, expected in ((0, 3, b"012"), (8, 5, b"89"), (10, 4, b""), (0, 10, b"0123456789")):
        assert storage.read_range(file, offset, length, version) == expected
    storage.write_bytes(file, b"")
    assert storage.read_range(file, 0, 8) == b""
    storage.write_bytes(file, b"other")
    if place.startswith("s3"):
        with pytest.raises(DraftModelError, match="changed while it was read"):
            storage.read_range(file, 0, 3, version)
    storage.delete(file)
    with pytest.raises(DraftModelError):
        storage.read_range(file, 0, 3)


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
    with pytest.raises(DraftModelError, match=r"/sys/draft-model: .*choose another folder"):
        storage.publish(source, "/sys/draft-model", stage="dataset", properties={})
    with pytest.raises(DraftModelError, match="/dev/full: the disk is full"), local_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_a_download_that_does_not_fit_is_refused_before_it_starts(tmp_path):
    with pytest.raises(DraftModelError, match=r"1000000000\.0 GB are needed and .* are free"):
        check_free_disk(tmp_path / "new/folder", 10**18)


@pytest.mark.parametrize("size", [10**6, 2 * 10**9])
def test_a_large_transfer_shows_its_speed_in_few_lines(size, capsys):
    in_parallel(lambda part, advance: advance(part), [size // 1000] * 1000, "to s3://bucket/run", size)
    shown = capsys.readouterr().err
    assert ("B/s" in shown and "to s3://bucket/run" in shown) == (size >= 10**9)
    assert len(shown.split("\r")) < 10


def test_the_first_failure_ends_the_work_that_is_under_way():
    def work(number, advance):
        if number == 0:
            raise ValueError("first")
        assert advance.stop.wait(60)
        advance(1)

    with pytest.raises(ValueError, match="first"):
        in_parallel(work, range(50))
