"""What is particular to an object store: parts, resumed transfers, keys, endpoints, folders of strangers."""

import contextlib
import random
import socket
import uuid

import pytest
from botocore.exceptions import ConnectionClosedError

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.storage import join, s3


@pytest.fixture
def prefix(object_store):
    return f"s3://{object_store.bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source/sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (tmp_path / "source" / name).write_text(f"content of {name}")
    return tmp_path / "source"


@contextlib.contextmanager
def requests(*operations, then=None):
    """Collects the keys of the requests that the client really sends; `then(key)` may break one."""
    keys, client = [], s3.client()

    def saw(params, **_):
        key = params["url_path"].partition("/")[2].partition("/")[2]
        keys.append(key)
        if then:
            then(key)

    for operation in operations:
        client.meta.events.register(f"before-call.s3.{operation}", saw)
    try:
        yield keys
    finally:
        for operation in operations:
            client.meta.events.unregister(f"before-call.s3.{operation}", saw)


@contextlib.contextmanager
def pages_of(size):
    """Has the store answer a listing in pages of so many objects, as it does by itself after 1,000."""
    events, name = s3.client().meta.events, "provide-client-params.s3.ListObjectsV2"

    def limit(params, **_):
        return params | {"MaxKeys": size}

    events.register(name, limit)
    try:
        yield
    finally:
        events.unregister(name, limit)


def raw(uri):
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def test_a_large_file_goes_and_comes_in_parts(prefix, tmp_path):
    data = random.Random(0).randbytes(20 * 2**20)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/large").write_bytes(data)
    storage.publish(tmp_path / "source", prefix, stage="train", properties={})
    head = s3.client().head_object(**raw(join(prefix, "large")))
    assert head["ETag"].strip('"').endswith("-3")
    assert head["ContentLength"] == len(data)
    with requests("GetObject") as got:
        folder = storage.fetch(prefix, tmp_path / "into")
    assert len([key for key in got if key.endswith("large")]) == 3
    assert (folder / "large").read_bytes() == data


def test_a_second_transfer_moves_nothing(prefix, source, tmp_path):
    with requests("PutObject") as put:
        storage.publish(source, prefix, stage="dataset", properties={})
        assert len(put) == 4
        storage.publish(source, prefix, stage="dataset", properties={})
    assert len(put) == 5
    assert put[-1].endswith("manifest.json")
    with requests("GetObject") as got:
        storage.fetch(prefix, tmp_path / "into")
        assert len(got) == 4
        storage.fetch(prefix, tmp_path / "into")
    assert len(got) == 5
    (tmp_path / "into/b").write_text("CONTENT of b")
    with requests("GetObject") as got:
        storage.fetch(prefix, tmp_path / "into")
    assert sorted(key.rpartition("/")[2] for key in got) == ["b", "manifest.json"]
    assert (tmp_path / "into/b").read_text() == "content of b"


def test_a_publication_that_broke_off_leaves_no_manifest_and_is_resumed(prefix, source):
    storage.publish(source, prefix, stage="dataset", properties={})
    for name in ("a", "sub/c"):
        (source / name).write_text(f"new content of {name}")

    def break_off(key):
        if key.endswith("sub/c"):
            raise ConnectionClosedError(endpoint_url="http://127.0.0.1")

    with (
        requests("PutObject", then=break_off),
        pytest.raises(DraftModelError, match=r"sub/c: .*cannot be reached"),
    ):
        storage.publish(source, prefix, stage="dataset", properties={})
    assert not storage.exists(prefix)
    with requests("PutObject") as put:
        storage.publish(source, prefix, stage="dataset", properties={})
    assert not [key for key in put if key.endswith("/b")]
    assert put[-1].endswith("manifest.json")
    assert storage.read_bytes(join(prefix, "sub/c")) == b"new content of sub/c"


def test_minio_is_another_name_for_s3(prefix, source, tmp_path):
    alias = prefix.replace("s3://", "minio://")
    storage.publish(source, alias, stage="dataset", properties={})
    assert storage.read_manifest(prefix) == storage.read_manifest(alias)
    assert (storage.fetch(alias, tmp_path / "into") / "sub/c").read_text() == "content of sub/c"
    assert storage.fetch_file(join(alias, "a"), tmp_path / "file").read_text() == "content of a"


def test_a_download_larger_than_the_disk_is_refused(prefix, source, tmp_path):
    storage.publish(source, prefix, stage="dataset", properties={})
    manifest = storage.read_bytes(join(prefix, "manifest.json"))
    size = str((source / "a").stat().st_size).encode()
    storage.write_bytes(join(prefix, "manifest.json"), manifest.replace(b'"size": ' + size, b'"size": 1' + b"0" * 18))
    with pytest.raises(DraftModelError, match="are needed and"):
        storage.fetch(prefix, tmp_path / "into")


def attempts(uri, source, into):
    return [
        lambda: storage.publish(source, uri, stage="dataset", properties={}),
        lambda: storage.fetch(uri, into),
        lambda: storage.fetch_tree(uri, into),
        lambda: storage.fetch_file(join(uri, "a"), into),
        lambda: storage.exists(uri),
        lambda: storage.remove_manifest(uri),
        lambda: storage.write_bytes(join(uri, "a"), b""),
        lambda: storage.read_bytes(join(uri, "a")),
        lambda: storage.extend(uri, {"a": source / "a"}),
    ]


def refusals(uri, source, into):
    for attempt in attempts(uri, source, into):
        with pytest.raises(DraftModelError) as refused:
            attempt()
        assert uri in str(refused.value)
        yield refused.value


def chain(error):
    return "" if error is None else f"{error!r} {chain(error.__cause__ or error.__context__)}"


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_keys_are_said_to_be_wrong_and_never_shown(prefix, source, tmp_path, monkeypatch, object_store, name):
    monkeypatch.setenv(name, "this-is-not-the-key")
    for error in refusals(prefix, source, tmp_path / "into"):
        assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error)
        assert object_store.environment["AWS_SECRET_ACCESS_KEY"] not in chain(error)
        assert "this-is-not-the-key" not in str(error)


def test_no_keys_are_asked_for(prefix, source, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for error in refusals(prefix, source, tmp_path / "into"):
        assert "no credentials" in str(error)


def test_a_missing_bucket_is_named(object_store, source, tmp_path):
    for error in refusals("s3://no-such-bucket/run", source, tmp_path / "into"):
        assert "no such bucket" in str(error)


def test_an_impossible_bucket_name_is_refused(object_store, source, tmp_path):
    for error in refusals("s3://Not a Bucket!/run", source, tmp_path / "into"):
        assert "correct the URI" in str(error)


def test_an_endpoint_where_nothing_answers_is_named_without_its_password(
    prefix, source, tmp_path, monkeypatch, object_store
):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, f"http://user:password@127.0.0.1:{port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        for error in refusals(prefix, source, tmp_path / "into"):
            assert f"http://127.0.0.1:{port} cannot be reached" in str(error)
            assert "password" not in str(error)


def test_an_endpoint_that_is_no_url_is_refused(prefix, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "minio.kubeflow:9000")
    with pytest.raises(DraftModelError, match="allowed: http://host:port"):
        storage.exists(prefix)


def test_a_strangers_folder_is_listed_and_downloaded_once(prefix, tmp_path):
    names = ["config.json", *[f"shards/{number}" for number in range(8)]]
    for name in names:
        storage.write_bytes(join(prefix, "model", name), name.encode())
    place = raw(join(prefix, "model"))
    s3.client().put_object(Bucket=place["Bucket"], Key=place["Key"] + "/", Body=b"")
    storage.write_bytes(join(prefix, "model-2/other"), b"")
    into = tmp_path / "into"
    with requests("GetObject") as got, pages_of(4):
        assert storage.fetch_tree(join(prefix, "model"), into) == into
        storage.fetch_tree(join(prefix, "model"), into)
    assert len(got) == len(names)
    assert sorted(path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file()) == names
    assert all((into / name).read_text() == name for name in names)


def test_a_strangers_file_is_downloaded_again_when_it_has_changed(prefix, tmp_path):
    storage.write_bytes(join(prefix, "data.jsonl"), b"one")
    with requests("GetObject") as got:
        assert storage.fetch_file(join(prefix, "data.jsonl"), tmp_path) == tmp_path / "data.jsonl"
        storage.fetch_file(join(prefix, "data.jsonl"), tmp_path)
        assert len(got) == 1
        storage.write_bytes(join(prefix, "data.jsonl"), b"three")
        assert storage.fetch_file(join(prefix, "data.jsonl"), tmp_path).read_bytes() == b"three"


def test_nothing_where_a_strangers_folder_or_file_should_be(prefix, tmp_path, object_store):
    with pytest.raises(DraftModelError, match="holds no objects"):
        storage.fetch_tree(prefix, tmp_path)
    with pytest.raises(DraftModelError, match="no such bucket or object"):
        storage.fetch_file(join(prefix, "a"), tmp_path)
    with pytest.raises(DraftModelError, match="which is a bucket"):
        storage.fetch_file(f"s3://{object_store.bucket}", tmp_path)


def test_a_strangers_key_that_leads_outside_is_refused(prefix, tmp_path):
    place = raw(prefix)
    s3.client().put_object(Bucket=place["Bucket"], Key=f"{place['Key']}/C:evil", Body=b"x")
    with pytest.raises(DraftModelError, match="rename the file"):
        storage.fetch_tree(prefix, tmp_path / "into")
    assert not (tmp_path / "into").exists()
