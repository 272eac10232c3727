"""Tokenizer and version of the target, at a place that runs share."""

import shutil

from draft_model import storage

from .. import import_tokenizer


def test_it_shows_what_the_model_is(world, imported):
    done = world.calls["import_tokenizer"]
    uri, version, _ = imported
    assert storage.read_manifest(uri, stage="description").properties["version"] == version
    assert done.artifacts["tokenizer"].uri == uri
    shown = done.text("summary")
    assert "| architecture | LlamaForCausalLM |\n" in shown
    assert "| weights | 1 safetensors file, 0.00 GB |\n" in shown


def test_runs_share_the_folder_of_a_version(call, world, tmp_path):
    def place(run):
        return call(import_tokenizer, **world.source, run_id=run).output

    first, again = place("none"), place("import_tokenizer")  # the latter is part of the artifact's URI
    assert first[1] == again[1]
    assert first[0] == str(tmp_path / "import_tokenizer/tokenizer")
    assert again[0] == f"{tmp_path}/models/{again[1]}/tokenizer"


def test_a_folder_of_the_runs_own(call, world, tmp_path):
    uri, _ = call(import_tokenizer, **world.source, run_id="r", storage_uri=str(tmp_path / "mine")).output
    assert uri == str(tmp_path / "mine/tokenizer")


def test_a_model_that_cannot_be_a_target_ends_it(refusal, world, tmp_path):
    model = shutil.copytree(world.source["pytorch_model_path"], tmp_path / "model")
    (model / "model.safetensors").unlink()
    (problem,) = refusal(import_tokenizer, pytorch_model_path=str(model), run_id="r")
    assert "it has no weights" in problem
