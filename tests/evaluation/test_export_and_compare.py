"""One draft in every engine's format: the same draft wherever it is read, and what each engine's own code wants."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from command import draft_model
from evaluation.conftest import Trained
from model_import.hub_server import TOKEN, Hub
from safetensors.torch import load_file, save_file
from training.case import Trainer

from draft_model import drafts, engine, storage
from draft_model.cli import cli
from draft_model.errors import DraftModelError
from draft_model.evaluation.compare import CompareConfig, compare
from draft_model.export import FORMATS, export
from draft_model.parameters import Parameters

ROOT = Path(__file__).parents[2]
LAYERS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained draft in each format, and as SpecForge leaves it: with the target's embeddings."""
    root = tmp_path_factory.mktemp("exported")
    for form in FORMATS:
        export(str(trained.final), form, str(root / form), root / f"work-{form}", target=trained.inputs.model)
    shutil.copytree(
        root / "sglang", root / "specforge", ignore=shutil.ignore_patterns("manifest.json", "training.json")
    )
    foreign = {key: value for key, value in config(root / "specforge").items() if key != "target_model_type"}
    (root / "specforge/config.json").write_text(json.dumps(foreign))
    tensors = load_file(root / "specforge/model.safetensors")
    embeddings = torch.zeros(len(tensors["t2d"]), tensors["norm.weight"].numel())
    save_file({**tensors, "embed_tokens.weight": embeddings}, root / "specforge/model.safetensors")
    return root


def config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_an_export_is_a_whole_folder_with_the_tokenizer(exported):
    for form in FORMATS:
        manifest = storage.read_manifest(str(exported / form), stage="export")
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.path for file in manifest.files}
        assert manifest.properties["format"] == form
        storage.fetch(str(exported / form), exported)


def test_each_engine_finds_the_feature_layers_in_its_own_counting(trained, exported):
    # vLLM 0.32, v1/worker/gpu_model_runner.py, _get_eagle3_aux_layers_from_config: top level, layers that ran.
    # SGLang 0.5.23, srt/model_executor/model_runner_components/spec_aux_hidden_state.py reads eagle_config's;
    # srt/models/llama.py, set_eagle3_layers_to_capture, adds one to each.
    ours = config(trained.final)
    assert config(exported / "vllm")[LAYERS] == config(exported / "speculators")[LAYERS] == ours[LAYERS]
    assert config(exported / "sglang")["eagle_config"][LAYERS] == [layer - 1 for layer in ours[LAYERS]]
    assert LAYERS not in config(exported / "sglang")
    assert LAYERS not in config(exported / "vllm")["eagle_config"]
    for form in ("vllm", "sglang"):
        assert config(exported / form)["architectures"] == ["LlamaForCausalLMEagle3"]


LAYER = [
    "hidden_norm", "input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
]  # fmt: skip
OTHERS = {"d2t", "t2d", "fc.weight", "lm_head.weight", "norm.weight"}
# vLLM 0.32, model_executor/models/llama_eagle3.py, hf_to_vllm_mapper: `midlayer.` is `layers.0.`.
# SGLang 0.5.23, srt/models/llama_eagle3.py, legacy_name_map in load_weights: the same; it skips what it does not know.
# speculators 0.9.0, models/eagle3/core.py: `layers.0`; embeddings and the verifier's head may lack.
NAMES = {
    form: OTHERS | {f"{'layers.0' if form == 'speculators' else 'midlayer'}.{name}.weight" for name in LAYER}
    for form in FORMATS
}
# What the engines read of config.json, beside the layers: SGLang 0.5.23, srt/configs/model_config.py and
# srt/models/llama_eagle3.py; vLLM 0.32, transformers_utils/configs/eagle.py and model_executor/models/llama_eagle3.py.
KEYS = {
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "vocab_size", "draft_vocab_size",
    "rope_theta", "rope_parameters", "tie_word_embeddings", "hidden_act",
}  # fmt: skip


def test_tensors_have_the_names_that_each_format_wants(trained, exported):
    ours = load_file(trained.final / "model.safetensors")
    for form in FORMATS:
        found = load_file(exported / form / "model.safetensors")
        assert found.keys() == NAMES[form]
        layer = "layers.0." if form == "speculators" else "midlayer."
        assert all(torch.equal(found[name.replace("midlayer.", layer)], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_the_configuration_has_the_keys_that_each_engine_reads(exported, form):
    found = config(exported / form)
    assert found.keys() >= KEYS
    assert None not in found.values()
    assert (found["model_type"], found["num_hidden_layers"]) == ("llama", 1)


def by_their_own_code(peer, script, *arguments):
    """What a program under engines/ prints last, run by the Python that has the peer's package."""
    python = Path(os.environ.get(engine.PYTHON) or "-") if peer == "vllm" else ROOT / f".venv-{peer}/bin/python"
    if not python.exists():
        target = "check-serving" if peer == "vllm" else "bench-peers"
        pytest.skip(f"`make {target}` installs {peer}, which needs no GPU, and runs this with it")
    command = [python, Path(__file__).parent / "engines" / script, *arguments]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_vllms_own_code_reads_both_of_its_formats(trained, exported):
    target, ours = trained.inputs.model, config(trained.final)
    arguments = (target, exported / "vllm", exported / "speculators")
    found = by_their_own_code("vllm", "read_vllm.py", *map(str, arguments))
    expected = {
        "layers": ours[LAYERS], "draft": ours["draft_vocab_size"], "vocabulary": ours["vocab_size"],
        "hidden": ours["hidden_size"], "heads": ours["num_attention_heads"], "head_dim": ours["head_dim"],
        "context": ours["max_position_embeddings"], "rope": ours["rope_theta"],
    }  # fmt: skip
    assert found["drafts"] == [
        {"architectures": ["LlamaForCausalLMEagle3"], **expected},
        {"architectures": ["Eagle3LlamaForCausalLM"], **expected},
    ]
    speculative = {"method": "eagle3", "model": str(exported / "speculators"), "num_speculative_tokens": 3}
    assert found["served"] == [target, speculative]


@pytest.fixture(scope="module")
def by_speculators(exported, tmp_path_factory):
    """What speculators' own model code read of its export, and where it saved the model again."""
    saved = tmp_path_factory.mktemp("speculators") / "saved"
    found = by_their_own_code("speculators", "speculators_round_trip.py", exported / "speculators", saved)
    return found, saved


def test_speculators_own_code_reads_its_format(trained, by_speculators):
    ours = config(trained.final)
    assert by_speculators[0] == {
        "class": "Eagle3SpeculatorConfig", "layers": ours[LAYERS], "draft": ours["draft_vocab_size"],
        "hidden": ours["hidden_size"], "heads": ours["num_attention_heads"], "head_dim": ours["head_dim"],
        "vocabulary": ours["vocab_size"], "verifier": trained.inputs.model, "rope": ours["rope_theta"],
        "norms": [False, False, False], "fc_norm": False, "model": "Eagle3DraftModel",
    }  # fmt: skip


def compared(trained, work, *drafts, model="", **settings):
    """The comparison of drafts on the validation split's prompts."""
    model = model or trained.inputs.model
    return compare(CompareConfig(str(model), trained.inputs.dataset, tuple(drafts), work, Parameters(**settings)))


def same_rounds(trained, tmp_path, *drafts):
    """Compares drafts on the same prompts; they must be the same draft."""
    settings = {"evaluation_conversations": 3, "evaluation_max_new_tokens": 8, "num_speculative_tokens": 2}
    records = compared(trained, tmp_path, *drafts, **settings)
    assert [record["draft"] for record in records] == list(drafts)
    alike = [{key: record[key] for key in ("rounds", "accepted", "identical")} for record in records]
    assert alike == alike[:1] * len(drafts)
    assert alike[0]["identical"]
    assert alike[0]["rounds"] > 0


def test_a_draft_that_speculators_saved_is_compared(trained, by_speculators, tmp_path):
    same_rounds(trained, tmp_path, str(trained.final), str(by_speculators[1]))


def test_a_draft_that_specforge_saved_is_compared(trained, tmp_path):
    saved = tmp_path / "saved"
    said = by_their_own_code("specforge", "specforge_round_trip.py", trained.final, saved)
    assert said == {"missing": ["embed_tokens.weight"], "unexpected": []}
    same_rounds(trained, tmp_path / "work", str(trained.final), str(saved))


def test_drafts_of_every_format_decode_alike(trained, exported, tmp_path):
    drafts = (str(trained.final), *(str(exported / name) for name in (*FORMATS, "specforge")))
    same_rounds(trained, tmp_path, *drafts)


def test_a_target_that_was_not_imported_is_looked_at_as_the_import_does(trained, tmp_path):
    stranger = Path(shutil.copytree(trained.inputs.model, tmp_path / "model"))
    (stranger / "manifest.json").unlink()
    spoilt = json.dumps({**config(stranger), "attn_implementation": "org/kernel", "auto_map": {"AutoConfig": "x.Y"}})
    (stranger / "config.json").write_text(spoilt)
    given = {"model": stranger, "evaluation_conversations": 2, "evaluation_max_new_tokens": 4}
    (record,) = compared(trained, tmp_path / "w", str(trained.final), **given)
    assert record["identical"]
    assert (stranger / "config.json").read_text() == spoilt
    (stranger / "tokenizer.json").write_text("{")
    with pytest.raises(DraftModelError, match=r"--model: given .* its tokenizer cannot be loaded"):
        compared(trained, tmp_path / "w", str(trained.final), **given)


def test_the_command_shows_two_drafts_side_by_side(trained, exported, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "alpha beta", "category": "letters"}\n', encoding="utf-8")
    done = CliRunner().invoke(
        cli,
        ["compare", "--model", trained.inputs.model, str(trained.final), str(exported / "speculators"),
         "--evaluation-prompts", str(prompts), "--evaluation-max-new-tokens", "6", "--chat_template", "qwen",
         "--json", str(tmp_path / "compared.json")],
        catch_exceptions=False, env={"COLUMNS": "300"},
    )  # fmt: skip
    assert done.exit_code == 0
    records = json.loads((tmp_path / "compared.json").read_text(encoding="utf-8"))
    cells = [cell.strip() for line in done.stdout.splitlines() for cell in line.split("│")]
    assert "tokens per second, batch size 16" in cells
    assert cells.count(f"{records[0]['acceptance_length']:.3f}") >= 2
    assert "length, letters" in cells
    assert "cumulative acceptance at 3" in cells


def test_a_draft_of_another_target_is_refused(trained, exported, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(exported / "specforge", other)
    (other / "config.json").write_text(json.dumps({**config(other), "vocab_size": 7, "draft_vocab_size": 7}))
    with pytest.raises(DraftModelError, match=r"other: `vocab_size` is 7; allowed: 337, the target"):
        compared(trained, tmp_path / "w", str(other))


@pytest.mark.parametrize("layers", ["nested", "absent"])
def test_specforges_own_layer_ids_reach_every_format(trained, exported, tmp_path, layers):
    source = tmp_path / "source"
    shutil.copytree(exported / "specforge", source)
    given = config(source)
    if layers == "absent":
        given.pop("eagle_config")
    (source / "config.json").write_text(json.dumps(given))
    ours = config(trained.final)[LAYERS] if layers == "nested" else None
    nested = [layer - 1 for layer in ours] if ours else None
    for form in FORMATS:
        export(str(source), form, str(tmp_path / form), tmp_path / f"work-{form}", target="org/target")
    assert config(tmp_path / "vllm").get(LAYERS) == config(tmp_path / "speculators").get(LAYERS) == ours
    assert config(tmp_path / "sglang")["eagle_config"].get(LAYERS) == nested


def test_nested_layer_ids_that_depend_on_the_target_need_its_type(exported, tmp_path):
    source = shutil.copytree(exported / "specforge", tmp_path / "source")
    given = {**config(source), "eagle_config": {"use_aux_hidden_state": True, LAYERS: [2, 3, 4]}}
    (source / "config.json").write_text(json.dumps(given))

    def written(form, **options):
        export(str(source), form, str(tmp_path / "out"), tmp_path / "work", "org/target", **options)
        return config(tmp_path / "out")

    for form in ("vllm", "speculators"):
        with pytest.raises(DraftModelError, match=r"--target-type: not given, .* \[2, 3, 4\] .* \[3, 4, 5\] of others"):
            written(form)
        assert written(form, target_type="llama")[LAYERS] == [3, 4, 5]
        assert written(form, target_type="deepseek_v3")[LAYERS] == [2, 3, 4]
    assert written("sglang")["eagle_config"][LAYERS] == [2, 3, 4]
    (source / "config.json").write_text(json.dumps({**given, LAYERS: 3}))
    with pytest.raises(DraftModelError, match=r"config\.json lacks, or has in another form, what vllm needs"):
        written("vllm")


def test_the_speculators_format_must_know_its_target(exported, tmp_path):
    with pytest.raises(DraftModelError, match=r"--target: not given"):
        export(str(exported / "specforge"), "speculators", str(tmp_path / "out"), tmp_path / "work")


@pytest.fixture(scope="module")
def with_card(trained, tmp_path_factory):
    """The draft after an evaluation, with a state of the training beside it."""
    _, final = trained.evaluate(tmp_path_factory.mktemp("evaluated"))
    final.joinpath("training_state").mkdir()
    final.joinpath("training_state/moments.bin").write_bytes(b"private")
    manifest = storage.read_manifest(str(final))
    storage.publish(final, str(final), stage=manifest.stage, properties=manifest.properties)
    return final


@pytest.fixture
def pushed(with_card, tmp_path, monkeypatch):
    """Runs `draft-model push` on a copy of the draft, with a Hub on this machine."""
    final = shutil.copytree(with_card, tmp_path / "final")

    def run(*words, token=TOKEN):
        with Hub({}) as hub:
            hub.connect(monkeypatch)
            return draft_model("push", final, *words, HF_TOKEN=token), hub

    return run, final


def test_a_draft_goes_to_the_hub_with_a_card_that_names_the_repository(pushed, tmp_path):
    run, final = pushed
    done, hub = run("org/name", "--dry-run")
    assert (done.returncode, hub.requests, hub.made) == (0, [], [])
    assert "model.safetensors" in done.stdout
    assert "training_state" not in done.stdout
    done, hub = run("org/name", "--private")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{hub.endpoint}/org/name"), done.stderr
    assert hub.made[0]["visibility"] == "private"
    names = {file.path for file in storage.read_manifest(str(final)).files} - {"training_state/moments.bin"}
    assert hub.pushed.keys() == names | {"manifest.json"}
    assert hub.pushed["model.safetensors"] == (final / "model.safetensors").read_bytes()
    card = hub.pushed["README.md"].decode()
    assert '"model": "org/name"' in card
    assert "THIS_FOLDER" not in card
    assert "THIS_FOLDER" in (final / "README.md").read_text(encoding="utf-8")
    for name, data in hub.pushed.items():
        (tmp_path / "downloaded").mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(data)
    storage.fetch(str(tmp_path / "downloaded"), tmp_path / "again")


def test_what_cannot_be_pushed_is_one_sentence(pushed):
    run, final = pushed
    refused = {"org": run("org"), "HF_TOKEN": run("org/name", token="hf_wrong")}
    (final / "model.safetensors").write_bytes(b"other")
    refused["model.safetensors"] = run("org/name")
    for word, (done, hub) in refused.items():
        assert done.returncode == 2
        assert word in done.stderr
        assert "Traceback" not in done.stderr
        assert hub.pushed == {}


def test_a_flipped_byte_in_a_folder_of_ours_is_refused(trained, tmp_path):
    folder = Path(shutil.copytree(trained.final, tmp_path / "flipped"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DraftModelError, match=r"model\.safetensors"):
        export(str(folder), "vllm", str(tmp_path / "out"), tmp_path / "work")
    with pytest.raises(DraftModelError, match=r"model\.safetensors"):
        compared(trained, tmp_path / "work", str(folder), evaluation_conversations=1)
    assert not (tmp_path / "out").exists()


BLOCK = {"num_hidden_layers": 1, "num_anchors": 6}
OTHERS_SHAPES = {"dspark": {**BLOCK, "markov_rank": 8}, "dflash": {**BLOCK, "markov_rank": 0}, "eagle3.1": {}}


@pytest.fixture(scope="module", params=OTHERS_SHAPES)
def other_draft(request, trained, tmp_path_factory):
    """A trained draft of another family, and a folder with its exports."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "draft.json").write_text(json.dumps(OTHERS_SHAPES[request.param]))
    settings = {"draft_architecture": request.param, "draft_model_config": str(folder / "draft.json"), "num_epochs": 1}
    final = Path(Trainer(trained.inputs, folder / "trained")(**settings).result.final)
    for form in FORMATS:
        export(str(final), form, str(folder / form), folder / "work", target=trained.inputs.model)
    return final, folder


def test_a_draft_of_another_family_is_evaluated_compared_and_exported_alike(trained, other_draft, tmp_path):
    final, folder = other_draft
    result, draft = Trained(trained.inputs, final).evaluate(tmp_path)
    assert result.metrics["compared_tokens"] >= 8
    for name in ("report.html", "README.md"):
        assert drafts.family_of(config(final)).title in (draft / name).read_text(encoding="utf-8")
    same_rounds(trained, tmp_path / "compared", str(final), *(str(folder / form) for form in FORMATS))


@pytest.mark.parametrize("other_draft", ["dspark", "dflash"], indirect=True)
def test_speculators_own_code_reads_block_drafts(trained, other_draft, tmp_path):
    final, folder = other_draft
    saved = tmp_path / "saved"
    said = by_their_own_code("speculators", "speculators_round_trip.py", folder / "speculators", saved)
    kind = config(folder / "speculators")["architectures"][0]
    assert (said["model"], said["hidden"]) == (kind, config(final)["hidden_size"])
    same_rounds(trained, tmp_path / "work", str(final), str(saved))
