"""What is particular to an object store: parts, retries, conditional writes, keys, endpoints, folders of strangers."""

import contextlib
import hashlib
import os
import random
import threading
from pathlib import Path

import pytest
from answers import certified

from draft_model import storage
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.storage import join, s3

from .conftest import ENDPOINTS, content, make
from .relay import Relay

LARGE = random.Random(0).randbytes(20 * 2**20 + 5)
FILES = {name: f"content of {name}".encode() for name in ("a", "b", "sub/c")}


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "source", FILES)


def publish(folder, uri):
    return storage.publish(folder, uri, stage="dataset", properties={})


def raw(uri):
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def put_raw(uri, data):
    s3.store().client.put_object(**raw(uri), Body=data)


def test_a_large_file_goes_and_comes_in_parts_and_a_cut_connection_is_no_matter(prefix, relay, source, tmp_path):
    make(source, {"large": LARGE})
    for method in ("PUT", "GET"):
        for name in ("large", "/a"):
            relay.cuts[method, name] = 1
    publish(source, prefix)
    assert s3.store().client.head_object(**raw(join(prefix, "large")))["ETag"].strip('"').endswith("-2")
    assert content(storage.fetch(prefix, tmp_path / "into"), [*FILES, "large"]) == FILES | {"large": LARGE}
    for method in ("PUT", "GET"):
        assert relay.keys(method).count("large") == 3
    assert not relay.cuts.total()
    assert hashlib.sha256(LARGE).hexdigest() in {file.sha256 for file in storage.read_manifest(prefix).files}


def test_a_second_transfer_moves_nothing_but_what_was_changed(prefix, relay, source, tmp_path):
    make(source, {"b": LARGE})
    into, names = tmp_path / "into", {"a", "b", "c"}
    publish(source, prefix)
    assert set(relay.keys("PUT")) == {*names, "manifest.json"}
    relay.seen.clear()
    publish(source, prefix)
    assert relay.keys("PUT") == ["manifest.json"]
    relay.seen.clear()
    storage.fetch(prefix, into)
    assert set(relay.keys("GET")) == {*names, "manifest.json"}
    (into / "a").write_text("CONTENT of a")
    relay.seen.clear()
    storage.fetch(prefix, into)
    assert sorted(relay.keys("GET")) == ["a", "manifest.json"]
    assert (into / "a").read_bytes() == FILES["a"]
    put_raw(join(prefix, "a"), FILES["a"][::-1])
    put_raw(join(prefix, "b"), LARGE[::-1])
    for name in ("a", "b"):
        (into / name).unlink()
        with pytest.raises(DraftModelError, match="has another checksum than its manifest says; run the stage"):
            storage.fetch(prefix, into, only=lambda path, name=name: path == name)
        assert not (into / name).exists()
    publish(source, prefix)
    assert content(storage.fetch(prefix, into), ["a", "b"]) == {"a": FILES["a"], "b": LARGE}


def test_a_publication_that_broke_off_leaves_no_manifest_and_is_resumed(prefix, relay, source, monkeypatch):
    publish(source, prefix)
    make(source, dict.fromkeys(("a", "sub/c"), b"new"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    relay.cuts["PUT", "sub/c"] = 1
    with pytest.raises(StoreUnavailable, match=r"sub/c: .*cannot be reached"):
        publish(source, prefix)
    assert not storage.exists(prefix)
    relay.seen.clear()
    publish(source, prefix)
    assert "b" not in relay.keys("PUT")
    assert relay.keys("PUT")[-1] == "manifest.json"
    assert storage.read_bytes(join(prefix, "sub/c")) == b"new"


def attempts(uri, source, into):
    return [
        lambda: publish(source, uri),
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


def test_every_request_waits_for_a_store_that_is_away(prefix, relay, source, tmp_path, caplog):
    publish(source, prefix)
    for attempt in attempts(prefix, source, tmp_path / "into"):
        relay.away = 3  # more than boto3 itself tries
        attempt()
        assert relay.away == 0
    assert "cannot be reached" in caplog.text
    assert "next try in" in caplog.text


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError"), (404, "NoSuchUpload")]
)
def test_a_store_that_throttles_is_asked_again(prefix, relay, source, status, code):
    answers = [(status, code)] * 3  # more than boto3 itself asks again
    relay.refuse = lambda _: answers.pop() if answers else None
    storage.write_bytes(join(prefix, "a"), b"")
    assert not answers


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


def test_a_failure_ends_the_patience_of_the_others(prefix, relay, source):
    waiting = threading.Event()

    def refuse(request):
        if request.command == "PUT" and request.path.endswith("/b"):
            waiting.set()
            return 503, "SlowDown"
        return (403, "AccessDenied") if request.command == "PUT" and waiting.wait(10) else None

    relay.refuse = refuse
    with pytest.raises(DraftModelError, match="access denied"):
        publish(source, prefix)


def test_a_lost_answer_to_a_conditional_write_is_no_refusal(prefix, relay):
    file = join(prefix, "lease")
    storage.exists(file)
    relay.lose = 1
    assert storage.create(file, b"one")
    relay.lose = 3  # more than boto3 itself tries
    assert storage.replace(file, b"two", storage.read_versioned(file)[1]) is True
    assert storage.read_file(file) == b"two"


def test_a_store_without_checksums_works_where_the_variables_say_so(prefix, relay, monkeypatch):
    sums = ("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")
    relay.refuse = lambda request: (
        (501, "NotImplemented") if any(name.lower().startswith(sums) for name in request.headers) else None
    )
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in storage.probe(prefix)[0]
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required\n")
    assert storage.probe(prefix) == []


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
@pytest.mark.parametrize("answer", [(501, "NotImplemented"), (200, "")], ids=["refuses", "ignores"])
def test_a_store_without_conditional_writes_is_found_by_probe(prefix, relay, header, answer):
    relay.refuse = lambda request: answer if request.command == "PUT" and request.headers.get(header) else None
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


def test_a_file_that_is_written_to_meanwhile_is_no_publication(prefix, source, tmp_path, monkeypatch):
    for place in (prefix, str(tmp_path / "place")):
        kind = type(storage._folder(place))

        def grow(self, path, record, put=kind.put):
            make(source, {"a": b"more than before"})
            put(self, path, record)

        make(source, {"a": b"short"})
        monkeypatch.setattr(kind, "put", grow)
        with pytest.raises(DraftModelError, match="changed while it was published; leave it alone"):
            publish(source, place)


def test_what_a_disk_cannot_take_is_told_in_words(prefix, source, tmp_path, monkeypatch):
    publish(source, prefix)
    with monkeypatch.context() as full:
        full.setattr(s3, "partial_file", lambda _: contextlib.nullcontext(Path("/dev/full/x")))
        with pytest.raises(DraftModelError, match="a folder is needed where there is a file"):
            storage.fetch(prefix, tmp_path / "into")
    manifest, size = storage.read_bytes(join(prefix, "manifest.json")), f'"size": {len(FILES["a"])}'.encode()
    storage.write_bytes(join(prefix, "manifest.json"), manifest.replace(size, b'"size": 1' + b"0" * 18))
    with pytest.raises(DraftModelError, match="are needed and"):
        storage.fetch(prefix, tmp_path / "into")


def test_a_store_behind_a_certificate_of_its_own(object_store, prefix, source, tmp_path, monkeypatch):
    context = certified(tmp_path)
    with Relay(object_store.environment["AWS_ENDPOINT_URL"], context) as relay:
        for name in ENDPOINTS:
            monkeypatch.setenv(name, relay.endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(DraftModelError, match=r"no trusted TLS connection .* set AWS_CA_BUNDLE"):
            storage.exists(prefix)
        monkeypatch.setenv("AWS_CA_BUNDLE", f"{tmp_path}/cert.pem\n")
        publish(source, prefix)
        assert content(storage.fetch(prefix, tmp_path / "into"), FILES) == FILES


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


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", *ENDPOINTS])
def test_values_that_end_with_a_line_break_are_stripped_and_blank_ones_unset(prefix, monkeypatch, name):
    monkeypatch.setenv(name, os.environ[name] + "\n")
    monkeypatch.setenv("AWS_PROFILE", " ")
    assert not storage.exists(prefix)


@pytest.mark.parametrize("endpoint", ["minio-service.kubeflow:9000", "http://host:port"])
def test_an_endpoint_that_is_no_url_is_refused(prefix, monkeypatch, endpoint):
    for name in ENDPOINTS:
        monkeypatch.setenv(name, endpoint)
    told = rf"AWS_ENDPOINT_URL: given '{endpoint}'.* allowed: http://host:port"
    with pytest.raises(DraftModelError, match=told) as refused:
        storage.exists(prefix)
    assert "http://" in endpoint or f"such as http://{endpoint}" in str(refused.value)


@pytest.mark.parametrize("ask", [storage.list_files, storage.read_file, storage.exists])
def test_a_console_at_the_endpoint_is_no_store(prefix, relay, monkeypatch, ask):
    monkeypatch.setattr(s3, "FIRST_ANSWER", 0.1)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-2")  # a client that has no answer yet
    relay.refuse = lambda request: (200, "page", {"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(StoreUnavailable, match="AWS_ENDPOINT_URL must name the port of its S3 API"):
        ask(join(prefix, "a"))


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


WRONG = "this-is-not-the-key"
KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@pytest.mark.parametrize(
    ("uri", "environment", "sentence"),
    [
        ("", {"AWS_SECRET_ACCESS_KEY": WRONG}, KEYS),
        ("", {"AWS_ACCESS_KEY_ID": WRONG}, KEYS),
        ("", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true",
              "AWS_SHARED_CREDENTIALS_FILE": "/none", "AWS_CONFIG_FILE": "/none"}, "no credentials"),
        ("s3://no-such-bucket/run", {}, "no such bucket"),
        ("s3://Not a Bucket!/run", {}, "correct the URI"),
        ("", dict.fromkeys(ENDPOINTS, "http://user:password@127.0.0.1:9"), "http://127.0.0.1:9 cannot be reached"),
    ],
)  # fmt: skip
def test_every_request_says_what_is_wrong_and_shows_no_secret(
    object_store, prefix, source, tmp_path, monkeypatch, uri, environment, sentence
):
    for name, value in {"AWS_MAX_ATTEMPTS": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    uri = uri or prefix
    for attempt in attempts(uri, source, tmp_path / "into"):
        with pytest.raises(DraftModelError) as refused:
            attempt()
        assert uri in str(refused.value)
        assert sentence in str(refused.value)
        assert isinstance(refused.value, StoreUnavailable) == ("reached" in sentence)
        assert WRONG not in str(refused.value)
        assert "password" not in str(refused.value)
        assert object_store.environment["AWS_SECRET_ACCESS_KEY"] not in chain(refused.value)


def chain(error):
    return "" if error is None else f"{error!r} {chain(error.__cause__ or error.__context__)}"


def test_a_strangers_folder_is_listed_and_downloaded_once_and_a_file_again_when_it_has_changed(prefix, relay, tmp_path):
    files = {name: name.encode() for name in ("config.json", *(f"shards/{number}" for number in range(8)))}
    for name, data in files.items():
        put_raw(join(prefix, "model", name), data)
    s3.store().client.put_object(Bucket=raw(prefix)["Bucket"], Key=f"{raw(prefix)['Key']}/model/", Body=b"")
    put_raw(join(prefix, "model-2/other"), b"")
    into = tmp_path / "into"
    events, event = s3.store().client.meta.events, "provide-client-params.s3.ListObjectsV2"

    def page(params, **_):  # a store does it by itself after 1,000 objects
        return params | {"MaxKeys": 4}

    events.register(event, page)
    try:
        for _ in range(2):
            assert storage.fetch_tree(join(prefix, "model"), into) == into
    finally:
        events.unregister(event, page)
    assert len(relay.keys("GET")) == len(files)
    found = [path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file()]
    assert content(into, found) == files
    file = join(prefix, "model/config.json")
    assert storage.fetch_file(file, into).read_bytes() == files["config.json"]
    assert len(relay.keys("GET")) == len(files)
    put_raw(file, b"changed")
    assert storage.fetch_file(file, into).read_bytes() == b"changed"


def test_a_strangers_folder_is_copied_within_the_store_and_once(prefix, relay, tmp_path):
    files = {"large": LARGE, "sub/small": b"small", "empty": b""}
    for name, data in files.items():
        put_raw(join(prefix, "theirs", name), data)
    relay.seen.clear()
    records = storage.copy(join(prefix, "theirs"), join(prefix, "ours"), files)
    assert [record.sha256 for record in records] == [hashlib.sha256(data).hexdigest() for data in files.values()]
    storage.write_manifest(join(prefix, "ours"), "import", records, {})
    assert content(storage.fetch(join(prefix, "ours"), tmp_path / "into"), files) == files
    relay.seen.clear()
    assert storage.copy(join(prefix, "theirs"), join(prefix, "ours"), files) == records
    assert {method for method, _ in relay.seen} == {"HEAD"}
    assert storage.copy(join(prefix, "theirs"), str(tmp_path / "local"), files) == records
    assert storage.copy(str(tmp_path / "local"), join(prefix, "back"), files) == records


def test_nothing_or_a_dangerous_key_where_a_strangers_folder_or_file_should_be(prefix, tmp_path, object_store):
    for fetch, uri, sentence in (
        (storage.fetch_tree, prefix, "holds no objects"),
        (storage.fetch_file, join(prefix, "a"), "no such bucket or object"),
        (storage.fetch_file, f"s3://{object_store.bucket}", "which is a folder or bucket"),
    ):
        with pytest.raises(DraftModelError, match=sentence):
            fetch(uri, tmp_path / "into")
    s3.store().client.put_object(Bucket=raw(prefix)["Bucket"], Key=f"{raw(prefix)['Key']}/C:evil", Body=b"x")
    with pytest.raises(DraftModelError, match="rename the file"):
        storage.fetch_tree(prefix, tmp_path / "into")
    assert not (tmp_path / "into").exists()
