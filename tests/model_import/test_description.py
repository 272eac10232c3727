"""Configuration and tokenizer ahead of the weights: enough for a data set, and of the version that is then imported."""

import uuid

import pytest
import tiny

from draft_model import storage
from draft_model.dataset import DatasetConfig
from draft_model.dataset import run as build_dataset
from draft_model.errors import DraftModelError
from draft_model.model_import import DescriptionConfig, ImportConfig, describe, run
from draft_model.parameters.rules import validate

from .case import TOKENIZER, change_config
from .test_weights import write_gguf


@pytest.fixture
def look(tmp_path):
    """Describes a model."""

    def look(source, output=None):
        parameters = validate({"pytorch_model_path": str(source)}, ["import"])
        return describe(DescriptionConfig(output or str(tmp_path / "described"), tmp_path / "work", parameters))

    return look


@pytest.fixture
def bring(tmp_path):
    """Imports a version of a model."""

    def bring(source, version):
        parameters = validate({"pytorch_model_path": str(source)}, ["import"])
        return run(ImportConfig(str(tmp_path / "out"), tmp_path / "work", parameters, version))

    return bring


def fingerprint(tmp_path, model):
    data = tmp_path / "train.jsonl"
    if not data.exists():
        tiny.write_jsonl(data, tiny.conversations(6))
    parameters = validate({"dataset_train_split": str(data), "chat_template": "qwen"}, ["dataset"])
    output = str(tmp_path / f"dataset-{uuid.uuid4().hex}")
    return build_dataset(DatasetConfig(model, output, parameters, tmp_path / "dataset-work")).fingerprint


def test_it_is_enough_for_the_data_set_which_is_the_same_as_with_the_weights(model, look, bring, tmp_path):
    found = look(model)
    described = storage.read_manifest(found.uri, stage="description")
    assert {file.path for file in described.files} == {"config.json", "generation_config.json", *TOKENIZER}
    assert (found.architecture, found.weights[:2]) == ("LlamaForCausalLM", ("safetensors", 1))
    imported = bring(model, found.version)
    assert fingerprint(tmp_path, found.uri) == fingerprint(tmp_path, imported.uri)


def test_no_weight_is_read(model, look):
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(bytes(size))  # whoever reads it finds no header
    assert look(model).weights == ("safetensors", 1, size)


@pytest.mark.parametrize("change", ["weights", "tokenizer"])
def test_another_version_than_the_one_that_was_described_is_not_imported(model, change, look, bring):
    version = look(model).version
    assert bring(model, version).parameter_count
    if change == "weights":
        data = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(data[:-1] + b"\1")
    else:
        (model / "tokenizer_config.json").write_text('{"other": 1}')
    assert look(model).version != version
    with pytest.raises(DraftModelError, match=f"pytorch_model_path: {model} has changed since this run looked at it"):
        bring(model, version)


def test_what_cannot_be_a_target_is_told_before_its_weights_are_looked_at(model, look, tmp_path):
    change_config(model, model_type="unheard-of")
    (model / "model.safetensors").unlink()
    with pytest.raises(DraftModelError) as caught:
        look(model)
    assert any("has no weights" in problem for problem in caught.value.problems)
    assert any("unheard-of" in problem for problem in caught.value.problems)
    assert not storage.exists(str(tmp_path / "described"))


def test_a_gguf_file_gives_them_out_of_its_header(target, look, tmp_path):
    from transformers import AutoTokenizer

    path = tmp_path / "mine/tiny.gguf"
    path.parent.mkdir()
    write_gguf(target, path)
    found = look(path)
    assert found.weights == ("gguf", 1, path.stat().st_size)
    ours, theirs = AutoTokenizer.from_pretrained(found.uri), AutoTokenizer.from_pretrained(target)
    assert ours("alpha beta<|im_end|>").input_ids == theirs("alpha beta<|im_end|>").input_ids
    assert fingerprint(tmp_path, found.uri)


def test_the_header_of_a_gguf_file_is_all_that_is_brought(target, look, tmp_path, monkeypatch):
    from draft_model.model_import import description

    path = tmp_path / "mine/tiny.gguf"
    path.parent.mkdir()
    write_gguf(target, path)
    whole = path.read_bytes()
    header = whole.index(b"tokenizer.chat_template") + 8192
    monkeypatch.setattr(description, "_GGUF_HEADER", header)
    path.write_bytes(whole[:header] + bytes(len(whole) - header))
    assert header < len(whole)
    assert look(path).architecture == "LlamaForCausalLM"


def test_an_object_store_serves_it_too(target, look, object_store, tmp_path):
    source = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
    for file in target.iterdir():
        storage.write_bytes(f"{source}/{file.name}", file.read_bytes())
    found = look(source, f"{source}-described")
    assert fingerprint(tmp_path, found.uri)
    assert look(source, f"{source}-described").version == found.version
