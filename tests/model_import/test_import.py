"""What can be a target model comes out as one canonical folder; what cannot is refused with the reason."""

import json
import os
import shutil
import subprocess
import sys
import uuid

import pytest
import tiny

from draft_model import storage
from draft_model.model_import import is_weight

from .case import CANONICAL, change_config, names, same_weights


def replace_model(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def test_a_transformers_folder(target, bring):
    from transformers import AutoTokenizer

    result = bring(pytorch_model_path=str(target))
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    tokenizer, original = AutoTokenizer.from_pretrained(result.uri), AutoTokenizer.from_pretrained(target)
    assert tokenizer("alpha beta").input_ids == original("alpha beta").input_ids
    assert tokenizer.chat_template == tiny.CHATML
    assert result.size == sum(file.stat().st_size for file in target.iterdir())


def test_the_manifest_says_what_was_imported(model, bring):
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [el]\n---\n# Letters\n")
    result = bring(pytorch_model_path=str(model))
    count = sum(weight.numel() for weight in tiny.llama(vocab_size=_vocabulary(model)).parameters())
    said = {
        "source": str(model),
        "revision": "",
        "licence": "apache-2.0",
        "architecture": "LlamaForCausalLM",
        "parameter_count": count,
    }
    properties = storage.read_manifest(result.uri, stage="import").properties
    assert {name: properties[name] for name in said} == said
    assert {name: getattr(result, name) for name in said} == said
    assert properties["parameters"]["pytorch_model_path"] == str(model)


def _vocabulary(folder):
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_what_no_later_stage_reads_stays_behind_and_the_source_stays_as_it_is(model, tmp_path, bring):
    for name in (
        "pytorch_model.bin",
        "modeling_mine.py",
        "README.md",
        "optimizer.pt",
        "consolidated.safetensors",
    ):
        (model / name).write_bytes(b"---")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result = bring(pytorch_model_path=str(model))
    assert names(result.uri) == CANONICAL
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    copy = tmp_path / "out/config.json"
    copy.write_text("{}")  # the copy is no second name of the user's file
    assert (model / "config.json").read_bytes() == before["config.json"]


@pytest.mark.parametrize("place", ["model", "model_artifact/model", "data/model"])
def test_a_folder_that_has_the_model_below_it(target, place, tmp_path, bring):
    shutil.copytree(target, tmp_path / "outer" / place)
    result = bring(pytorch_model_path=str(tmp_path / "outer"))
    assert names(result.uri) == CANONICAL
    assert result.source == str(tmp_path / "outer")


def test_sharded_weights_come_with_their_index(model, target, bring):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="100KB")
    result = bring(pytorch_model_path=str(model))
    shards = {name for name in names(result.uri) if is_weight(name)}
    assert len(shards) >= 3
    assert "model.safetensors.index.json" in shards
    assert names(result.uri) == (CANONICAL - {"model.safetensors"}) | shards
    assert same_weights(result.uri, target)
    assert result.parameter_count == sum(weight.numel() for weight in loaded.parameters())


@pytest.mark.parametrize("remote", [False, True])
def test_the_same_source_again_is_a_look_at_the_manifest_and_another_is_copied(
    model, remote, object_store, tmp_path, bring
):
    uri, output = str(model), str(tmp_path / "out")
    if remote:
        uri = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
        for path in model.iterdir():
            storage.write_bytes(f"{uri}/{path.name}", path.read_bytes())
    first = bring(pytorch_model_path=uri)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert bring(pytorch_model_path=uri) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out/model.safetensors").unlink()  # a copy that is not whole is made whole
    assert bring(pytorch_model_path=uri) == first
    assert same_weights(output, model)
    change_config(model, rms_norm_eps=1e-3)
    storage.write_bytes(f"{uri}/config.json", (model / "config.json").read_bytes())
    bring(pytorch_model_path=uri)
    assert json.loads((tmp_path / "out/config.json").read_text())["rms_norm_eps"] == 1e-3


@pytest.mark.parametrize("below", ["", "/model"])
@pytest.mark.parametrize("scheme", ["s3", "minio"])
def test_from_an_object_store_to_an_object_store(target, below, scheme, object_store, tmp_path, bring):
    prefix = f"{scheme}://{object_store.bucket}/{uuid.uuid4().hex}"
    for path in target.iterdir():
        storage.write_bytes(f"{prefix}/mine{below}/{path.name}", path.read_bytes())
    result = bring(output=f"{prefix}/out", pytorch_model_path=f"{prefix}/mine")
    assert names(f"{prefix}/out") == CANONICAL
    assert same_weights(storage.fetch(result.uri, tmp_path / "back"), target)


def test_the_other_parameter_is_named_when_they_are_mixed_up(model, refusal):
    (problem,) = refusal(mlflow_model_path=str(model))
    assert problem.startswith("mlflow_model_path: ")
    assert "pytorch_model_path" in problem
    (model / "MLmodel").write_text("flavors: {transformers: {}}")
    (problem,) = refusal(pytorch_model_path=str(model))
    assert problem.startswith("pytorch_model_path: ")
    assert "use mlflow_model_path" in problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("flavors: {sklearn: {}, onnx: {}}", "has the flavours onnx, sklearn; allowed: transformers"),
        ("flavors: {}", "has the flavours none; allowed: transformers"),
        ("flavors: [", "cannot be read"),
        ("", "cannot be read"),
        ("just words", "cannot be read"),
    ],
)
def test_an_mlmodel_file_of_another_kind_or_damaged(model, content, said, refusal):
    (model / "MLmodel").write_text(content)
    (problem,) = refusal(mlflow_model_path=str(model))
    assert problem.startswith(f"mlflow_model_path: {model} ")
    assert said in problem


def test_mlflow_without_a_model_below(tmp_path, refusal):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/MLmodel").write_text("flavors: {transformers: {}}")
    (problem,) = refusal(mlflow_model_path=str(tmp_path / "mlflow"))
    assert "holds no model with a config.json" in problem


def test_a_folder_without_a_model_names_the_places_that_were_tried(model, refusal):
    (model / "config.json").unlink()
    (problem,) = refusal(pytorch_model_path=str(model))
    assert problem.startswith(f"pytorch_model_path: {model} has no config.json")
    assert all(place in problem for place in ("`model/`", "`model_artifact/model/`", "`data/model/`"))


@pytest.mark.parametrize("uri", ["/none", "s3://{bucket}/none"])
def test_a_folder_that_is_not_there(uri, object_store, refusal):
    uri = uri.format(bucket=object_store.bucket)
    (problem,) = refusal(pytorch_model_path=uri)
    assert problem.startswith(f"pytorch_model_path: {uri} ")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}", b""])
def test_a_config_that_is_no_json_object(model, content, only):
    (model / "config.json").write_bytes(content)
    assert "its config.json cannot be read: " in only(model)


def test_no_tokenizer(model, only):
    (model / "tokenizer.json").unlink()
    assert "it has no tokenizer (tokenizer.json," in only(model)


def test_no_weights(model, only):
    (model / "model.safetensors").unlink()
    assert "it has no weights (safetensors, " in only(model)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1, "pointer"])
def test_damaged_weights(model, kept, only):
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" if kept == "pointer" else data[:kept])
    assert "model.safetensors is damaged or cut short: " in only(model)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            {"weight_map": {"a": "model.safetensors", "b": "two.safetensors"}},
            "two.safetensors is missing, which ",
        ),
        (
            {"weight_map": {"a": "../elsewhere.safetensors"}},
            "names ../elsewhere.safetensors, which is not beside it",
        ),
        ({}, "its model.safetensors.index.json cannot be read"),
        ([], "its model.safetensors.index.json cannot be read"),
        ("{", "its model.safetensors.index.json cannot be read"),
    ],
)
def test_an_index_that_leads_nowhere(model, index, said, only):
    text = index if isinstance(index, str) else json.dumps(index)
    (model / "model.safetensors.index.json").write_text(text)
    assert said in only(model)


def test_everything_wrong_with_a_model_is_told_at_once(model, refusal):
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors").write_bytes(b"")
    change_config(model, num_hidden_layers=2)
    assert len(refusal(pytorch_model_path=str(model))) == 3


def test_too_few_layers(model, only):
    change_config(model, num_hidden_layers=3)
    problem = only(model)
    assert "3 layers" in problem
    assert "at least 4 layers" in problem


def test_an_encoder_is_refused(model, only):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=48)
    replace_model(model, BertForMaskedLM(config))
    assert "(bert) is no decoder-only model" in only(model)


def test_an_encoder_with_a_decoder_is_refused(model, only):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=6, num_heads=4)
    replace_model(model, T5ForConditionalGeneration(config))
    problem = only(model)
    assert "'t5'" in problem
    assert "decoder-only" in problem


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(model, tmp_path, only):
    change_config(model, model_type="mine", architectures=["Mine"],
                  auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Mine"})  # fmt: skip
    (model / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    assert "trust_remote_code" in only(model)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "mine"}, {"num_attention_heads": 0}, {"hidden_size": "many"}, {"hidden_act": "mine"}],
)
def test_a_config_that_transformers_cannot_use(model, changes, only):
    change_config(model, **changes)
    only(model)


def test_the_hub_that_cannot_be_reached_is_told_without_the_token(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_never_shown"}
    command = ["import", "--huggingface_id", "org/name@v1", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", "from draft_model.cli import main; main()", *command],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: huggingface_id: org/name@v1 cannot be downloaded: ")
    assert "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_never_shown" not in done.stdout + done.stderr
