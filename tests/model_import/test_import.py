"""What can be a target model comes out as one canonical folder; what cannot is refused with the reason."""

import json
import os
import shutil
import subprocess
import sys
import uuid

import pytest
import tiny
import torch
import yaml

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.model_import import ImportConfig, is_weight, run
from draft_model.parameters import validate

torch.set_num_threads(1)
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CANONICAL = {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture
def model(target, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(target, tmp_path / "mine")


@pytest.fixture(scope="module")
def mlflow_store(target, tmp_path_factory):
    """An MLflow tracking store with the tiny target logged and registered by MLflow itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("mlflow")
    parts = {
        "model": AutoModelForCausalLM.from_pretrained(target),
        "tokenizer": AutoTokenizer.from_pretrained(target),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"file:{root}/runs")
        import mlflow

        with mlflow.start_run() as active:
            logged = mlflow.transformers.log_model(
                parts, name="model", task="text-generation", pip_requirements=[], registered_model_name="tiny"
            )
        saved = mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=str(root / "saved"))
        yield {"folder": saved, "models:": "models:/tiny/1", "runs:": f"runs:/{active.info.run_id}/model"}


def bring(tmp_path, output=None, **source):
    output = output or str(tmp_path / "out")
    return run(ImportConfig(output, tmp_path / "work", validate(source, ["import"])))


def refusal(tmp_path, **source):
    """The problems; nothing is published then."""
    with pytest.raises(DraftModelError) as caught:
        bring(tmp_path, **source)
    assert not storage.exists(str(tmp_path / "out"))
    return caught.value.problems


def only(tmp_path, folder):
    (problem,) = refusal(tmp_path, pytorch_model_path=str(folder))
    assert problem.startswith(f"target model {folder}: ")
    return problem


def names(uri):
    return {file.path for file in storage.read_manifest(uri, stage="import").files}


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_model(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def test_a_transformers_folder(target, tmp_path):
    from transformers import AutoTokenizer

    result = bring(tmp_path, pytorch_model_path=str(target))
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    tokenizer, original = AutoTokenizer.from_pretrained(result.uri), AutoTokenizer.from_pretrained(target)
    assert tokenizer("alpha beta").input_ids == original("alpha beta").input_ids
    assert tokenizer.chat_template == tiny.CHATML
    assert result.size == sum(file.stat().st_size for file in target.iterdir())


def test_the_manifest_says_what_was_imported(model, tmp_path):
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [el]\n---\n# Letters\n")
    result = bring(tmp_path, pytorch_model_path=str(model))
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


def test_what_no_later_stage_reads_stays_behind_and_the_source_stays_as_it_is(model, tmp_path):
    for name in (
        "pytorch_model.bin",
        "modeling_mine.py",
        "README.md",
        "optimizer.pt",
        "consolidated.safetensors",
    ):
        (model / name).write_bytes(b"---")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result = bring(tmp_path, pytorch_model_path=str(model))
    assert names(result.uri) == CANONICAL
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    copy = tmp_path / "out/config.json"
    copy.write_text("{}")  # the copy is no second name of the user's file
    assert (model / "config.json").read_bytes() == before["config.json"]


@pytest.mark.parametrize("place", ["model", "model_artifact/model", "data/model"])
def test_a_folder_that_has_the_model_below_it(target, place, tmp_path):
    shutil.copytree(target, tmp_path / "outer" / place)
    result = bring(tmp_path, pytorch_model_path=str(tmp_path / "outer"))
    assert names(result.uri) == CANONICAL
    assert result.source == str(tmp_path / "outer")


def test_sharded_weights_come_with_their_index(model, target, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="100KB")
    result = bring(tmp_path, pytorch_model_path=str(model))
    shards = {name for name in names(result.uri) if is_weight(name)}
    assert len(shards) >= 3
    assert "model.safetensors.index.json" in shards
    assert names(result.uri) == (CANONICAL - {"model.safetensors"}) | shards
    assert same_weights(result.uri, target)
    assert result.parameter_count == sum(weight.numel() for weight in loaded.parameters())


@pytest.mark.parametrize("below", ["", "/model"])
def test_from_an_object_store_to_an_object_store(target, below, object_store, tmp_path):
    prefix = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
    for path in target.iterdir():
        storage.write_bytes(f"{prefix}/mine{below}/{path.name}", path.read_bytes())
    result = bring(tmp_path, output=f"{prefix}/out", pytorch_model_path=f"{prefix}/mine")
    assert names(f"{prefix}/out") == CANONICAL
    assert same_weights(storage.fetch(result.uri, tmp_path / "back"), target)


@pytest.mark.parametrize("kind", ["folder", "models:", "runs:"])
def test_a_model_that_mlflow_logged(mlflow_store, kind, target, tmp_path):
    result = bring(tmp_path, mlflow_model_path=mlflow_store[kind])
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    assert result.source == mlflow_store[kind]


@pytest.mark.parametrize(
    ("model_at", "tokenizer_at"), [("model", "components/tokenizer"), ("data/model", "data/tokenizer")]
)
def test_the_layouts_of_mlflow(target, model_at, tokenizer_at, tmp_path):
    root = tmp_path / "mlflow"
    for place, files in ((model_at, CANONICAL - TOKENIZER), (tokenizer_at, TOKENIZER)):
        (root / place).mkdir(parents=True)
        for name in files:
            shutil.copyfile(target / name, root / place / name)
    (root / "MLmodel").write_text(yaml.safe_dump({"flavors": {"transformers": {"task": "text-generation"}}}))
    assert names(bring(tmp_path, mlflow_model_path=str(root)).uri) == CANONICAL


def test_a_model_that_mlflow_cannot_find(mlflow_store, tmp_path):
    (problem,) = refusal(tmp_path, mlflow_model_path="models:/nothing/1")
    assert problem.startswith("mlflow_model_path: models:/nothing/1 cannot be downloaded: ")


def test_the_other_parameter_is_named_when_they_are_mixed_up(model, tmp_path):
    (problem,) = refusal(tmp_path, mlflow_model_path=str(model))
    assert problem.startswith("mlflow_model_path: ")
    assert "pytorch_model_path" in problem
    (model / "MLmodel").write_text("flavors: {transformers: {}}")
    (problem,) = refusal(tmp_path, pytorch_model_path=str(model))
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
def test_an_mlmodel_file_of_another_kind_or_damaged(model, content, said, tmp_path):
    (model / "MLmodel").write_text(content)
    (problem,) = refusal(tmp_path, mlflow_model_path=str(model))
    assert problem.startswith(f"mlflow_model_path: {model} ")
    assert said in problem


def test_mlflow_without_a_model_below(tmp_path):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/MLmodel").write_text("flavors: {transformers: {}}")
    (problem,) = refusal(tmp_path, mlflow_model_path=str(tmp_path / "mlflow"))
    assert "holds no model with a config.json" in problem


def test_a_folder_without_a_model_names_the_places_that_were_tried(model, tmp_path):
    (model / "config.json").unlink()
    (problem,) = refusal(tmp_path, pytorch_model_path=str(model))
    assert problem.startswith(f"pytorch_model_path: {model} has no config.json")
    assert all(place in problem for place in ("`model/`", "`model_artifact/model/`", "`data/model/`"))


@pytest.mark.parametrize("uri", ["/none", "s3://{bucket}/none"])
def test_a_folder_that_is_not_there(uri, object_store, tmp_path):
    uri = uri.format(bucket=object_store.bucket)
    (problem,) = refusal(tmp_path, pytorch_model_path=uri)
    assert problem.startswith(f"pytorch_model_path: {uri} ")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}", b""])
def test_a_config_that_is_no_json_object(model, content, tmp_path):
    (model / "config.json").write_bytes(content)
    assert "its config.json cannot be read: " in only(tmp_path, model)


def test_no_tokenizer(model, tmp_path):
    (model / "tokenizer.json").unlink()
    assert "it has no tokenizer (tokenizer.json," in only(tmp_path, model)


def test_no_weights(model, tmp_path):
    (model / "model.safetensors").unlink()
    assert only(tmp_path, model).endswith("it has no weights as safetensors")


def test_pickled_weights_are_never_opened_and_the_way_out_is_named(model, tmp_path):
    weights = (model / "model.safetensors").rename(model / "pytorch_model.bin")
    weights.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    assert "it has pytorch_model.bin: save it with safe_serialization=True" in only(tmp_path, model)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1, "pointer"])
def test_damaged_weights(model, kept, tmp_path):
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" if kept == "pointer" else data[:kept])
    assert "model.safetensors is damaged or cut short: " in only(tmp_path, model)


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
def test_an_index_that_leads_nowhere(model, index, said, tmp_path):
    text = index if isinstance(index, str) else json.dumps(index)
    (model / "model.safetensors.index.json").write_text(text)
    assert said in only(tmp_path, model)


def test_everything_wrong_with_a_model_is_told_at_once(model, tmp_path):
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors").write_bytes(b"")
    change_config(model, num_hidden_layers=2)
    assert len(refusal(tmp_path, pytorch_model_path=str(model))) == 3


def test_too_few_layers(model, tmp_path):
    change_config(model, num_hidden_layers=3)
    problem = only(tmp_path, model)
    assert "3 layers" in problem
    assert "at least 4 layers" in problem


def test_an_encoder_is_refused(model, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=48)
    replace_model(model, BertForMaskedLM(config))
    assert "model_type 'bert' is no decoder for text generation" in only(tmp_path, model)


def test_an_encoder_with_a_decoder_is_refused(model, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=6, num_heads=4)
    replace_model(model, T5ForConditionalGeneration(config))
    problem = only(tmp_path, model)
    assert "'t5'" in problem
    assert "decoder-only" in problem


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(model, tmp_path):
    change_config(model, model_type="mine", architectures=["Mine"],
                  auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Mine"})  # fmt: skip
    (model / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    assert "trust_remote_code" in only(tmp_path, model)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "mine"}, {"num_attention_heads": 0}, {"hidden_size": "many"}, {"hidden_act": "mine"}],
)
def test_a_config_that_transformers_cannot_use(model, changes, tmp_path):
    change_config(model, **changes)
    only(tmp_path, model)


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
