"""A model of the Hub: resolved to a commit, only what is needed downloaded, over connections that break."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from draft_model.model_import import hub as hub_module
from draft_model.model_import import stage

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
        server.connect(monkeypatch)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        monkeypatch.setattr(hub_module, "WAIT", 0.0)
        server.arrived = lambda: any(path.stat().st_size for path in (tmp_path / "work").rglob("*.incomplete"))
        yield server


@pytest.mark.parametrize("name", ["org/name", "org/name@v1", f"org/name@{COMMIT}"])
def test_a_repository_is_resolved_to_a_commit_and_recorded(hub, name, target, bring):
    result = bring(huggingface_id=name)
    requests = list(hub.requests)
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert (result.source, result.revision, result.licence) == (name, COMMIT, "apache-2.0")
    assert result.architecture == "LlamaForCausalLM"
    assert properties(result.uri)["revision"] == COMMIT
    asked = {path.rpartition("/")[2] for method, path, _, _ in requests if method == "GET" and "api" not in path}
    assert asked == CANONICAL | {"README.md"}
    tokens = {
        (path.startswith("/blobs/"), token) for _, path, _, token in requests if "org/name" in path or "blobs" in path
    }
    assert tokens == {(False, True), (True, False)}, "the token goes to the Hub and not to its file host"
    before = len(hub.got("model.safetensors"))
    assert bring(huggingface_id=name).uri == result.uri
    assert len(hub.got("model.safetensors")) == before


def test_pytorch_weights_are_taken_where_there_are_no_others(hub, target, tmp_path, bring):
    from safetensors.torch import load

    torch.save(load(hub.files.pop("model.safetensors")), tmp_path / "weights")
    hub.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    result = bring(huggingface_id="org/name")
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert hub.got("pytorch_model.bin")
    assert not hub.got("tf_model.h5")


def test_a_connection_that_breaks_goes_on_where_it_was_and_not_for_ever(hub, target, bring, refusal, monkeypatch):
    hub.cuts = ["reset"] * 30
    monkeypatch.setattr(hub_module, "TRIES", 2)
    (problem,) = refusal(huggingface_id="org/name")
    assert problem.startswith("huggingface_id: org/name cannot be downloaded: ")
    assert "check the network" in problem
    hub.cuts = ["reset", "close"]
    hub.requests.clear()
    monkeypatch.setattr(hub_module, "TRIES", 6)
    assert same_weights(bring(huggingface_id="org/name").uri, target)
    assert not hub.cuts
    last = hub.got("model.safetensors")[-1]  # goes on where the others ended
    assert 0 < int(last.removeprefix("bytes=").removesuffix("-")) < (target / "model.safetensors").stat().st_size


def test_a_busy_hub_is_asked_again_as_late_as_it_says_and_a_mirror_needs_no_ranges_and_sizes(
    hub, target, bring, caplog
):
    hub.busy = [429, 500, 503]
    hub.ranges, hub.sizes = False, False
    assert same_weights(bring(huggingface_id="org/name").uri, target)
    for status in (429, 500, 503):
        assert f"answers with status {status}; trying again in 0 s" in caplog.text


def test_what_arrives_damaged_is_refused(hub, refusal):
    data = hub.files["model.safetensors"]
    hub.sent["model.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
    (problem,) = refusal(huggingface_id="org/name")
    assert "model.safetensors of org/name arrived damaged: its SHA-256" in problem


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("org/name", {"refuses": "gated"}, "it is gated; ask for access"),
        ("org/name", {"refuses": "private"}, "knows no such repository, or it is private"),
        ("org/name", {"refuses": 503}, "answers with status 503; try again later"),
        ("org/name", {"refuses": 403}, "answers with status 403; check the token in HF_TOKEN"),
        ("org/name", {"leaves_out": "X-Repo-Commit"}, "leaves out headers that huggingface_hub needs (X-Repo-Commit"),
        ("org/name", {"leaves_out": "sha"}, "names no commit"),  # a mirror that is no Hub
        ("org/other", {}, "knows no such repository"),
        ("org/name@v9", {}, "it has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words_without_the_token(hub, name, settings, said, refusal):
    vars(hub).update(settings)
    (problem,) = refusal(huggingface_id=name)
    assert problem.startswith(f"huggingface_id: {name} cannot be downloaded: ")
    assert said in problem
    assert hub.endpoint in problem or "leaves_out" not in settings
    assert TOKEN not in problem


def test_what_cannot_be_used_or_held_is_refused_before_weights_are_downloaded(hub, refusal, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    assert len(hub.files["model.safetensors"]) > 100_000
    assert "GB are needed and" in refusal(huggingface_id="org/name")[0]
    del hub.files["tokenizer.json"]
    assert "it has no tokenizer" in refusal(huggingface_id="org/name")[0]
    assert not hub.got("model.safetensors")


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
