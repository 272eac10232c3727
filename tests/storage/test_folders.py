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
from draft_model.storage import join, local
from draft_model.storage.transfer import check_free_disk, in_parallel, local_errors, progress

from .conftest import FILES, content, make

WEIGHTS = "weights/model-1.bin"


def publish(folder, uri, **properties):
    return storage.publish(folder, str(uri), stage="dataset", properties=properties)


def test_what_is_published_can_be_fetched(place, source, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert publish(tmp_path / "nothing", place).files == ()
    assert storage.fetch(place, tmp_path / "into").is_dir()
    published = publish(source, place, b=3, a=["é"])
    assert content(storage.fetch(place, tmp_path / "into")) == FILES
    assert storage.read_manifest(place, stage="dataset") == published
    assert {file.path: file.size for file in published.files} == {name: len(data) for name, data in FILES.items()}
    assert published.properties == {"b": 3, "a": ["é"]}
    assert storage.exists(place)
    with pytest.raises(DraftModelError, match=r"output of the dataset stage; give .* the train stage"):
        storage.read_manifest(place, stage="train")
    publish(source, tmp_path / "other", a=["é"], b=3)  # the same bytes wherever and whenever it is written
    assert storage.read_bytes(join(place, "manifest.json")) == (tmp_path / "other/manifest.json").read_bytes()


def test_only_the_chosen_files_are_fetched_and_checked(place, source, tmp_path):
    publish(source, place)
    storage.write_bytes(join(place, "config.json"), b"damaged")
    folder = storage.fetch(place, tmp_path / "into", only=lambda name: name.startswith("weights/"))
    names = [name for name in FILES if name.startswith("weights/")]
    assert content(folder, names) == {name: FILES[name] for name in names}
    assert (folder / "config.json").exists() != storage.is_remote(place)


def test_half_a_folder_is_refused_and_the_stage_to_run_is_named(place, source, tmp_path):
    publish(source, place)
    for _ in range(2):
        storage.remove_manifest(place)
    assert not storage.exists(place)
    for read in (lambda: storage.read_manifest(place, stage="dataset"), lambda: storage.fetch(place, tmp_path / "into"),
                 lambda: storage.extend(place, {"a": source / "empty"})):  # fmt: skip
        with pytest.raises(DraftModelError, match=r"not whole; run the .*stage"):
            read()


@pytest.mark.parametrize("damage", [b"", b'{"format": 2}'])
def test_a_damaged_manifest_is_refused_and_replaced_by_a_new_publication(place, source, damage):
    storage.write_bytes(join(place, "manifest.json"), damage)
    with pytest.raises(DraftModelError, match="damaged"):
        storage.read_manifest(place)
    publish(source, place)
    assert storage.read_manifest(place).stage == "dataset"


@pytest.mark.parametrize(
    ("data", "complaint"), [(b"\1" * 3000, "has another checksum"), (b"short", "has 5 bytes"), (None, "")]
)
def test_a_file_that_was_changed_or_is_gone_is_found(place, source, tmp_path, data, complaint):
    publish(source, place)
    if data is None:
        storage.delete(join(place, WEIGHTS))
    else:
        storage.write_bytes(join(place, WEIGHTS), data)
    with pytest.raises(DraftModelError, match=f"{WEIGHTS}.* {complaint}"):
        storage.fetch(place, tmp_path / "into")
    assert not (tmp_path / "into" / WEIGHTS).exists()
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_second_publication_removes_what_the_first_one_listed(place, source):
    publish(source, place)
    storage.write_bytes(join(place, "not-ours"), b"stays")
    (source / WEIGHTS).unlink()
    publish(source, place)
    assert not storage.exists(join(place, WEIGHTS))
    assert storage.exists(join(place, "weights/ü n.txt"))
    assert storage.exists(join(place, "not-ours"))


@pytest.mark.parametrize("names", [("report.html",), ("report.html", "new/a")])
def test_extend_adds_and_replaces_and_if_killed_leaves_the_folder_whole(place, source, tmp_path, monkeypatch, names):
    publish(source, place, steps=1)
    new = make(tmp_path / "new", dict.fromkeys(names, b"first"))
    storage.extend(place, {"report.html": new / "report.html"})
    make(new, dict.fromkeys(names, b"second"))
    with monkeypatch.context() as killed:
        killed.setattr(type(storage._folder(place)), "put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            storage.extend(place, {name: new / name for name in names})
    assert content(storage.fetch(place, tmp_path / "into")) == FILES
    assert {file.path for file in storage.read_manifest(place).files} == set(FILES)
    extended = storage.extend(place, {name: new / name for name in names})
    assert extended == storage.read_manifest(place)
    assert extended.properties == {"steps": 1}
    assert content(storage.fetch(place, tmp_path / "into"), names) == dict.fromkeys(names, b"second")
    for name in ("../a", "/a", "manifest.json", "config.json/a"):
        with pytest.raises(DraftModelError):
            storage.extend(place, {name: source / "empty"})
    assert storage.read_manifest(place) == extended


def test_a_folder_grows_file_by_file_and_is_whole_at_the_end(place, source):
    publish(source, place)
    sources = {"config.json": "config.json", "shard": WEIGHTS}
    records = [storage.put_file(source / path, place, name) for name, path in sources.items()]
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
    assert storage.list_files(f"{place}/a/b") == {"b": before["a/b"]}
    storage.write_bytes(join(place, "a/b"), b"two")
    assert storage.list_files(place) != before


def test_a_range_of_an_object_is_read_alone_and_of_one_version(prefix):
    file = join(prefix, "a/b")
    storage.write_bytes(file, b"0123456789")
    version = storage.list_files(prefix)["a/b"][1]
    for offset, length, expected in ((0, 3, b"012"), (8, 5, b"89"), (0, 10, b"0123456789")):
        assert storage.read_range(file, offset, length, version) == expected
    storage.write_bytes(file, b"")
    for known in (version, ""):
        with pytest.raises(DraftModelError, match="changed while it was read"):
            storage.read_range(file, 0, 3, known)
    storage.delete(file)
    with pytest.raises(DraftModelError):
        storage.read_range(file, 0, 3)


def test_a_version_is_replaced_or_removed_only_while_it_is_the_newest(place):
    file = join(place, "deep/er/lease.json")
    assert storage.probe(place) == []
    assert not storage.exists(file)
    assert storage.read_versioned(file) is None
    with pytest.raises(DraftModelError, match="no such file"):
        storage.read_bytes(file)
    assert not storage.replace(file, b"x", "none")
    assert storage.create(file, b"one")
    assert not storage.create(file, b"two")
    _, one = storage.read_versioned(file)
    assert storage.replace(file, b"three", one)
    assert not storage.replace(file, b"four", one)
    assert not storage.delete(file, one)
    data, three = storage.read_versioned(file)
    assert data == b"three"
    assert storage.exists(file)
    assert not storage.exists(join(place, "deep"))
    assert storage.delete(file, three)
    assert not storage.delete(file, three)
    assert storage.delete(file)
    assert storage.list_files(place) == {}


@pytest.mark.parametrize("change", ["create", "replace"])
def test_of_many_writers_at_once_one_succeeds(place, change):
    file, begin = join(place, "file"), threading.Barrier(4)
    if change == "replace":
        storage.create(file, b"old")
        version = storage.read_versioned(file)[1]

    def write(number):
        data = f"of {number}".encode()
        begin.wait()
        return storage.create(file, data) if change == "create" else storage.replace(file, data, version)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(write, range(4)))
    assert made.count(True) == 1
    assert storage.read_file(file) == f"of {made.index(True)}".encode()


def test_the_lock_of_a_killed_process_expires(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "LOCK_SECONDS", 0.05)
    storage.create(str(tmp_path / "lease"), b"one")
    (tmp_path / "lease.lock.draft-model-partial").write_bytes(b"of a killed process")
    assert storage.replace(str(tmp_path / "lease"), b"two", storage.read_versioned(str(tmp_path / "lease"))[1])
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_a_holder_whose_lock_was_broken_writes_nothing(tmp_path, monkeypatch):
    file, lock = tmp_path / "lease", tmp_path / "lease.lock.draft-model-partial"
    storage.create(str(file), b"one")
    flush = local._flush

    def stopped(path):  # until another process has broken the lock
        if lock.exists():
            lock.write_bytes(b"of another process")
        flush(path)

    version = storage.read_versioned(str(file))[1]
    monkeypatch.setattr(local, "_flush", stopped)
    assert not storage.replace(str(file), b"two", version)
    assert file.read_bytes() == b"one"
    assert lock.read_bytes() == b"of another process"


def test_a_link_that_somebody_planted_leads_no_write_and_no_removal_out(source, tmp_path):
    victim = make(tmp_path / "victim", {"precious": b"kept", "manifest.json": b"kept"})
    shared = tmp_path / "shared"
    publish(source, shared)
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
        lambda: storage.put_file(source / "empty", str(shared), "link/precious"),
        lambda: storage.write_bytes(f"{shared}/link/precious", b""),
        lambda: storage.delete(f"{shared}/link/precious"),
        lambda: storage.remove_manifest(f"{shared}/link"),
        lambda: storage.remove(f"{shared}/link"),
        lambda: storage.read_manifest(f"{shared}/plain"),
        lambda: publish(source, shared),
    ):
        with pytest.raises(DraftModelError, match="symbolic link"):
            attempt()
    for name in ("file", "config.json"):  # a link that is written to is replaced
        (shared / name).unlink(missing_ok=True)
        (shared / name).symlink_to(victim / "precious")
    storage.write_bytes(f"{shared}/file", b"new")
    storage.put_file(source / "config.json", str(shared), "config.json")
    assert content(victim, ["precious", "manifest.json"]) == {"precious": b"kept", "manifest.json": b"kept"}


def test_a_manifest_is_a_plain_file_of_limited_size(source, tmp_path):
    publish(source, tmp_path / "a")
    for name, read in (("a/manifest.json", lambda: storage.read_manifest(str(tmp_path / "a"))),
                       ("lease.json", lambda: storage.read_file(str(tmp_path / "lease.json")))):  # fmt: skip
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(DraftModelError, match="larger than"):
            read()
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b/manifest.json")
    with pytest.raises(DraftModelError, match=r"has no manifest\.json"):
        storage.read_manifest(str(tmp_path / "b"))


def test_a_local_folder_is_fetched_and_published_in_place_and_every_damage_named_at_once(source, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()}
    publish(source, source)
    publish(source, source.as_uri())
    assert storage.fetch(str(source), tmp_path / "into") == source
    assert not (tmp_path / "into").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (source / "config.json").write_bytes(b"[]")
    (source / "empty").unlink()
    with pytest.raises(DraftModelError) as refused:
        storage.fetch(str(source), tmp_path)
    assert len(refused.value.problems) == 2


def test_a_local_publication_writes_only_what_is_missing_and_no_half_files(source, tmp_path):
    place = tmp_path / "place"
    publish(source, place)
    inodes = {name: (place / name).stat().st_ino for name in FILES}
    (place / WEIGHTS).write_bytes(b"\1" * 3000)
    make(source, {f"weights/.0123.draft-model-partial{end}": b"half" for end in ("", ".Ab12")})  # of a killed writer
    assert {file.path for file in publish(source, place).files} == set(FILES)
    assert content(storage.fetch(str(place), tmp_path)) == FILES
    assert {n for n in FILES if (place / n).stat().st_ino != inodes[n]} == {WEIGHTS}
    (place / "config.json").unlink()
    make(place / "config.json", {"in the way": b""})
    with pytest.raises(DraftModelError, match="a file is needed where there is a folder"):
        publish(source, place)
    assert not storage.exists(str(place))


def test_links_inside_are_followed_and_all_that_cannot_be_published_is_named(source, tmp_path):
    (source / "link").symlink_to(WEIGHTS)
    assert {file.path for file in publish(source, tmp_path / "place").files} == {*FILES, "link"}
    assert (tmp_path / "place/link").read_bytes() == FILES[WEIGHTS]
    assert not (tmp_path / "place/link").is_symlink()

    secret = make(tmp_path / "elsewhere", {"secret": b"s"})
    (source / "a").symlink_to(secret / "secret")
    (source / "b").symlink_to(secret, target_is_directory=True)
    (source / "c").symlink_to("nowhere")
    (source / "d\\e").write_bytes(b"")
    os.mkfifo(source / "f")
    with pytest.raises(DraftModelError) as refused:
        publish(source, tmp_path / "place2")
    assert len(refused.value.problems) == 5
    assert not (tmp_path / "place2").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/sys and /dev/full are Linux's")
def test_places_that_take_no_files_are_refused_in_words(source, tmp_path):
    for folder, place, sentence in (
        (source, source / "weights/out", "inside"),
        (tmp_path / "none", tmp_path / "place", "not a folder"),
        (source, "/sys/draft-model", r"/sys/draft-model: .*choose another folder"),
    ):
        with pytest.raises(DraftModelError, match=sentence):
            publish(folder, place)
    with pytest.raises(DraftModelError, match="/dev/full: the disk is full"), local_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")
    with pytest.raises(DraftModelError, match=r"1000000000\.000 GB are needed and .* are free"):
        check_free_disk(tmp_path / "new/folder", 10**18)


def test_foreign_local_things_are_used_in_place(source, tmp_path):
    assert storage.fetch_tree(str(source), tmp_path / "into") == source
    assert storage.fetch_file(f"file://{source}/config.json", tmp_path / "into") == source / "config.json"
    for fetch, uri in ((storage.fetch_tree, f"{source}/config.json"), (storage.fetch_file, f"{source}/none")):
        with pytest.raises(DraftModelError, match="give an existing one"):
            fetch(uri, tmp_path / "into")
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize("size", [10**6, 2 * 10**9])
def test_a_large_transfer_shows_its_speed_in_few_lines(size, capsys):
    in_parallel(lambda part: progress()(part), [size // 1000] * 1000, "to s3://bucket/run", size)
    shown = capsys.readouterr().err
    assert ("B/s" in shown and "to s3://bucket/run" in shown) == (size >= 10**9)
    assert len(shown.split("\r")) < 10


def test_the_first_failure_ends_the_work_that_is_under_way():
    def work(number):
        if number == 0:
            raise ValueError("first")
        assert progress().stop.wait(60)
        progress()(1)

    with pytest.raises(ValueError, match="first"):
        in_parallel(work, range(50))
