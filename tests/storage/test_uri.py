"""A URI means one place, and a name inside a folder can lead nowhere else."""

import ntpath
import posixpath
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draft_model.errors import DraftModelError, without_credentials
from draft_model.storage import is_remote, join
from draft_model.storage.uri import ObjectAddress, name_problem, parse, split

TRICKY = st.text(alphabet=st.sampled_from("ab.:/\\\0~ é\udc80C"), max_size=12)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data/train.jsonl", Path("data/train.jsonl")),
        ("../up", Path("../up")),
        ("~/models", Path.home() / "models"),
        ("file:///data/a%20b", Path("/data/a b")),
        ("file://localhost/data", Path("/data")),
        ("s3://bucket/a/b", ObjectAddress("bucket", "a/b")),
        ("s3://bucket/a/b/", ObjectAddress("bucket", "a/b")),
        ("s3://bucket", ObjectAddress("bucket", "")),
        ("minio://bucket/a/b", ObjectAddress("bucket", "a/b", "minio")),
        ("S3://bucket/a", ObjectAddress("bucket", "a")),
    ],
)
def test_a_uri_is_taken_apart(uri, expected):
    assert parse(uri) == expected
    assert is_remote(uri) == isinstance(expected, ObjectAddress)


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        *[(uri, "") for uri in (
            "", "https://host/file", "file://host/data", "file://", "s3://", "s3:///key", "s3://bucket/a/../b",
            "s3://bucket/../b", "s3://bucket//a", "s3://bucket/a\\b", "s3://bucket/C:/a", "s3://bucket/a\0b", "data\0",
            "minio://bucket/./a", "s3://bucket/a\n", "data\n", "s3://bucket/\x1b[2J", "s3:/bucket/a", "minio:bucket",
        )],
        ("gs://bucket/a", "AWS_ENDPOINT_URL=https://storage.googleapis.com and HMAC keys, and give s3://bucket/a"),
        ("minio://bucket/root?endpoint=minio:9000&disableSSL=true", "AWS_ENDPOINT_URL"),
    ],
)  # fmt: skip
def test_what_is_no_place_is_refused_with_the_uri_in_the_sentence(uri, sentence):
    with pytest.raises(DraftModelError) as refused:
        parse(uri)
    assert repr(uri) in str(refused.value)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["401 for url: http://user:SECRET@host:5000/api?x=1", "https://:SECRET@host", "proxy http://u:p@SECRET@host/",
     "GET https://b.s3.amazonaws.com/k?X-Amz-Credential=SECRET&X-Amz-Signature=SECRET", "a?sig=SECRET&x=1"],
)  # fmt: skip
def test_credentials_are_taken_out_of_foreign_texts(text):
    cleaned = without_credentials(ValueError(text))
    assert "SECRET" not in cleaned
    assert without_credentials(cleaned) == cleaned
    assert "host" in cleaned or "=" in cleaned
    assert (
        without_credentials("mail me@example.com about s3://bucket/a@b") == "mail me@example.com about s3://bucket/a@b"
    )


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("s3://bucket", ["a", "b/c"], "s3://bucket/a/b/c"),
        ("s3://bucket/run/", ["a"], "s3://bucket/run/a"),
        ("minio://bucket/run", ["a"], "minio://bucket/run/a"),
        ("/data", ["a"], "/data/a"),
        ("/", ["a"], "/a"),
        ("data", ["a"], "data/a"),
        ("data", [], "data"),
    ],
)
def test_join_names_what_is_inside(uri, parts, expected):
    assert join(uri, *parts) == expected


def test_a_file_uri_is_quoted_and_a_scheme_kept():
    assert parse(join("file:///data", "50% of it/a b")) == Path("/data/50% of it/a b")
    assert split("minio://bucket/a/b") == ("minio://bucket/a", "b")
    assert split("s3://bucket/a") == ("s3://bucket", "a")


@pytest.mark.parametrize("part", ["..", "../a", "a/../../b", "/etc/passwd", "a//b", "C:\\x", "c:x", "", "a\0"])
def test_join_leads_nowhere_else(part):
    with pytest.raises(DraftModelError):
        join("s3://bucket/run", part)


@given(TRICKY)
def test_an_allowed_name_stays_below_its_folder_on_every_system(name):
    if name_problem(name) is None:
        assert posixpath.normpath(posixpath.join("/top", name)).startswith("/top/")
        assert ntpath.normpath(ntpath.join("C:\\top", name)).startswith("C:\\top\\")
        assert parse(f"s3://bucket/{name}") == ObjectAddress("bucket", name) or "?" in name
