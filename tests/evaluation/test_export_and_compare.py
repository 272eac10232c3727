"""One draft in every engine's format: the same draft wherever it is read, and what each engine's own code wants."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from draft_model import storage
from draft_model.cli import cli
from draft_model.errors import DraftModelError
from draft_model.evaluation.compare import CompareConfig, compare
from draft_model.export import FORMATS, export
from draft_model.parameters import Parameters

SPECULATORS = Path(__file__).parents[2] / ".venv-speculators/bin/python"
LAYERS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained draft in each format, and as SpecForge leaves it: with the target's embeddings."""
    root = tmp_path_factory.mktemp("exported")
    for form in FORMATS:
        export(str(trained.final), form, str(root / form), root / f"work-{form}", target="org/target")
    shutil.copytree(root / "sglang", root / "specforge", ignore=shutil.ignore_patterns("manifest.json"))
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
    # vLLM: top level, layers that ran (vllm/v1/worker/gpu_model_runner.py, _get_eagle3_aux_layers_from_config).
    # SGLang: below eagle_config, one less (sglang/srt/model_executor/model_runner.py; its Llama adds one).
    ours = config(trained.final)
    assert config(exported / "vllm")[LAYERS] == config(exported / "speculators")[LAYERS] == ours[LAYERS]
    assert config(exported / "sglang")["eagle_config"][LAYERS] == [layer - 1 for layer in ours[LAYERS]]
    assert LAYERS not in config(exported / "sglang")
    assert LAYERS not in config(exported / "vllm")["eagle_config"]
    for form in ("vllm", "sglang"):
        assert config(exported / form)["architectures"] == ["LlamaForCausalLMEagle3"]


def test_tensors_have_the_names_that_each_format_wants(trained, exported):
    # speculators 0.9.0, models/eagle3/core.py: `layers.0`, d2t an offset; embeddings and the verifier's head may lack.
    ours = load_file(trained.final / "model.safetensors")
    for form in FORMATS:
        layer = "layers.0." if form == "speculators" else "midlayer."
        found = load_file(exported / form / "model.safetensors")
        expected = {name.replace("midlayer.", layer): tensor for name, tensor in ours.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


READ = """
import json, sys
from speculators import SpeculatorModelConfig
read = SpeculatorModelConfig.from_pretrained(sys.argv[1])
layer = read.transformer_layer_config
verifier = read.speculators_config.verifier
print(json.dumps({
    "class": type(read).__name__, "layers": read.eagle_aux_hidden_state_layer_ids, "draft": read.draft_vocab_size,
    "hidden": layer.hidden_size, "heads": layer.num_attention_heads, "head_dim": layer.head_dim,
    "vocabulary": layer.vocab_size, "verifier": verifier.name_or_path, "rope": layer.rope_parameters["rope_theta"],
    "norms": [read.norm_before_residual, read.norm_before_fc, read.fc_norm, read.norm_output],
}))
"""


def test_speculators_own_code_reads_its_format(trained, exported):
    if not SPECULATORS.exists():
        pytest.skip(f"{SPECULATORS} is not there; `make bench-peers` installs speculators, which needs no GPU")
    command = [SPECULATORS, "-c", READ, exported / "speculators"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = config(trained.final)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "class": "Eagle3SpeculatorConfig", "layers": ours[LAYERS], "draft": ours["draft_vocab_size"],
        "hidden": ours["hidden_size"], "heads": ours["num_attention_heads"], "head_dim": ours["head_dim"],
        "vocabulary": ours["vocab_size"], "verifier": "org/target", "rope": ours["rope_theta"],
        "norms": [False, False, False, False],
    }  # fmt: skip


def test_drafts_of_every_format_decode_alike(trained, exported, tmp_path):
    drafts = (str(trained.final), *(str(exported / name) for name in (*FORMATS, "specforge")))
    parameters = Parameters(evaluation_conversations=3, evaluation_max_new_tokens=8, num_speculative_tokens=2)
    records = compare(CompareConfig(trained.inputs.model, trained.inputs.dataset, drafts, tmp_path, parameters))
    assert [record["draft"] for record in records] == list(drafts)
    alike = [{key: record[key] for key in ("rounds", "accepted", "tokens", "identical")} for record in records]
    assert alike == alike[:1] * 5
    assert alike[0]["identical"]


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
    assert cells.count(f"{records[0]['acceptance_length']:.3f}") >= 2
    assert "length, letters" in cells
    assert "cumulative acceptance at 3" in cells


def test_a_draft_of_another_target_is_refused(trained, exported, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(exported / "vllm", other, ignore=shutil.ignore_patterns("manifest.json"))
    (other / "config.json").write_text(json.dumps({**config(other), "vocab_size": 7, "draft_vocab_size": 7}))
    with pytest.raises(DraftModelError, match=r"other: `vocab_size` is 7; the target has"):
        compare(
            CompareConfig(trained.inputs.model, trained.inputs.dataset, (str(other),), tmp_path / "w", Parameters())
        )


def test_the_speculators_format_must_know_its_target(exported, tmp_path):
    (exported / "specforge/training.json").unlink(missing_ok=True)
    with pytest.raises(DraftModelError, match=r"--target: not given"):
        export(str(exported / "specforge"), "speculators", str(tmp_path / "out"), tmp_path / "work")
