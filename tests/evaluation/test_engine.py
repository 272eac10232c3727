"""The engine's process: what is asked of it, what comes back, and one sentence for each way in which it fails."""

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny

from draft_model import engine
from draft_model.drafts.eagle3.export import load_draft
from draft_model.engine import Counts, Job, compare_replies, explain, sglang, vllm
from draft_model.errors import DraftModelError
from draft_model.evaluation.measure import check_engine
from draft_model.parameters import Parameters

SERVING = Path(os.environ.get(engine.PYTHON) or Path(__file__).parents[2] / ".venv-serving/bin/python")
JOB = Job("/target", "/draft", "eagle3", 3, [[[1, 2, 3], [4, 5]], [[6, 7]]], 8, [2, 5], 0.0, 0, [1, 4])


def test_vllm_decodes_the_target_by_nothing_but_its_weights():
    found = vllm.arguments(JOB, gpus=4)
    assert found["speculative_config"] == {"method": "eagle3", "model": "/draft", "num_speculative_tokens": 3}
    assert (found["dtype"], found["tensor_parallel_size"], found["max_model_len"]) == ("auto", 4, 3 + 8 + 4)
    assert (found["generation_config"], found["trust_remote_code"]) == ("vllm", False)
    alone = vllm.arguments(Job(**{**asdict(JOB), "draft": ""}), gpus=0)
    assert (alone["speculative_config"], alone["dtype"], alone["tensor_parallel_size"]) == (None, "float32", 1)


def test_sglang_gets_its_names_and_its_histograms_are_counted():
    found = sglang.arguments(JOB, gpus=2)
    assert {name: value for name, value in found.items() if name.startswith("speculative")} == {
        "speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "/draft", "speculative_num_steps": 3,
        "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4,
    }  # fmt: skip
    assert not [name for name in sglang.arguments(Job(**{**asdict(JOB), "draft": ""}), 1) if "speculative" in name]
    outputs = [{"meta_info": {"spec_accept_histogram": [2, 0, 1, 1]}}, {"meta_info": {"spec_accept_histogram": [0, 3]}}]
    assert sglang.counts(outputs, 3) == Counts(7, 21, 8, [5, 2, 1])


def test_a_difference_is_a_tie_only_within_the_types_rounding():
    decoded, own, margins = [[1, 2, 3], [4, 5], [6]], [[1, 9, 3], [4, 5], [6, 7]], [[9.0, 0.3, 9.0], [9, 9], [9, 9]]
    compared, (first, longer) = compare_replies(decoded, own, margins, "bfloat16")
    assert compared == 1 + 2 + 1
    assert (first.prompt, first.position, first.margin, first.tie) == (0, 1, 0.3, True)
    assert (longer.prompt, longer.position, longer.margin, longer.tie) == (2, 1, None, False)
    assert not compare_replies(decoded, own, margins, "float32")[1][0].tie


LOGS = {
    "the target alone, memory": (
        1, "(EngineCore_DP0 pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
        "ran out of memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.); use larger",
    ),
    "killed": (-9, "loading\n", "ran out of memory (exit status -9)"),
    "the draft": (
        1, "\x1b[0;36m(EngineCore_DP0 pid=7)\x1b[0;0m ERROR 11-27 13:02 [core.py:936] ValueError: There is no module "
        "or parameter named 'fc_norm' in Eagle3LlamaForCausalLM\nRuntimeError: Engine core initialization failed. "
        "See root cause above.\n", "failed: ValueError: There is no module or parameter named 'fc_norm'",
    ),
    "a draft of another shape, as vLLM 0.32 says it": (
        1, "(Worker pid=9) ERROR 11-27 [multiproc_executor.py:953] RuntimeError: start (0) + length (77) exceeds "
        "dimension size (48).\n(EngineCore pid=7) ERROR 11-27 [core.py:1510] Exception: WorkerProc initialization "
        "failed due to an exception in a background process. See stack trace for root cause.\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
        "failed: RuntimeError: start (0) + length (77) exceeds dimension size (48).",
    ),
    "a signal": (-11, "bye\n", "was ended by signal 11 (SIGSEGV)"),
    "nothing said": (3, "", "failed with exit status 3: it wrote no log"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_a_failed_process_is_explained(name):
    code, log, expected = LOGS[name]
    assert expected in explain(code, log)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Puts a shell script in the place of the engine's Python."""

    def script(text):
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(engine.PYTHON, str(file))
        return file

    return script


def test_a_process_that_dies_or_takes_too_long_is_one_sentence(python, tmp_path):
    python("kill -SEGV $$")
    with pytest.raises(DraftModelError, match=r"vllm with the draft was ended by signal 11"):
        engine.measure("vllm", JOB, tmp_path)
    python("exec sleep 600")
    with pytest.raises(DraftModelError, match=r"took longer than 0 minutes; lower evaluation_conversations"):
        engine.measure("vllm", JOB, tmp_path, time_limit=0.2)


def test_auto_takes_vllm_where_it_can_be_imported(python, monkeypatch):
    assert check_engine(Parameters()) == "transformers"
    python("exit 0")
    assert check_engine(Parameters(evaluation_temperature=0.7)) == "vllm"
    assert check_engine(Parameters(evaluation_engine="transformers")) == "transformers"
    monkeypatch.setenv(engine.PYTHON, "/nowhere/python")
    with pytest.raises(DraftModelError, match=r"DRAFT_MODEL_ENGINE_PYTHON: given '/nowhere/python'"):
        check_engine(Parameters())


def test_an_engine_that_is_missing_and_sampling_without_one_are_refused():
    with pytest.raises(DraftModelError, match=r"evaluation_engine: given 'sglang', but .* cannot import sglang"):
        check_engine(Parameters(evaluation_engine="sglang"))
    with pytest.raises(DraftModelError, match=r"evaluation_temperature: given 0.7, but only an engine"):
        check_engine(Parameters(evaluation_temperature=0.7))


def test_a_failed_engine_leaves_the_draft_whole_and_a_report_that_says_so(trained, tmp_path, python):
    python('case "$1" in -c) exit 0;; esac; echo "ValueError: this draft is not mine"; exit 1')
    with pytest.raises(DraftModelError, match=r"failed: ValueError: this draft is not mine") as failed:
        trained.evaluate(tmp_path)
    assert failed.value.problems[-1].endswith("is whole and can be served")
    load_draft(tmp_path / "final")
    report = json.loads((tmp_path / "final/report.json").read_text())
    assert report["evaluation"] is None
    assert "this draft is not mine" in (tmp_path / "final/report.html").read_text()
    assert "Not measured" in (tmp_path / "final/README.md").read_text()
    assert not (tmp_path / "final/evaluation.json").exists()


FIVE = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4, 5], "norm_before_fc": True}


@pytest.mark.skipif(not SERVING.exists(), reason="`make check-serving` installs vLLM for CPU")
@pytest.mark.parametrize(("architecture", "shape"), [("eagle3", {}), ("eagle3.1", FIVE)])
def test_vllm_counts_what_our_own_decoder_counts(tmp_path, monkeypatch, architecture, shape):
    """The whole stage on a tiny target, once in vLLM and once by our decoder."""
    from training.case import QUICK, build_dataset, make_inputs

    from draft_model import evaluation, training

    write = tiny.write_target
    # vLLM's attention on a CPU has no heads smaller than 32.
    monkeypatch.setattr(tiny, "write_target", lambda folder: write(folder, 3, head_dim=32))
    model = make_inputs(tmp_path).model
    # The draft knows the whole vocabulary: few of a random target's choices would lie in a part of it.
    split = str(tmp_path / "validation.jsonl")
    data = build_dataset(tmp_path / "whole", model, tiny.conversations(13), dataset_validation_split=split)
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    kind = {"draft_architecture": architecture, "draft_model_config": str(tmp_path / "shape.json")}
    settings = Parameters(**{**QUICK, "num_epochs": 2, **kind})
    train = training.TrainConfig(model, data, str(tmp_path / "out"), tmp_path / "work", settings)
    final = training.job.run(train).final
    monkeypatch.setenv(engine.PYTHON, str(SERVING))
    found = []
    for name, temperature in (("vllm", 0.7), ("transformers", 0.0)):
        p = Parameters(
            evaluation_engine=name, evaluation_max_new_tokens=12, num_speculative_tokens=2,
            evaluation_temperature=temperature,
        )  # fmt: skip
        evaluation.run(evaluation.EvaluateConfig(model, data, final, tmp_path / f"work-{name}", p))
        found.append(json.loads(Path(final, "evaluation.json").read_text()))
    theirs, ours = found
    assert theirs["engine"].startswith("vLLM 0.")
    assert theirs["lossless"]["identical"]
    assert theirs["sampled"]["rounds"] > 0
    assert [row["batch_size"] for row in theirs["speed"]] == [1, 4]
    assert 1.05 < ours["trained"]["acceptance_length"] < 2.95, "some proposals are kept and some are not"
    if not (theirs["lossless"]["ties"] or ours["lossless"]["ties"]):
        assert theirs["trained"] == ours["trained"]
        assert theirs["untrained"] == ours["untrained"]
        assert theirs["by_category"] == ours["by_category"]
