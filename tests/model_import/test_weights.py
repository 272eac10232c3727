"""Weights of every kind come out as safetensors that hold the same tensors; what is no weight is never run."""

import json
import pickle

import pytest
import tiny
import torch

from draft_model.errors import DraftModelError
from draft_model.model_import import is_weight
from draft_model.model_import.check import convert
from draft_model.model_import.stage import in_sandbox

from .case import CANONICAL, names, properties, same_weights


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def state(model):
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.pt", "weights.pth", "remote", "old", "nested", "shared"])
def test_pytorch_weights_become_safetensors(model, target, form, upload, bring):
    name, settings, wrap = "pytorch_model.bin", {}, dict
    if "." in form:
        name = form
    elif form == "old":
        settings["_use_new_zipfile_serialization"] = False
    elif form == "nested":
        wrap = lambda tensors: {"state_dict": tensors, "epoch": 3}  # noqa: E731
    elif form == "shared":
        wrap = lambda tensors: tensors | {"extra.weight": tensors["lm_head.weight"].T}  # noqa: E731
    torch.save(wrap(state(model)), model / name, **settings)
    (model / "model.safetensors").unlink()
    (model / "optimizer.pt").write_bytes(b"no weights")
    result = bring(pytorch_model_path=upload(model) if form == "remote" else str(model))
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert "PyTorch" in properties(result.uri)["conversion"]


def test_pytorch_shards(model, target, bring):
    tensors = list(state(model).items())
    parts = {"pytorch_model-00001-of-00002.bin": tensors[:20], "pytorch_model-00002-of-00002.bin": tensors[20:]}
    for name, part in parts.items():
        torch.save(dict(part), model / name)
    where = {tensor: name for name, part in parts.items() for tensor, _ in part}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (model / "model.safetensors").unlink()
    result = bring(pytorch_model_path=str(model))
    assert {name for name in names(result.uri) if is_weight(name)} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    assert same_weights(result.uri, target)


@pytest.mark.parametrize("form", ["plain pickle", "in a state_dict", "old"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_of_it_runs(model, form, tmp_path):
    path, made = model / "pytorch_model.bin", tmp_path / "was run"
    bomb = Malicious(str(made))
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({**state(model), "bomb": bomb}, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(DraftModelError, match="holds more than tensors, which is never run here"):
        in_sandbox("convert", [path], tmp_path)
    assert not made.exists()
    torch.load(path, weights_only=False)["bomb"].close() if form != "plain pickle" else pickle.loads(path.read_bytes())
    assert made.exists()  # it would have


def test_a_whole_module_and_other_objects_are_refused(model, only):
    torch.save(tiny.llama(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "save the model's state_dict" in only(model)
    torch.save({"a": 1}, model / "pytorch_model.bin")
    for content, said in ((None, "holds no state_dict"), (b"PK\3\4 torn", "is damaged or no PyTorch file")):
        if content:
            (model / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(DraftModelError, match=said):
            convert([model / "pytorch_model.bin"], model)


def test_several_files_without_an_index_get_one(model, target, bring):
    from safetensors.torch import save_file

    tensors = list(state(model).items())
    for name, part in (("a.safetensors", tensors[:20]), ("b.safetensors", tensors[20:])):
        save_file(dict(part), model / name, metadata={"format": "pt"})
    (model / "model.safetensors").unlink()
    result = bring(pytorch_model_path=str(model))
    assert "model.safetensors.index.json" in names(result.uri)
    assert same_weights(result.uri, target)


def test_one_file_of_another_name_and_training_files(model, target, bring):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "optimizer.safetensors").write_bytes(b"no weights")
    (model / "adapter_model.safetensors").write_bytes(b"no weights")
    result = bring(pytorch_model_path=str(model))
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
