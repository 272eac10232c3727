"""What can be a target model comes out as one canonical folder; what cannot is refused with the reason."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.model_import import ImportConfig, is_weight, run
from draft_model.model_import.sources import File, Listing, Source, resolve
from draft_model.model_import.stage import _licence
from draft_model.parameters import Parameters

from .case import CANONICAL, change_config, names, same_weights


def test_a_transformers_folder(target, model, bring):
    from transformers import AutoTokenizer

    for name in ("pytorch_model.bin", "modeling_mine.py", "optimizer.pt", "consolidated.safetensors",
                 "tokenizer_extra.json"):  # fmt: skip
        (model / name).write_bytes(b"---")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [el]\n---\n# Letters\n")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result = bring(pytorch_model_path=str(model))
    assert names(result.uri) == CANONICAL
    assert same_weights(result.uri, target)
    tokenizer, original = AutoTokenizer.from_pretrained(result.uri), AutoTokenizer.from_pretrained(target)
    assert tokenizer("alpha beta").input_ids == original("alpha beta").input_ids
    assert tokenizer.chat_template == tiny.CHATML
    assert result.size == sum(file.stat().st_size for file in target.iterdir())
    vocabulary = json.loads(before["config.json"])["vocab_size"]
    count = sum(weight.numel() for weight in tiny.llama(vocab_size=vocabulary).parameters())
    said = {"source": str(model), "revision": "", "licence": "apache-2.0", "architecture": "LlamaForCausalLM",
            "parameter_count": count, "max_positions": 512, "quantization": ""}  # fmt: skip
    properties = storage.read_manifest(result.uri, stage="import").properties
    assert {name: properties[name] for name in said} == said
    assert {name: getattr(result, name) for name in said} == said
    assert properties["parameters"]["pytorch_model_path"] == str(model)
    (model.parent / "out/config.json").write_text("{}")  # the copy is no second name of the user's file
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize(
    ("card", "licence"),
    [("license: mit", "mit"), ("license:\n- mit\n- other", "mit"), ("license: 'gpl-3.0'", "gpl-3.0"),
     ("licence: mit", ""), ("a: &a [x, x]\nlicense: *a", "")],
)  # fmt: skip
def test_the_licence_of_a_model_card(tmp_path, card, licence):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\ntext")
    listing = Listing({"README.md": File(1, "")}, lambda names: {name: tmp_path / name for name in names})
    assert _licence(Source("", "", listing, {"README.md": "README.md"})) == licence


@pytest.mark.parametrize("below", ["model", "model_artifact/model", "data/model"])
def test_a_folder_that_has_the_model_below_it(target, below, tmp_path):
    shutil.copytree(target, tmp_path / "outer" / below)
    source = resolve(Parameters(pytorch_model_path=str(tmp_path / "outer")), tmp_path / "work")
    assert source.paths == {name: f"{below}/{name}" for name in CANONICAL}


def test_named_chat_templates_come_along(model, bring):
    from transformers import AutoTokenizer

    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (model / "additional_chat_templates/.hidden").write_text("no")
    result = bring(pytorch_model_path=str(model))
    assert names(result.uri) == CANONICAL | {"additional_chat_templates/tool_use.jinja"}
    templates = AutoTokenizer.from_pretrained(result.uri).chat_template
    assert templates == {"default": tiny.CHATML, "tool_use": "tools"}


def test_nothing_that_would_run_code_is_published(model, bring):
    code = {"auto_map": {"AutoConfig": "code.Config"}, "attn_implementation": "org/kernel"}
    change_config(model, **code, _attn_implementation="org/kernel", nested={"auto_map": 1, "kept": 2})
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    result = bring(pytorch_model_path=str(model))
    config, tokenizer = (storage.read_bytes(f"{result.uri}/{name}") for name in ("config.json", path.name))
    assert json.loads(config)["nested"] == {"kept": 2}
    assert b"auto_map" not in config + tokenizer
    assert b"kernel" not in config


@pytest.mark.parametrize("remote", [False, True])
def test_the_same_content_again_is_not_copied_and_another_is(model, remote, upload, tmp_path, bring):
    uri, output = upload(model) if remote else str(model), tmp_path / "out"
    first = bring(pytorch_model_path=uri)
    assert not first.reused
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    again = bring(pytorch_model_path=uri)
    assert again.reused
    assert again.uri == first.uri
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output / "model.safetensors").unlink()  # a copy that is not whole is made whole
    assert not bring(pytorch_model_path=uri).reused
    assert same_weights(output, model)
    change_config(model, rms_norm_eps=1e-3)
    (model / "added_tokens.json").write_text("{}")
    storage.write_bytes(f"{uri}/config.json", (model / "config.json").read_bytes())
    bring(pytorch_model_path=uri)
    assert json.loads((output / "config.json").read_text())["rms_norm_eps"] == 1e-3
    assert (output / "added_tokens.json").exists() == (not remote)


def test_runs_share_models_by_their_content(model, object_store, tmp_path, bring):
    root = f"s3://{object_store.bucket}/{tmp_path.name}"
    first = bring(root=root, pytorch_model_path=str(model))
    assert first.uri.startswith(f"{root}/models/")
    assert not storage.exists(str(tmp_path / "out"))
    assert bring(root=root, pytorch_model_path=str(model)).reused
    storage.remove(first.uri)  # deleted since
    again = bring(root=root, pytorch_model_path=str(model))
    assert (again.uri, again.reused) == (first.uri, False)
    storage.remove_manifest(first.uri)  # left half-written
    assert not bring(root=root, pytorch_model_path=str(model)).reused
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))  # the same name and size
    other = bring(root=root, pytorch_model_path=str(model))
    assert other.uri != first.uri
    assert same_weights(storage.fetch(other.uri, tmp_path / "back"), model)
    assert storage.is_whole(first.uri, storage.read_manifest(first.uri))


def test_two_runs_at_once_leave_one_whole_model(model, tmp_path):
    parameters = Parameters(pytorch_model_path=str(model))

    def one(number):
        return run(ImportConfig("", tmp_path / f"work-{number}", parameters, root=str(tmp_path / "root"))).uri

    with ThreadPoolExecutor(3) as pool:
        uris = set(pool.map(one, range(3)))
    assert len(uris) == 1
    assert same_weights(storage.fetch(uris.pop(), tmp_path), model)


@pytest.mark.parametrize(("below", "scheme"), [("", "minio"), ("/model", "s3")])
def test_weights_stay_in_the_object_store_where_it_can_copy_them(model, below, scheme, upload, tmp_path, bring):
    uri = upload(model, below).replace("s3://", f"{scheme}://")
    result = bring(output=f"{uri}-out", pytorch_model_path=uri)
    assert names(f"{uri}-out") == CANONICAL
    assert not list(tmp_path.glob(f"work/source{below}/model.safetensors"))
    assert same_weights(storage.fetch(result.uri, tmp_path / "back"), model)
    storage.write_bytes(f"{uri}{below}/model.safetensors", (model / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(DraftModelError, match="damaged or cut short"):
        bring(output=f"{uri}-damaged", pytorch_model_path=uri)


def test_links_lead_nowhere_but_into_the_folder_or_the_hubs_cache(model, tmp_path, bring, refusal):
    secret = tmp_path / "credentials"
    secret.write_text("secret")
    (model / "added_tokens.json").symlink_to(secret)
    (problem,) = refusal(pytorch_model_path=str(model))
    assert "added_tokens.json is a link that leads out of the folder" in problem
    (model / "added_tokens.json").unlink()
    blobs, snapshot = tmp_path / "models--org--name/blobs", tmp_path / "models--org--name/snapshots/c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert names(bring(pytorch_model_path=str(snapshot)).uri) == CANONICAL


MLMODEL = "flavors: {transformers: {}}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("flavors: {sklearn: {}, onnx: {}}", "has the flavours onnx, sklearn; allowed: transformers"),
        ("flavors: {}", "has the flavours none; allowed: transformers"),
        ("flavors: [", "cannot be read"),
        ("", "cannot be read"),
        ("just words", "cannot be read"),
        ("a: &a [x]\nflavors: *a", "it has YAML aliases"),
        ("[" * 5000, "cannot be read"),
        (None, "pytorch_model_path"),
        (MLMODEL, "holds no model with a config.json"),
    ],
)
def test_an_mlmodel_file_of_another_kind_or_damaged(tmp_path, content, said, refusal):
    if content is not None:
        (tmp_path / "MLmodel").write_text(content)
    (problem,) = refusal(mlflow_model_path=str(tmp_path))
    assert problem.startswith(f"mlflow_model_path: {tmp_path} ")
    assert said in problem


def test_a_folder_of_another_kind_names_what_is_looked_for(model, object_store, refusal):
    (model / "MLmodel").write_text(MLMODEL)
    (problem,) = refusal(pytorch_model_path=str(model))
    assert problem.startswith("pytorch_model_path: ")
    assert "use mlflow_model_path" in problem
    (model / "MLmodel").unlink()
    (model / "config.json").rename(model / "model.gguf")
    (problem,) = refusal(pytorch_model_path=str(model))
    assert problem.startswith(f"pytorch_model_path: {model} has no config.json")
    assert all(text in problem for text in ("`model/`", "`model_artifact/model/`", "`data/model/`", "GGUF"))
    for uri in ("/none", f"s3://{object_store.bucket}/none"):
        (problem,) = refusal(pytorch_model_path=uri)
        assert problem.startswith(f"pytorch_model_path: {uri}")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "model.safetensors", "b": "two.safetensors"}}, "two.safetensors is missing, which "),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "names ../elsewhere.safetensors, which is not beside it"),
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
    (model / "model.safetensors").rename(model / "model.gguf")
    change_config(model, num_hidden_layers=2)
    problems = refusal(pytorch_model_path=str(model))
    assert len(problems) == 3
    assert any("GGUF weights" in problem for problem in problems)


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(model, tmp_path, only):
    change_config(model, model_type="mine", architectures=["Mine"],
                  auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Mine"})  # fmt: skip
    (model / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    assert "trust_remote_code" in only(model)
    assert not (tmp_path / "was run").exists()


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
