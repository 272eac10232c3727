"""Weights of every kind come out as safetensors that hold the same tensors; what is no weight is never run."""

import json
import os
import pickle
import uuid

import pytest
import tiny
import torch

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.model_import import convert, is_weight, weights

from .case import CANONICAL, change_config, names, properties, same_weights


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def state(model):
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def pickled(model, name="pytorch_model.bin", wrap=lambda tensors: tensors, **settings):
    torch.save(wrap(state(model)), model / name, **settings)
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pytorch_weights_become_safetensors(model, target, name, bring):
    pickled(model, name)
    (model / "optimizer.pt").write_bytes(b"no weights")
    result = bring(pytorch_model_path=str(model))
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert "PyTorch" in properties(result.uri)["conversion"]


def test_pytorch_weights_in_an_object_store(model, target, object_store, bring):
    pickled(model)
    uri = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
    for path in model.iterdir():
        storage.write_bytes(f"{uri}/{path.name}", path.read_bytes())
    result = bring(pytorch_model_path=uri)
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)


@pytest.mark.parametrize("form", ["old", "nested", "shared"])
def test_pytorch_files_of_other_forms(model, target, form, bring):
    if form == "old":
        pickled(model, _use_new_zipfile_serialization=False)
    elif form == "nested":
        pickled(model, wrap=lambda tensors: {"state_dict": tensors, "epoch": 3})
    else:
        pickled(model, wrap=lambda tensors: tensors | {"extra.weight": tensors["lm_head.weight"].T})
    assert same_weights(bring(pytorch_model_path=str(model)).uri, target)


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


def test_safetensors_are_taken_where_there_are_both(model, tmp_path, bring):
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(str(tmp_path / "was run"))))
    assert bring(pytorch_model_path=str(model)).conversion == ""


@pytest.mark.parametrize("form", ["plain pickle", "in a state_dict", "old"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_of_it_runs(model, form, tmp_path, only):
    path, made = model / "pytorch_model.bin", tmp_path / "was run"
    bomb = Malicious(str(made))
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({**state(model), "bomb": bomb}, path, _use_new_zipfile_serialization=form != "old")
    (model / "model.safetensors").unlink()
    assert "holds more than tensors, which is never run here" in only(model)
    assert not made.exists()
    torch.load(path, weights_only=False)["bomb"].close() if form != "plain pickle" else pickle.loads(path.read_bytes())
    assert made.exists()  # it would have


def test_a_whole_module_and_other_objects_are_refused(model, only):
    torch.save(tiny.llama(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "save the model's state_dict" in only(model)
    torch.save({"a": 1}, model / "pytorch_model.bin")
    assert "holds no state_dict" in only(model)
    (model / "pytorch_model.bin").write_bytes(b"PK\3\4 torn")
    assert "is damaged or no PyTorch file" in only(model)


def test_the_converting_process_has_no_keys(model, tmp_path, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "OTHER_API_KEY"):
        monkeypatch.setenv(name, "secret")
    seen = {}

    class Done(Exception):
        pass

    def spy(*_, env, **__):
        seen.update(env)
        raise Done

    monkeypatch.setattr(convert.subprocess, "run", spy)
    with pytest.raises(Done):
        convert.convert("pickle", [model / "pytorch_model.bin"], tmp_path / "made")
    assert "secret" not in seen.values()
    assert seen["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("limit", [30_000, 60_000])
def test_large_files_are_split_into_shards_with_an_index(model, target, limit, tmp_path, bring, monkeypatch):
    monkeypatch.setattr(weights.canonical, "__defaults__", (limit,))
    result = bring(pytorch_model_path=str(model))
    shards = sorted(name for name in names(result.uri) if name.endswith(".safetensors"))
    assert len(shards) >= 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max(tensor.nbytes for tensor in state(model).values())
    assert all((tmp_path / "out" / name).stat().st_size <= max(limit, largest) + 4_000 for name in shards)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state(model).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state(model).values())
    assert same_weights(result.uri, target)
    assert result.parameter_count == sum(tensor.numel() for tensor in state(model).values())


def test_several_files_without_an_index_get_one(model, target, bring):
    from safetensors.torch import save_file

    tensors = list(state(model).items())
    for name, part in (("a.safetensors", tensors[:20]), ("b.safetensors", tensors[20:])):
        save_file(dict(part), model / name, metadata={"format": "pt"})
    (model / "model.safetensors").unlink()
    result = bring(pytorch_model_path=str(model))
    assert "model.safetensors.index.json" in names(result.uri)
    assert same_weights(result.uri, target)


def write_gguf(target, path):
    """The target as llama.cpp writes it: matrices in Q8_0, its own names, rotary halves interleaved."""
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads((target / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for ending, count in heads.items():
            if name.endswith(ending):
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        array = np.ascontiguousarray(array, dtype=np.float32)
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_is_dequantised_and_that_is_said(target, as_folder, tmp_path, bring):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "mine/tiny.gguf"
    path.parent.mkdir()
    write_gguf(target, path)
    result = bring(pytorch_model_path=str(path.parent if as_folder else path))
    assert names(result.uri) == CANONICAL
    assert properties(result.uri)["conversion"] == "dequantised from GGUF (Q8_0) to bfloat16"
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (result.uri, target)
        )
        difference = (one(tokens).logits - other(tokens).logits).abs().max() / other(tokens).logits.abs().max()
    assert difference < 0.05
    ours, theirs = AutoTokenizer.from_pretrained(result.uri), AutoTokenizer.from_pretrained(target)
    assert ours("alpha beta<|im_end|>").input_ids == theirs("alpha beta<|im_end|>").input_ids
    assert ours.chat_template == theirs.chat_template


def test_a_damaged_gguf_file(tmp_path, refusal):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF torn")
    (problem,) = refusal(pytorch_model_path=str(tmp_path / "tiny.gguf"))
    assert "is damaged or no GGUF file" in problem


def test_a_large_import_takes_headers_for_granted_only_where_they_fit(model):
    from safetensors.torch import save_file

    content = storage.LocalContent(model / "model.safetensors")
    header = weights.read_header(content)
    assert {name: tuple(tensor["shape"]) for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state(model).items()
    }
    save_file({"a": torch.ones(3)}, model / "model.safetensors")
    data = (model / "model.safetensors").read_bytes()
    for bad in (data[:-1], data + b"x", data.replace(b"[0,12]", b"[4,12]")):
        (model / "model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match=r"bytes|begin"):
            weights.read_header(content)


def test_a_checkpoint_that_contradicts_its_configuration(model, only):
    change_config(model, intermediate_size=64)
    problem = only(model)
    assert "model.layers.0.mlp.down_proj.weight [32, 48], where config.json asks for [32, 64]" in problem


def test_errors_of_conversion_are_the_users(tmp_path):
    with pytest.raises(DraftModelError, match=r"none\.bin is damaged"):
        convert.convert("pickle", [tmp_path / "none.bin"], tmp_path / "made")
