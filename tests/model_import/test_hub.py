"""A model of the Hub: resolved to a commit, only what is needed downloaded, over connections that break."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from draft_model.model_import import DescriptionConfig, ImportConfig, describe, run
from draft_model.model_import.hub import HubContent
from draft_model.parameters.rules import validate
from draft_model.storage import stream, transfer

from .case import CANONICAL, names, properties, same_weights
from .hub_server import COMMIT, TOKEN, Hub


@pytest.fixture(scope="module")
def published(target, tmp_path_factory):
    """The repository's files: the target's, and much that no import needs."""
    folder = shutil.copytree(target, tmp_path_factory.mktemp("hub") / "repository")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    for name in ("pytorch_model.bin", "tf_model.h5", "model.onnx", "picture.png", "modeling_mine.py"):
        (folder / name).write_bytes(b"-" * 1000)
    return folder


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    from huggingface_hub import constants

    with Hub(published) as server:
        # What HF_ENDPOINT sets, which is read when the library is imported; the command line's test sets that.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.arrived = lambda: any(path.stat().st_size for path in (tmp_path / "work").rglob("*.incomplete"))
        yield server


@pytest.mark.parametrize("name", ["org/name", "org/name@v1", f"org/name@{COMMIT}"])
def test_a_repository_is_resolved_to_a_commit_and_recorded(hub, name, target, bring):
    result = bring(huggingface_id=name)
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert (result.source, result.revision, result.licence) == (name, COMMIT, "apache-2.0")
    assert result.architecture == "LlamaForCausalLM"
    assert properties(result.uri)["revision"] == COMMIT


def test_the_tokenizer_comes_ahead_of_the_weights_and_of_the_same_commit(hub, bring, tmp_path):
    parameters = validate({"huggingface_id": "org/name@v1"}, ["import"])
    found = describe(DescriptionConfig(str(tmp_path / "described"), tmp_path / "work", parameters))
    assert hub.got("model.safetensors") == []
    assert found.version == COMMIT
    hub.requests.clear()
    result = run(ImportConfig(str(tmp_path / "out"), tmp_path / "work", parameters, found.version))
    assert (result.source, result.revision) == ("org/name@v1", COMMIT)
    assert not any("v1" in path for _, path, *_ in hub.requests)  # a tag that moves meanwhile moves nothing here


def test_only_what_is_needed_is_downloaded_and_one_kind_of_weights(hub, bring):
    bring(huggingface_id="org/name")
    asked = {path.rpartition("/")[2] for method, path, _, _ in hub.requests if method == "GET" and "api" not in path}
    assert asked == CANONICAL | {"README.md"}


def test_pytorch_weights_are_taken_where_there_are_no_others(hub, target, tmp_path, bring):
    from safetensors.torch import load

    torch.save(load(hub.files.pop("model.safetensors")), tmp_path / "weights")
    hub.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    result = bring(huggingface_id="org/name")
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert hub.got("pytorch_model.bin")
    assert not hub.got("tf_model.h5")


def test_two_weight_files_are_on_the_disk_at_a_time(hub, target, tmp_path, bring, monkeypatch):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(target).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    del hub.files["model.safetensors"]
    hub.files |= {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("model*")}
    shards = [name for name in hub.files if name.endswith(".safetensors")]
    assert len(shards) > 4
    monkeypatch.setattr(stream, "LARGE_FROM", 1000)
    there, opened = [], HubContent.open

    @contextmanager
    def count(content):
        with opened(content) as reader:
            there.append(sum(1 for path in (tmp_path / "work/hub").glob("*.safetensors")))
            yield reader

    monkeypatch.setattr(HubContent, "open", count)
    result = bring(huggingface_id="org/name")
    assert all(hub.got(name) for name in shards)
    assert 0 < max(there) <= 2, there
    assert same_weights(result.uri, target)


def test_the_token_goes_to_the_hub_and_not_to_its_file_host(hub, bring):
    bring(huggingface_id="org/name")
    assert {token for _, path, _, token in hub.requests if not path.startswith("/blobs/")} == {True}
    assert {token for _, path, _, token in hub.requests if path.startswith("/blobs/")} == {False}


def downloads(hub):
    """The ranges of the downloads of the weights; the header's are left out."""
    return [span for span in hub.got("model.safetensors") if not span or span.endswith("-")]


def test_a_connection_that_ends_half_way_goes_on_where_it_was(hub, target, bring):
    hub.cuts = ["close"]
    result = bring(huggingface_id="org/name")
    first, second = downloads(hub)
    assert first == ""
    size = (target / "model.safetensors").stat().st_size
    assert size // 4 < int(second.removeprefix("bytes=").removesuffix("-")) < size
    assert same_weights(result.uri, target)


def test_a_connection_that_is_reset_is_tried_again(hub, target, bring):
    hub.cuts = ["reset", "close", "reset"]
    result = bring(huggingface_id="org/name")
    assert not hub.cuts
    assert same_weights(result.uri, target)


def test_a_connection_that_is_reset_every_time_is_told(hub, refusal, bring):
    hub.cuts = ["reset"] * 5
    (problem,) = refusal(huggingface_id="org/name")
    assert problem.startswith("huggingface_id: org/name cannot be downloaded: ")
    assert "check the network" in problem
    bring(huggingface_id="org/name")


def test_a_mirror_without_ranges(hub, target, bring):
    hub.ranges = False
    assert same_weights(bring(huggingface_id="org/name").uri, target)


def test_what_arrives_damaged_is_refused(hub, refusal):
    data = hub.files["model.safetensors"]
    hub.sent["model.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
    (problem,) = refusal(huggingface_id="org/name")
    assert "model.safetensors: its SHA-256 is" in problem


def test_the_same_revision_again_copies_nothing(hub, bring):
    first = bring(huggingface_id="org/name")
    before = len(hub.got("model.safetensors"))
    assert bring(huggingface_id="org/name") == first
    assert len(hub.got("model.safetensors")) == before


@pytest.mark.parametrize(
    ("refuses", "said"),
    [
        ("gated", "it is gated; ask for access"),
        ("private", "knows no such repository, or it is private"),
        (500, "answers with status 500; try again later"),
        (403, "answers with status 403; check the token in HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words_without_the_token(hub, refuses, said, refusal):
    hub.refuses = refuses
    (problem,) = refusal(huggingface_id="org/name")
    assert problem.startswith("huggingface_id: org/name cannot be downloaded: ")
    assert said in problem
    assert TOKEN not in problem


@pytest.mark.parametrize(
    ("name", "said"), [("org/other", "knows no such repository"), ("org/name@v9", "it has no such revision")]
)
def test_a_name_that_the_hub_does_not_know(hub, name, said, refusal):
    (problem,) = refusal(huggingface_id=name)
    assert f"huggingface_id: {name} cannot be downloaded: " in problem
    assert said in problem


def test_a_disk_that_is_too_small_is_found_before_weights_are_downloaded(hub, refusal, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    assert len(hub.files["model.safetensors"]) > 100_000
    (problem,) = refusal(huggingface_id="org/name")
    assert "MB are needed and 0.1 MB are free" in problem or "are needed and 100000 bytes are free" in problem
    assert not hub.got("model.safetensors")


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_downloaded(hub, refusal):
    hub.files = {name: data for name, data in hub.files.items() if name != "tokenizer.json"}
    (problem,) = refusal(huggingface_id="org/name")
    assert "it has no tokenizer" in problem
    assert all(span for span in hub.got("model.safetensors"))  # its header is asked for, and nothing else


def test_the_command_line_honours_the_environment_and_prints_no_token(hub, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN_PATH": str(tmp_path / "token")}
    done = subprocess.run(
        [sys.executable, "-c", "from draft_model.cli import main; main()", "import", "--huggingface_id", "org/name",
         "--output", str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert names(str(tmp_path / "out")) == CANONICAL
    assert any(token for *_, token in hub.requests)
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN not in (tmp_path / "out/manifest.json").read_text()
