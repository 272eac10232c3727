"""Files are found wherever they lie, and read by ranges: on disk, in S3, at https://, through fsspec."""

import gzip
import http.server
import re
import threading

import pytest
from answers import certified

from draft_model import storage
from draft_model.dataset import files
from draft_model.dataset.files import _is_private as is_private
from draft_model.dataset.files import find
from draft_model.errors import DraftModelError
from draft_model.preflight import check

LAYOUT = ["b.jsonl", "a.jsonl.gz", "deep/er/c.jsonl.zst", "deep/d.jsonl", "notes.txt", "deep/.hidden.jsonl"]
IN_FOLDER = ["a.jsonl.gz", "b.jsonl", "deep/d.jsonl", "deep/er/c.jsonl.zst"]


@pytest.fixture
def folder(tmp_path):
    for name in LAYOUT:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 10)
    return tmp_path / "data"


def named(given):
    return {file.name: file.read(0, 1000) for file in find(str(given))}


def test_a_file_a_folder_and_a_glob(folder):
    assert list(named(folder)) == IN_FOLDER
    assert named(folder / "b.jsonl") == {"b.jsonl": b"b.jsonl" * 10}
    assert named(f"file://{folder}/notes.txt") == {"notes.txt": b"notes.txt" * 10}, "what is named is taken"
    assert list(named(folder / "*.jsonl*")) == ["a.jsonl.gz", "b.jsonl"]
    assert list(named(f"{folder}/**/[cd].jsonl*")) == ["deep/d.jsonl", "deep/er/c.jsonl.zst"]
    (folder / "..data").symlink_to(folder / "deep")  # as Kubernetes mounts a ConfigMap
    (folder / "link.jsonl").symlink_to("..data/d.jsonl")
    assert list(named(folder)) == [*IN_FOLDER, "link.jsonl"]
    assert named(folder / "l*.jsonl") == {"link.jsonl": b"deep/d.jsonl" * 10}
    (folder / "a[1].jsonl").write_bytes(b"it")
    assert named(folder / "a[1].jsonl") == {"a[1].jsonl": b"it"}
    for absent in ("x.jsonl", "*.parquet", "deep/x*/y"):
        with pytest.raises(DraftModelError, match=re.escape(absent)):
            find(str(folder / absent))


def test_the_content_alone_is_a_local_files_identity(folder):
    (first,) = find(str(folder / "b.jsonl"))
    before = first.identity()
    (folder / "copy.jsonl").write_bytes(b"b.jsonl" * 10)
    (other,) = find(str(folder / "copy.jsonl"))
    assert other.identity() == before
    (folder / "b.jsonl").write_bytes(b"B.jsonl" * 10)
    assert first.identity() != before


def test_an_object_store_has_folders_globs_and_tags(folder, object_store):
    root = f"s3://{object_store.bucket}/files-test"
    for name in LAYOUT:
        storage.write_bytes(f"{root}/{name}", (folder / name).read_bytes())
    assert named(root) == named(folder)
    assert named(f"{root.replace('s3', 'minio')}/b.jsonl") == {"b.jsonl": b"b.jsonl" * 10}
    assert list(named(f"{root}/*.jsonl*")) == ["a.jsonl.gz", "b.jsonl"]
    assert list(named(f"{root}/**/d.jsonl")) == ["deep/d.jsonl"]
    (file,) = find(f"{root}/b.jsonl")
    assert (file.read(7, 7), file.read(68, 100), file.read(70, 1)) == (b"b.jsonl", b"nl", b"")
    before = file.identity()
    storage.write_bytes(f"{root}/b.jsonl", b"B.jsonl" * 10)
    with pytest.raises(DraftModelError, match=r"b\.jsonl"):
        file.read(0, 7)  # another content under the same name must not be mixed in
    assert find(f"{root}/b.jsonl")[0].identity() != before
    for absent in ("x.jsonl", "none", "*.parquet"):
        with pytest.raises(DraftModelError, match=re.escape(absent)):
            find(f"{root}/{absent}")


def test_gs_goes_through_fsspec_and_says_what_is_missing():
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    with pytest.raises(DraftModelError, match=r"gs://bucket/a\.jsonl: .*gcsfs"):
        find("gs://bucket/a.jsonl")

    class Bucket(MemoryFileSystem):
        protocol = "gs"
        store = {}  # noqa: RUF012 - fsspec's own way
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("gs://").strip("/")

    fsspec.register_implementation("gs", Bucket, clobber=True)
    try:
        for name in ("a.jsonl", "deep/b.jsonl.gz", "c.txt"):
            Bucket().pipe_file(f"/bucket/{name}", name.encode())
        assert named("gs://bucket") == {"a.jsonl": b"a.jsonl", "deep/b.jsonl.gz": b"deep/b.jsonl.gz"}
        assert named("gs://bucket/*.txt") == {"c.txt": b"c.txt"}
        (file,) = find("gs://bucket/a.jsonl")
        assert file.read(2, 3) == b"jso"
        with pytest.raises(DraftModelError, match=r"gs://bucket/x\.jsonl"):
            find("gs://bucket/x.jsonl")
    finally:
        _registry.pop("gs", None)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file with byte ranges; fails every other request, as a busy server does."""

    content = gzip.compress(b'{"a": 1}\n' * 50_000)
    requests = 0
    ranges = True

    def do_GET(self):
        cls = type(self)
        cls.requests += 1
        if self.path.startswith("/absent"):
            return self.send_error(404)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            return self.end_headers()
        if cls.requests % 2:
            return self.send_error(503)
        start, end = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = self.content[int(start) : int(end) + 1] if self.ranges else self.content
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"one"')
        if self.ranges:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def https(tmp_path, monkeypatch):
    """Address of a real HTTPS server here, whose certificate is trusted."""
    context = certified(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    monkeypatch.setattr("draft_model.dataset.files._PAUSE", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


def test_https_is_read_by_ranges_and_a_failing_server_is_asked_again(https, monkeypatch):
    (file,) = find(f"{https}/data/train.jsonl.gz?signature=secret")
    assert (file.name, file.size) == ("train.jsonl.gz", len(Server.content))
    assert file.open().read() == b'{"a": 1}\n' * 50_000
    assert "secret" not in file.uri
    with pytest.raises(DraftModelError, match=r"/absent\.jsonl: the server answers 404") as caught:
        find(f"{https}/absent.jsonl?signature=secret")
    assert "secret" not in str(caught.value)
    monkeypatch.setattr(Server, "ranges", False)
    with pytest.raises(DraftModelError, match="does not serve byte ranges"):
        find(f"{https}/data/train.jsonl")


def test_redirects_lead_to_https_and_from_public_addresses_to_public_ones(https, monkeypatch):
    port = https.rpartition(":")[2]
    (file,) = find(f"{https}/to/{https}/data/train.jsonl.gz")
    assert file.size == len(Server.content), "a private address may lead to another"
    for target in (f"http://127.0.0.1:{port}/a.jsonl", "ftp://example.org/a.jsonl"):
        with pytest.raises(DraftModelError, match="redirects to another scheme than https"):
            find(f"{https}/to/{target}")
    # As if `localhost` were a public host; names of private ones are looked up as ever.
    monkeypatch.setattr(files, "_is_private", lambda host: host != "localhost" and is_private(host))
    for target in (f"https://127.0.0.1:{port}", "https://169.254.169.254", "https://[::ffff:10.0.0.1]"):
        with pytest.raises(DraftModelError, match="redirects to a private address"):
            find(f"{https}/to/{target}/a.jsonl")


def test_other_schemes_are_refused_and_preflight_looks_for_all_of_these(folder):
    for given in ("http://example.org/a.jsonl", "simplecache::http://example.org/a.jsonl", "no://a/b"):
        with pytest.raises(DraftModelError, match=re.escape(given)):
            find(given)
    given = {"dataset_train_split": str(folder), "dataset_validation_split": str(folder / "*.jsonl")}
    assert check(given, ["dataset"]).dataset_train_split == str(folder)
    with pytest.raises(DraftModelError, match=r"dataset_validation_split: .*none\*"):
        check(given | {"dataset_validation_split": str(folder / "none*")}, ["dataset"])
