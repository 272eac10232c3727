"""What is particular to an object store: parts, resumed transfers, keys, endpoints, folders of strangers."""

import contextlib
import hashlib
import random
import socket
import ssl
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import google_crc32c
import pytest
from botocore.exceptions import HTTPClientError, SSLError

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.storage import join, manifest, s3, s3_small
from draft_model.storage.s3_small import SmallObjects

from .relay import Relay

LARGE = 20 * 2**20 + 5


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


def test_a_large_file_goes_and_comes_in_parts(prefix, relay, tmp_path, monkeypatch):
    data = random.Random(0).randbytes(20 * 2**20)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/large").write_bytes(data)
    monkeypatch.setattr(manifest, "RANGE", 8 * 2**20)
    storage.publish(tmp_path / "source", prefix, stage="train", properties={})
    head = s3.client().head_object(**raw(join(prefix, "large")))
    assert head["ETag"].strip('"').endswith("-3")
    assert head["ContentLength"] == len(data)
    folder = storage.fetch(prefix, tmp_path / "into")
    assert relay.keys("PUT").count("large") == relay.keys("GET").count("large") == 3
    assert (folder / "large").read_bytes() == data
    (record,) = storage.read_manifest(prefix).files
    assert record.crc32c == tuple(google_crc32c.value(data[at : at + 2**23]) for at in range(0, len(data), 2**23))
    assert record.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("size", [15, LARGE])
def test_a_second_transfer_moves_nothing(prefix, relay, source, tmp_path, count, size):
    (source / "b").write_bytes(random.Random(0).randbytes(size))
    names = ["a", "b", "c", *(f"more-{number}" for number in range(count - 3))]
    for name in names[3:]:
        (source / name).write_text(name)
    storage.publish(source, prefix, stage="dataset", properties={})
    assert set(relay.keys("PUT")) == {*names, "manifest.json"}
    relay.seen.clear()
    storage.publish(source, prefix, stage="dataset", properties={})
    assert relay.keys("PUT") == ["manifest.json"]
    relay.seen.clear()
    storage.fetch(prefix, tmp_path / "into")
    assert set(relay.keys("GET")) == {*names, "manifest.json"}
    relay.seen.clear()
    storage.fetch(prefix, tmp_path / "into")
    assert relay.keys("GET") == ["manifest.json"]
    (tmp_path / "into/a").write_text("CONTENT of a")
    relay.seen.clear()
    storage.fetch(prefix, tmp_path / "into")
    assert sorted(relay.keys("GET")) == ["a", "manifest.json"]
    assert (tmp_path / "into/a").read_text() == "content of a"


@pytest.mark.parametrize("size", [15, LARGE])
def test_an_object_that_was_changed_is_sent_again(prefix, source, tmp_path, size):
    data = random.Random(0).randbytes(size)
    (source / "a").write_bytes(data)
    storage.publish(source, prefix, stage="dataset", properties={})
    s3.client().put_object(**raw(join(prefix, "a")), Body=data[::-1])
    with pytest.raises(DraftModelError, match="a has another checksum than its manifest says; run the stage"):
        storage.fetch(prefix, tmp_path / "into")
    storage.publish(source, prefix, stage="dataset", properties={})
    assert (storage.fetch(prefix, tmp_path / "into") / "a").read_bytes() == data


def test_a_publication_that_broke_off_leaves_no_manifest_and_is_resumed(prefix, relay, source, monkeypatch):
    storage.publish(source, prefix, stage="dataset", properties={})
    for name in ("a", "sub/c"):
        (source / name).write_text(f"new content of {name}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    relay.cuts["PUT", "sub/c"] = 1
    with pytest.raises(DraftModelError, match=r"sub/c: .*cannot be reached"):
        storage.publish(source, prefix, stage="dataset", properties={})
    assert not storage.exists(prefix)
    relay.seen.clear()
    storage.publish(source, prefix, stage="dataset", properties={})
    assert "b" not in relay.keys("PUT")
    assert relay.keys("PUT")[-1] == "manifest.json"
    assert storage.read_bytes(join(prefix, "sub/c")) == b"new content of sub/c"


@pytest.mark.parametrize("size", [15_000, LARGE])
def test_a_connection_that_is_cut_in_the_middle_is_taken_up_again(prefix, relay, tmp_path, size):
    data = random.Random(0).randbytes(size)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/data").write_bytes(data)
    relay.cuts["PUT", "data"] = relay.cuts["GET", "data"] = 1
    storage.publish(tmp_path / "source", prefix, stage="train", properties={})
    assert (storage.fetch(prefix, tmp_path / "into") / "data").read_bytes() == data
    assert not relay.cuts.total()
    parts = -(-size // s3.PART_SIZE)
    assert relay.keys("PUT").count("data") == parts + 1
    assert relay.keys("GET").count("data") == 2
    if size > s3.PART_SIZE:
        assert relay.answered < 1.1 * size  # the half that had come is not brought again


def test_a_file_that_is_written_to_meanwhile_is_no_publication(prefix, source, monkeypatch):
    receive = s3.S3Folder.receive

    def grow(self, name, *rest):
        with (source / name).open("ab") as file:
            file.write(b"more")
        return receive(self, name, *rest)

    monkeypatch.setattr(s3.S3Folder, "receive", grow)
    with pytest.raises(DraftModelError, match="leave the file alone while it is published"):
        storage.publish(source, prefix, stage="train", properties={})
    assert not storage.exists(prefix)


def test_a_disk_that_fills_up_is_told_in_words(prefix, source, tmp_path, monkeypatch):
    storage.publish(source, prefix, stage="train", properties={})

    monkeypatch.setattr(s3, "landing", lambda _: contextlib.nullcontext(Path("/dev/full")))
    with pytest.raises(DraftModelError, match="the disk is full; free some space"):
        storage.fetch(prefix, tmp_path / "into")


@pytest.mark.parametrize("authority", ["TRUE", "FALSE"])  # the first is what rustls takes from no server
def test_a_store_behind_a_certificate_of_its_own(object_store, prefix, source, tmp_path, monkeypatch, authority):
    certificate, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-addext", f"basicConstraints=critical,CA:{authority}",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Relay(object_store.environment["AWS_ENDPOINT_URL"], context) as relay:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, relay.endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(SSLError):
            SmallObjects(object_store.bucket).get("a")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        storage.publish(source, prefix, stage="train", properties={})
        assert (storage.fetch(prefix, tmp_path / "into") / "a").read_text() == "content of a"


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def test_a_bucket_of_aws_has_its_own_host_and_the_proxy_is_asked_for_it(keys, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(20)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")

        def refuse():
            connection, _ = proxy.accept()
            with connection:
                return connection.recv(1000).split(b"\r\n")[0]

        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(refuse)
            with pytest.raises(HTTPClientError):
                SmallObjects("some-bucket").get("key")
    assert asked.result() == b"CONNECT some-bucket.s3.eu-central-1.amazonaws.com:443 HTTP/1.1"


def test_temporary_keys_are_asked_for_again(keys, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "one")
    before = datetime.now(UTC)
    found = s3_small._keys()
    assert found["token"] == "one"
    assert before < found["expires_at"] < before + timedelta(minutes=10)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    assert s3_small._keys()["expires_at"] is None


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


def test_a_strangers_folder_is_listed_and_downloaded_once(prefix, relay, tmp_path):
    names = ["config.json", *[f"shards/{number}" for number in range(8)]]
    for name in names:
        storage.write_bytes(join(prefix, "model", name), name.encode())
    place = raw(join(prefix, "model"))
    s3.client().put_object(Bucket=place["Bucket"], Key=place["Key"] + "/", Body=b"")
    storage.write_bytes(join(prefix, "model-2/other"), b"")
    into = tmp_path / "into"
    with pages_of(4):
        assert storage.fetch_tree(join(prefix, "model"), into) == into
        storage.fetch_tree(join(prefix, "model"), into)
    assert len(relay.keys("GET")) == len(names)
    assert sorted(path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file()) == names
    assert all((into / name).read_text() == name for name in names)


def test_a_strangers_file_is_downloaded_again_when_it_has_changed(prefix, relay, tmp_path):
    storage.write_bytes(join(prefix, "data.jsonl"), b"one")
    assert storage.fetch_file(join(prefix, "data.jsonl"), tmp_path) == tmp_path / "data.jsonl"
    storage.fetch_file(join(prefix, "data.jsonl"), tmp_path)
    assert len(relay.keys("GET")) == 1
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


def test_of_several_large_files_the_one_that_fails_is_named(prefix, relay, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    for number, name in enumerate(("bad", "good")):
        (tmp_path / "source" / name).write_bytes(random.Random(number).randbytes(LARGE))
    monkeypatch.setattr(manifest, "RANGE", 2**22)
    storage.publish(tmp_path / "source", prefix, stage="train", properties={})
    relay.cuts["GET", "bad"] = 1000
    with pytest.raises(DraftModelError, match=r"/bad: the object store at .* breaks off its answers"):
        storage.fetch(prefix, tmp_path / "into")
    assert {path.name for path in (tmp_path / "into").iterdir()} <= {"good"}
