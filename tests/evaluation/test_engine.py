"""The engine's process: what is asked of it, what comes back, and one sentence for each way in which it fails."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict, replace

import psutil
import pytest
import torch
from click.testing import CliRunner

from draft_model import engine
from draft_model.cli import cli
from draft_model.engine import Counts, Job, Measured, Process, compare_replies, explain, sglang, vllm
from draft_model.errors import DraftModelError
from draft_model.evaluation import measure, stage
from draft_model.evaluation.measure import check_engine
from draft_model.parameters import Parameters
from draft_model.parameters.rules import problems_with
from draft_model.training.checkpoint import read_checkpoint

PROMPTS = [[[1, 2, 3], [4, 5]], [[6, 7]]]
JOB = Job("/target", "/draft", "eagle3", {"num_speculative_tokens": 3}, 3, PROMPTS, 8, [2, 5], 0.0, 0)


def test_vllm_decodes_the_target_by_nothing_but_its_weights():
    found = vllm.arguments(replace(JOB, gpus=4))
    assert found["speculative_config"] == {"method": "eagle3", "model": "/draft", "num_speculative_tokens": 3}
    assert (found["dtype"], found["tensor_parallel_size"], found["max_model_len"]) == ("auto", 4, 3 + 8 + 2 * 4)
    assert (found["generation_config"], found["trust_remote_code"]) == ("vllm", False)
    alone = vllm.arguments(replace(JOB, draft=""))
    assert (alone["speculative_config"], alone["dtype"], alone["tensor_parallel_size"]) == (None, "float32", 1)


def test_sglangs_histograms_are_counted():
    outputs = [{"meta_info": {sglang.HISTOGRAM: [2, 0, 1, 1]}}, {"meta_info": {sglang.HISTOGRAM: [0, 3]}}]
    assert sglang.counts(outputs, 3) == Counts(7, 21, 8, [5, 2, 1])


def test_a_difference_is_a_tie_only_within_the_types_rounding():
    own, margins = [[[1, 9, 3], [4, 5]], [[6, 7]]], [[[9.0, 0.3, 9.0], [9, 9]], [[9, 9]]]
    alone, found = Measured("", "", "bfloat16", own, margins), Measured("", "", "", [[[1, 2, 3], [4, 5]], [[6]]])
    compared, (first, longer) = compare_replies(alone, found)
    assert compared == 1 + 2 + 1
    assert (first.prompt, first.position, first.margin, first.tie) == (0, 1, 0.3, True)
    assert (longer.prompt, longer.position, longer.margin, longer.tie) == (2, 1, None, False)
    assert not compare_replies(replace(alone, dtype="float32"), found)[1][0].tie


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
    "a worker in the same process": (
        1, "[rank0]: torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found\n\n"
        "[rank0]: Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace\n",
        "failed: InductorError: InvalidCxxCompiler: No working C++ compiler found",
    ),
    "a signal": (-11, "bye\n", "was ended by signal 11 (SIGSEGV)"),
    "nothing said": (3, "", "failed with exit status 3: it wrote no log"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_a_failed_process_is_explained(name):
    code, log, expected = LOGS[name]
    assert expected in explain(code, log, "gpus", "length")


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


def test_a_process_that_dies_or_takes_too_long_is_one_sentence(python):
    python("kill -SEGV $$")
    with (
        pytest.raises(DraftModelError, match=r"vllm with the draft was ended by signal 11"),
        Process("vllm", JOB) as process,
    ):
        process.measure()
    python("exec sleep 600")
    with (
        pytest.raises(DraftModelError, match=r"took longer than 0 minutes; lower evaluation_conversations"),
        Process("vllm", JOB, time_limit=0.2) as process,
    ):
        process.measure()


def test_a_process_sees_this_package_and_nothing_that_is_installed_beside_it(python):
    python('ls -A "${PYTHONPATH%%:*}" >&2; test -f "${PYTHONPATH%%:*}/draft_model/engine/vllm.py" && exit 7')
    with pytest.raises(DraftModelError, match=r"exit status 7: draft_model$"), Process("vllm", JOB) as process:
        process.measure()


def ends_with_its_parent(code, **options):
    """Runs a program that prints the id of a process that it starts; whether that ends when the program is killed."""
    with subprocess.Popen([sys.executable, "-c", code], text=True, **options) as parent:
        started = psutil.Process(int((parent.stdout or parent.stderr).readline()))
        parent.kill()
        psutil.wait_procs([started], timeout=20)
        return not started.is_running() or started.status() == psutil.STATUS_ZOMBIE


def test_what_an_engine_started_ends_when_its_parent_is_killed():
    engine_code = (
        "import subprocess; from draft_model.engine import serve; "
        "serve(lambda job: type('E', (), {'pid': lambda self: subprocess.Popen(['sleep', '600']).pid})())"
    )
    parent_code = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {engine_code!r}], text=True, "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True); "
        f"child.stdin.write({json.dumps(asdict(JOB))!r} + '\\n[\"pid\"]\\n'); child.stdin.flush(); "
        "print(child.stdout.readline(), flush=True); child.wait()"
    )
    assert ends_with_its_parent(parent_code, stdout=subprocess.PIPE)


def test_an_engine_that_still_loads_ends_when_its_parent_is_killed(tmp_path):
    (tmp_path / "vllm.py").write_text(
        "import subprocess, sys\nchild = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, file=sys.stderr, flush=True)\nchild.wait()\n"
    )
    code = (
        "from draft_model.engine.generate import Sampling, Settings, VllmGenerator\n"
        "VllmGenerator(Settings('model', 64, Sampling(0.0, 1.0, 0), [1], 0)).next()"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert ends_with_its_parent(code, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})


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
    refused = problems_with({"evaluation_temperature": 0.7, "evaluation_engine": "transformers"}, ["evaluate"])
    assert [problem for problem in refused if problem.startswith("evaluation_temperature: given 0.7")]


FAKE = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    sys.exit(0)
job = json.loads(sys.stdin.readline())
speed = 10.0 * (1 + bool(job["draft"]) * (1 if job["proposals"] == 2 else 0.5))
for line in sys.stdin:
    method, *arguments = json.loads(line)
    if job["proposals"] == 4:
        sys.exit("ValueError: at most 3 here")
    reply = [[[7] * 50 for _ in group] for group in job["groups"]]
    rounds = [25 * len(group) for group in job["groups"]]
    counts = [dict(rounds=n, drafted=2 * n, accepted=n, by_position=[n, 0][: job["proposals"]]) for n in rounds]
    print(json.dumps(speed / arguments[0] if method == "time" else dict(
        engine="fake 1", hardware="none", dtype="float32", outputs=reply, margins=[[[9.0] * 50] * len(group) for
        group in job["groups"]], counts=counts if job["draft"] else [], drafted=[], sampled=None, speed={{}},
    )), flush=True)
"""


def test_speed_is_timed_beside_the_target_and_a_number_of_proposals_recommended(trained, tmp_path, python, monkeypatch):
    python("").write_text(FAKE.format(python=sys.executable))
    settings = {"evaluation_batch_sizes": "1,4,16", "evaluation_conversations": 0}
    trained.evaluate(tmp_path, **settings)
    found = json.loads((tmp_path / "final/evaluation.json").read_text())
    names = ("num_speculative_tokens", "batch_size", "speed_up")
    assert [tuple(row[name] for name in names) for row in found["speed_by_proposals"]] == [
        (2, 1, 2.0), (2, 4, 2.0), (1, 1, 1.5), (1, 4, 1.5), (3, 1, 1.5), (3, 4, 1.5),
    ], "a CPU is not timed at 16"  # fmt: skip
    assert [row["batch_size"] for row in found["speed"]] == [1, 4]
    assert (found["recommended_num_speculative_tokens"], found["timing"]) == (2, "in turn, run by run")
    (problem,) = found["not_measured"]
    assert problem.startswith("the trained draft, 4 tokens proposed at a time: ")
    assert "at most 3 here" in problem
    page = (tmp_path / "final/report.html").read_text()
    assert "at most 3 here" in page
    assert "Speed-up by requests at once" in page
    assert found["agreement"]["not_compared"].startswith("only ")
    # The fake engine keeps one proposal a round; the draft, of a few steps of training, almost none.
    monkeypatch.setattr(stage, "MIN_ROUNDS", 1)
    monkeypatch.setattr(measure, "_holds_two_targets", lambda case: False)
    with pytest.raises(DraftModelError, match=r"fake 1 measures an acceptance length of 2.00, .* feature layers"):
        trained.evaluate(tmp_path / "again", **settings)
    found = json.loads((tmp_path / "again/final/evaluation.json").read_text())
    assert found["agreement"]["simulated"] < 1.5
    assert found["timing"].startswith("one after the other")
    assert found["speed"][0]["speed_up"] == 2.0
    read_checkpoint(str(tmp_path / "again/final"), tmp_path / "read")


def test_compare_takes_the_engine_and_runs_it_once_per_draft(trained, tmp_path, python):
    python("").write_text(FAKE.format(python=sys.executable))
    words = [
        "compare", "--model", trained.inputs.model, "--dataset", trained.inputs.dataset, "--engine", "vllm",
        "--num_speculative_tokens", "2", "--json", str(tmp_path / "found.json"), *[str(trained.final)] * 2,
    ]  # fmt: skip
    done = CliRunner().invoke(cli, words, catch_exceptions=False, env={"COLUMNS": "300"})
    assert done.exit_code == 0
    assert "fake 1" in done.output
    for record in json.loads((tmp_path / "found.json").read_text()):
        assert [(row["num_speculative_tokens"], row["speed_up"]) for row in record["speed"]] == [(2, 2.0), (2, 2.0)]


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DraftModelError, match=r"number_of_gpu_to_use_evaluation: 4 are asked for .* has 2"):
        measure.gpus_of(Parameters(number_of_gpu_to_use_evaluation=4))
    assert measure.gpus_of(Parameters(number_of_gpu_to_use_draft_model_training=2)) == 2
    assert measure.gpus_of(Parameters(number_of_gpu_to_use_evaluation=1)) == 1


def test_a_failed_engine_leaves_the_draft_whole_and_a_report_that_says_so(trained, tmp_path, python):
    python('case "$1" in -c) exit 0;; esac; echo "ValueError: this draft is not mine" >&2; exit 1')
    with pytest.raises(DraftModelError, match=r"failed: ValueError: this draft is not mine") as failed:
        trained.evaluate(tmp_path)
    assert failed.value.problems[-1].endswith("is whole and can be served")
    read_checkpoint(str(tmp_path / "final"), tmp_path / "read")
    report = json.loads((tmp_path / "final/report.json").read_text())
    assert report["evaluation"] is None
    assert "this draft is not mine" in (tmp_path / "final/report.html").read_text()
    assert "Not measured" in (tmp_path / "final/README.md").read_text()
    assert not (tmp_path / "final/evaluation.json").exists()
