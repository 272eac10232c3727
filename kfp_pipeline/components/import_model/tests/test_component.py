"""The target as one canonical folder, of the version that was looked at."""

from draft_model import storage

from .. import import_model


def test_it_shows_what_was_imported(world, imported):
    done = world.calls["import_model"]
    manifest = storage.read_manifest(imported[2], stage="import")
    assert done.metrics == {"parameters": manifest.properties["parameter_count"], "bytes": manifest.size}
    assert done.artifacts["model"].uri == imported[2]
    assert done.artifacts["model"].metadata["architecture"] == "LlamaForCausalLM"
    assert "| conversion | none: the weights were safetensors |\n" in done.text("summary")


def test_a_folder_of_the_runs_own(call, world, tmp_path):
    assert call(import_model, **world.source, storage_uri=str(tmp_path / "mine")).output == str(tmp_path / "mine/model")


def test_another_version_is_refused(refusal, world):
    (problem,) = refusal(import_model, **world.source, version="0123456789abcdef")
    assert "has changed since this run looked at it" in problem
