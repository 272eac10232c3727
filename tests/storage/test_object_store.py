"""What is particular to an object store: parts, retries, conditional writes, keys, endpoints, folders of strangers."""

import contextlib
import hashlib
import logging
import os
import random
import ssl
import subprocess
import threading
import uuid
from pathlib import Path

import pytest

from draft_model import storage
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.storage import join, s3

from .relay import Relay

LARGE = 20 * 2**20 + 5
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


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
    events, name = s3.store().client.meta.events, "provide-client-params.s3.ListObjectsV2"

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


def put_raw(uri, data):
    s3.store().client.put_object(**raw(uri), Body=data)


def test_a_large_file_goes_and_comes_in_parts(prefix, relay, tmp_path):
    data = random.Random(0).randbytes(LARGE)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/large").write_bytes(data)
    storage.publish(tmp_path / "source", prefix, stage="train", properties={})
    assert s3.store().client.head_object(**raw(join(prefix, "large")))["ETag"].strip('"').endswith("-2")
    folder = storage.fetch(prefix, tmp_path / "into")
    assert relay.keys("PUT").count("large") == relay.keys("GET").count("large") == 2
    assert (folder / "large").read_bytes() == data
    (record,) = storage.read_manifest(prefix).files
    assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_a_second_transfer_moves_nothing(prefix, relay, source, tmp_path):
    (source / "b").write_bytes(random.Random(0).randbytes(LARGE))
    names = {"a", "b", "c"}
    storage.publish(source, prefix, stage="dataset", properties={})
    assert set(relay.keys("PUT")) == {*names, "manifest.json"}
    relay.seen.clear()
    storage.publish(source, prefix, stage="dataset", properties={})
    assert relay.keys("PUT") == ["manifest.json"]
    relay.seen.clear()
    storage.fetch(prefix, tmp_path / "into")
    assert set(relay.keys("GET")) == {*names, "manifest.json"}
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
    put_raw(join(prefix, "a"), data[::-1])
    with pytest.raises(DraftModelError, match="a has another checksum than its manifest says; run the stage"):
        storage.fetch(prefix, tmp_path / "into")
    assert not (tmp_path / "into/a").exists()
    storage.publish(source, prefix, stage="dataset", properties={})
    assert (storage.fetch(prefix, tmp_path / "into") / "a").read_bytes() == data


def test_a_publication_that_broke_off_leaves_no_manifest_and_is_resumed(prefix, relay, source, monkeypatch):
    storage.publish(source, prefix, stage="dataset", properties={})
    for name in ("a", "sub/c"):
        (source / name).write_text(f"new content of {name}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    relay.cuts["PUT", "sub/c"] = 1
    with pytest.raises(StoreUnavailable, match=r"sub/c: .*cannot be reached"):
        storage.publish(source, prefix, stage="dataset", properties={})
    assert not storage.exists(prefix)
    relay.seen.clear()
    storage.publish(source, prefix, stage="dataset", properties={})
    assert "b" not in relay.keys("PUT")
    assert relay.keys("PUT")[-1] == "manifest.json"
    assert storage.read_bytes(join(prefix, "sub/c")) == b"new content of sub/c"


@pytest.mark.parametrize("size", [15_000, LARGE])
def test_a_connection_that_is_cut_in_the_middle_is_repeated(prefix, relay, tmp_path, size):
    data = random.Random(0).randbytes(size)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/data").write_bytes(data)
    relay.cuts["PUT", "data"] = relay.cuts["GET", "data"] = 1
    storage.publish(tmp_path / "source", prefix, stage="train", properties={})
    assert (storage.fetch(prefix, tmp_path / "into") / "data").read_bytes() == data
    assert not relay.cuts.total()


def test_every_request_waits_for_a_store_that_is_away(prefix, relay, source, tmp_path, caplog):
    storage.publish(source, prefix, stage="train", properties={})
    for attempt in attempts(prefix, source, tmp_path / "into"):
        relay.away = 6  # more than boto3 itself tries
        attempt()
        assert relay.away == 0
    assert "cannot be reached" in caplog.text
    assert "next try in" in caplog.text


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")])
def test_a_store_that_throttles_is_asked_again(prefix, relay, source, tmp_path, status, code):
    left = [12]

    def refuse(_):
        left[0] -= 1
        return (status, code) if left[0] >= 0 else None

    relay.refuse = refuse
    storage.publish(source, prefix, stage="train", properties={})
    assert left[0] < 0


def test_patience_ends_and_a_first_answer_is_not_waited_for_as_long(prefix, relay, monkeypatch):
    monkeypatch.setattr(s3, "FIRST_ANSWER", 0.1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1 ")  # stripped; makes a client that has no answer yet
    relay.away = 10**6
    with pytest.raises(StoreUnavailable):
        storage.read_file(join(prefix, "a"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-2")
    for seconds in (600, 0):  # the first is cut by FIRST_ANSWER
        with storage.patience(seconds), pytest.raises(StoreUnavailable, match="cannot be reached"):
            storage.read_file(join(prefix, "a"))


def test_a_failure_ends_the_patience_of_the_others(prefix, relay, source, monkeypatch):
    waiting = threading.Event()

    def refuse(request):
        if request.command == "PUT" and request.path.endswith("/b"):
            waiting.set()
            return 503, "SlowDown"
        return (403, "AccessDenied") if request.command == "PUT" and waiting.wait(10) else None

    relay.refuse = refuse
    with pytest.raises(DraftModelError, match="access denied"):
        storage.publish(source, prefix, stage="train", properties={})


def test_a_lost_answer_to_a_conditional_write_is_no_refusal(prefix, relay):
    file = join(prefix, "lease")
    storage.exists(file)
    relay.lose = 1
    assert storage.create(file, b"one")
    relay.lose = 3  # more than boto3 itself tries
    assert storage.replace(file, b"two", storage.read_versioned(file)[1]) is True
    assert storage.read_file(file) == b"two"


def test_a_store_without_checksums_works_where_the_variables_say_so(prefix, relay, monkeypatch):
    def refuse(request):
        if any(
            name.lower().startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer"))
            for name in request.headers
        ):
            return 501, "NotImplemented"

    relay.refuse = refuse
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in storage.probe(prefix)[0]
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required\n")
    assert storage.probe(prefix) == []


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
@pytest.mark.parametrize("obeys", ["refuses", "ignores"])
def test_a_store_without_conditional_writes_is_found_by_probe(prefix, relay, header, obeys):
    def refuse(request):
        if request.command == "PUT" and request.headers.get(header):
            return (501, "NotImplemented") if obeys == "refuses" else (200, "")
        return None

    relay.refuse = refuse
    (problem,) = storage.probe(prefix)
    assert "conditional writes" in problem
    assert header.replace("-", "") in problem.replace("-", "")
    assert storage.probe(prefix, conditional=False) == []
    assert storage.list_files(prefix) == {}


def test_a_bucket_of_another_region_is_followed(prefix, relay):
    def refuse(request):
        if "/eu-west-3/" not in request.headers["Authorization"]:
            return 301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-3"}
        return None

    relay.refuse = refuse
    assert storage.create(join(prefix, "a"), b"there")  # the store behind takes any region
    assert storage.read_file(join(prefix, "a")) == b"there"
    relay.refuse = lambda request: (301, "PermanentRedirect")
    with pytest.raises(DraftModelError, match="redirects every request; correct http or https"):
        storage.read_file(join(prefix, "a"))


def test_a_file_that_is_written_to_meanwhile_is_no_publication(prefix, source, monkeypatch):
    upload = s3.S3Folder._request

    def grow(self, name, *rest):
        with (source / "a").open("ab") as file:
            file.write(b"more")
        return upload(self, name, *rest)

    monkeypatch.setattr(s3.S3Folder, "_request", grow)
    with pytest.raises(DraftModelError, match="changed while it was published; leave it alone"):
        storage.publish(source, prefix, stage="train", properties={})
    monkeypatch.undo()


def test_a_disk_that_fills_up_is_told_in_words(prefix, source, tmp_path, monkeypatch):
    storage.publish(source, prefix, stage="train", properties={})
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(s3, "partial_file", lambda _: contextlib.nullcontext(Path("/dev/full/x")))
    with pytest.raises(DraftModelError, match="a folder is needed where there is a file"):
        storage.fetch(prefix, tmp_path / "into")


def test_a_store_behind_a_certificate_of_its_own(object_store, prefix, source, tmp_path, monkeypatch):
    certificate, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Relay(object_store.environment["AWS_ENDPOINT_URL"], context) as relay:
        for name in ENDPOINTS:
            monkeypatch.setenv(name, relay.endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        with pytest.raises(DraftModelError, match=r"no trusted TLS connection .* set AWS_CA_BUNDLE"):
            storage.exists(prefix)
        monkeypatch.setenv("AWS_CA_BUNDLE", f"{certificate}\n")
        storage.publish(source, prefix, stage="train", properties={})
        assert (storage.fetch(prefix, tmp_path / "into") / "a").read_text() == "content of a"


def address_of(scheme, bucket):
    """The URL that a request for an object goes to."""
    client, urls = s3.store(scheme).client, []

    def stop(request, **_):
        urls.append(request.url)
        raise InterruptedError

    client.meta.events.register("before-send.s3", stop)
    with pytest.raises(InterruptedError):
        client.get_object(Bucket=bucket, Key="key")
    return urls[0]


def test_a_bucket_of_aws_has_its_own_host_and_minio_without_endpoint_means_kubeflow(object_store, monkeypatch):
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    assert address_of("s3", "some-bucket") == "https://some-bucket.s3.eu-central-1.amazonaws.com/key"
    assert address_of("minio", "mlpipeline") == "http://minio-service.kubeflow:9000/mlpipeline/key"


def test_minio_with_an_endpoint_is_another_name_for_s3(prefix, source, tmp_path):
    alias = prefix.replace("s3://", "minio://")
    storage.publish(source, alias, stage="dataset", properties={})
    assert storage.read_manifest(prefix) == storage.read_manifest(alias)
    assert (storage.fetch(alias, tmp_path / "into") / "sub/c").read_text() == "content of sub/c"
    assert storage.fetch_file(join(alias, "a"), tmp_path / "file").read_text() == "content of a"


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", *ENDPOINTS])
def test_values_that_end_with_a_line_break_are_stripped_and_blank_ones_unset(prefix, monkeypatch, name):
    monkeypatch.setenv(name, os.environ[name] + "\n")
    monkeypatch.setenv("AWS_PROFILE", " ")
    assert not storage.exists(prefix)


@pytest.mark.parametrize(
    ("endpoint", "advice"),
    [("minio-service.kubeflow:9000", "http://minio-service.kubeflow:9000"), ("http://host:port", "http://host:port")],
)
def test_an_endpoint_that_is_no_url_is_refused(prefix, monkeypatch, endpoint, advice):
    for name in ENDPOINTS:
        monkeypatch.setenv(name, endpoint)
    with pytest.raises(
        DraftModelError, match=rf"AWS_ENDPOINT_URL: given '{endpoint}'.* allowed: http://host:port.*"
    ) as no:
        storage.exists(prefix)
    assert advice in str(no.value)


def test_a_role_that_sts_refuses_and_a_missing_token_are_named(prefix, relay, tmp_path, monkeypatch):
    relay.refuse = lambda request: (403, "AccessDenied")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/kf")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", relay.endpoint)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(DraftModelError, match=r"AWS_WEB_IDENTITY_TOKEN_FILE: given '.*/token', which cannot be read"):
        storage.exists(prefix)
    (tmp_path / "token").write_text("invented")
    with pytest.raises(DraftModelError, match=r"AWS_ROLE_ARN: STS does not give .*role/kf \(AccessDenied: invented\)"):
        storage.exists(prefix)


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
        lambda: storage.list_files(uri),
        lambda: storage.write_bytes(join(uri, "a"), b""),
        lambda: storage.read_bytes(join(uri, "a")),
        lambda: storage.create(join(uri, "a"), b""),
        lambda: storage.extend(uri, {"a": source / "a"}),
        lambda: storage.copy(uri, uri, ["a"]),
        lambda: storage.remove_manifest(uri),
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
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for error in refusals(prefix, source, tmp_path / "into"):
        assert "no credentials" in str(error)


@pytest.mark.parametrize(
    ("uri", "sentence"), [("s3://no-such-bucket/run", "no such bucket"), ("s3://Not a Bucket!/run", "correct the URI")]
)
def test_a_missing_bucket_and_an_impossible_one_are_named(object_store, source, tmp_path, uri, sentence):
    for error in refusals(uri, source, tmp_path / "into"):
        assert sentence in str(error)


def test_a_store_that_cannot_be_reached_is_named_without_its_password(prefix, source, tmp_path, relay, monkeypatch):
    relay.away = 10**6
    for name in ENDPOINTS:
        monkeypatch.setenv(name, relay.endpoint.replace("//", "//user:password@"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for error in refusals(prefix, source, tmp_path / "into"):
        assert isinstance(error, StoreUnavailable)
        assert f"{relay.endpoint} cannot be reached" in str(error)
        assert "password" not in str(error)


def test_a_strangers_folder_is_listed_and_downloaded_once(prefix, relay, tmp_path):
    names = ["config.json", *[f"shards/{number}" for number in range(8)]]
    for name in names:
        put_raw(join(prefix, "model", name), name.encode())
    place = raw(join(prefix, "model"))
    s3.store().client.put_object(Bucket=place["Bucket"], Key=place["Key"] + "/", Body=b"")
    put_raw(join(prefix, "model-2/other"), b"")
    into = tmp_path / "into"
    with pages_of(4):
        assert storage.fetch_tree(join(prefix, "model"), into) == into
        storage.fetch_tree(join(prefix, "model"), into)
    assert len(relay.keys("GET")) == len(names)
    assert sorted(path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file()) == names
    assert all((into / name).read_text() == name for name in names)


def test_a_strangers_file_is_downloaded_again_when_it_has_changed(prefix, relay, tmp_path):
    put_raw(join(prefix, "data.jsonl"), b"one")
    assert storage.fetch_file(join(prefix, "data.jsonl"), tmp_path) == tmp_path / "data.jsonl"
    storage.fetch_file(join(prefix, "data.jsonl"), tmp_path)
    assert len(relay.keys("GET")) == 1
    put_raw(join(prefix, "data.jsonl"), b"three")
    assert storage.fetch_file(join(prefix, "data.jsonl"), tmp_path).read_bytes() == b"three"


def test_a_strangers_folder_is_copied_within_the_store_and_once(prefix, relay, tmp_path):
    files = {"large": random.Random(0).randbytes(LARGE), "sub/small": b"small", "empty": b""}
    for name, data in files.items():
        put_raw(join(prefix, "theirs", name), data)
    relay.seen.clear()
    records = storage.copy(join(prefix, "theirs"), join(prefix, "ours"), files)
    assert [record.sha256 for record in records] == [hashlib.sha256(data).hexdigest() for data in files.values()]
    storage.write_manifest(join(prefix, "ours"), "import", records, {})
    folder = storage.fetch(join(prefix, "ours"), tmp_path / "into")
    assert {name: (folder / name).read_bytes() for name in files} == files
    relay.seen.clear()
    assert storage.copy(join(prefix, "theirs"), join(prefix, "ours"), files) == records
    assert {method for method, _ in relay.seen} == {"HEAD"}
    assert storage.copy(join(prefix, "theirs"), str(tmp_path / "local"), files) == records
    assert storage.copy(str(tmp_path / "local"), join(prefix, "back"), files) == records


def test_nothing_where_a_strangers_folder_or_file_should_be(prefix, tmp_path, object_store):
    with pytest.raises(DraftModelError, match="holds no objects"):
        storage.fetch_tree(prefix, tmp_path)
    with pytest.raises(DraftModelError, match="no such bucket or object"):
        storage.fetch_file(join(prefix, "a"), tmp_path)
    with pytest.raises(DraftModelError, match="which is a folder or bucket"):
        storage.fetch_file(f"s3://{object_store.bucket}", tmp_path)


def test_a_strangers_key_that_leads_outside_is_refused(prefix, tmp_path):
    place = raw(prefix)
    s3.store().client.put_object(Bucket=place["Bucket"], Key=f"{place['Key']}/C:evil", Body=b"x")
    with pytest.raises(DraftModelError, match="rename the file"):
        storage.fetch_tree(prefix, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_failed_upload_leaves_no_parts_behind(object_store, prefix, relay, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(bytes(LARGE))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    relay.cuts["PUT", "large"] = 100
    caplog.set_level(logging.ERROR)
    with pytest.raises(DraftModelError, match="cannot be reached"):
        storage.put_file(tmp_path / "file", join(prefix, "large"))
    left = s3.store().client.list_multipart_uploads(Bucket=object_store.bucket).get("Uploads", [])
    assert not [upload for upload in left if upload["Key"] in prefix]
