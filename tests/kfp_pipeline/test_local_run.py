"""The compiled pipeline as it is, on a tiny target, through S3 and back; and what is left when a run ends early."""

import json
import os
import re
import signal
import subprocess
import sysconfig
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import psutil
import pytest
import tiny
from safetensors.torch import load_file

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.evaluation.card import print_summary
from draft_model.processes import ORPHAN_SECONDS
from draft_model.storage.embedded import EmbeddedStore
from kfp_pipeline.local import _alone, run_local

PROGRAM = Path(sysconfig.get_path("scripts")) / "draft-model"
STEPS = ("preflight", "import-model", "build-dataset", "train-draft-model", "evaluate-draft-model", "clean-up")
pytestmark = pytest.mark.timeout(900)  # libraries load slowly where others use the processor


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return tiny.write_run(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs work in one folder, so that each but the first finds target and data set there."""
    return tmp_path_factory.mktemp("runs") / "run"


@contextmanager
def endless(folder, values):
    """A run by the command line, in a process group of its own, that has trained an epoch and would never end."""
    settings = [f"--set={key}={value}" for key, value in {**values, "num_epochs": 100_000}.items()]
    process = subprocess.Popen(
        [PROGRAM, "run", "--folder", folder, *settings], start_new_session=True, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder.parent)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )  # fmt: skip
    try:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "checkpoint epoch_1" in line:
                break
        else:
            pytest.fail(f"the run ended before it trained:\n{''.join(seen[-60:])}")
        yield process
    finally:
        for left in (process, *processes_of(folder)):
            left.kill()
        process.wait()
        process.stdout.close()


def processes_of(folder):
    """All processes that have the folder in their command line or environment, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in text for text in (*process.cmdline(), *process.environ().values())):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def killed(folder, values):
    """A run whose command was killed: all of its commands before, and what waits for its processes and gives the rest.

    They take ORPHAN_SECONDS, in which a test that works elsewhere may run.
    """
    with ExitStack() as stack:
        process = stack.enter_context(endless(folder, values))
        before = [" ".join(each.cmdline()) for each in processes_of(folder)]
        process.kill()

        @cache
        def left():
            with stack:
                process.communicate()  # until the last process that could write there has ended
                psutil.wait_procs(processes_of(folder), timeout=3 * ORPHAN_SECONDS)
                return processes_of(folder)

        yield before, left


@pytest.mark.usefixtures("killed")
def test_what_a_step_finds_wrong_ends_the_run_with_its_own_sentence(tmp_path, values):
    (tmp_path / "draft.json").write_text('{"draft_vocab_size": 100000}')
    with pytest.raises(DraftModelError, match=r"^draft_model_config: .*draft_vocab_size"):
        run_local({**values, "draft_model_config": str(tmp_path / "draft.json")}, tmp_path / "run")
    log = (tmp_path / "run/run.log").read_text()
    assert "Traceback" not in log
    assert "clean-up" in log
    assert [step for step in STEPS[1:-1] if step in log] == []
    assert [left for left in processes_of(tmp_path) if left.pid != os.getpid()] == []
    assert not (tmp_path / "run/output").exists()


def test_kill_9_of_the_command_alone_while_training_ends_everything(killed):
    before, left = killed
    assert all(any(name in command for command in before) for name in ("weed", "executor_main", "draft_model.training"))
    assert left() == []


@pytest.fixture(scope="module")
def interrupted(killed, folder, values):
    """What Ctrl-C leaves of a run: exit code, what it printed last, processes after."""
    killed[1]()
    with endless(folder, values) as process:
        os.killpg(process.pid, signal.SIGINT)
        printed, _ = process.communicate()
        return process.returncode, printed, processes_of(folder)


def test_ctrl_c_while_training_ends_everything(interrupted, folder):
    code, printed, after = interrupted
    assert code == 130
    assert printed.splitlines()[-1] == "interrupted"
    assert after == []
    assert list((folder / "work").iterdir()) == []


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with (
        _alone(tmp_path),
        pytest.raises(DraftModelError, match=r"--folder: .* another run is at work"),
        _alone(tmp_path),
    ):
        pass
    with _alone(tmp_path):
        pass


@pytest.fixture(scope="module")
def whole(interrupted, folder, values):
    """A run in the folder that others used before, with what they might have left."""
    (folder / "output/final").mkdir(parents=True)
    (folder / "output/final/evaluation.json").write_text("of another run")
    (folder / "output/final/stale.txt").touch()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    final = run_local(values, folder)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert dict(os.environ) == environment
    return folder, final


@pytest.fixture(scope="module")
def stored(whole):
    """The run's store, started again: URI of the pipeline's folder."""
    with EmbeddedStore(whole[0] / "store") as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield f"s3://{store.bucket}/pipeline_draft_model"


def test_the_final_draft_is_whole_and_loads(whole, values):
    final = whole[1]
    assert final == whole[0] / "output/final"
    assert {path.name for path in final.iterdir()} == {
        "config.json", "model.safetensors", "training.json", "evaluation.json", "report.html", "report.json",
        "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    config = json.loads((final / "config.json").read_text())
    weights = load_file(final / "model.safetensors")
    assert len(weights["d2t"]) == config["draft_vocab_size"] == len(weights["lm_head.weight"]) == 200
    assert len(weights["t2d"]) == config["vocab_size"]
    assert any(name.startswith("midlayer.") for name in weights)


def test_the_records_say_what_was_run(whole, values):
    final = whole[1]
    training = json.loads((final / "training.json").read_text())
    evaluation = json.loads((final / "evaluation.json").read_text())
    assert (training["steps"], training["epochs"]) == (6, 2.0)  # 24 conversations, 8 in a step
    assert training["target"]["source"] == values["pytorch_model_path"]
    assert evaluation["lossless"]["identical"]
    assert evaluation["prompts"] == 2
    assert "<html" in (final / "report.html").read_text().lower()


def test_everything_went_through_the_store(stored, whole):
    keys = {"/".join(name.split("/")[:2]) for name in storage.list_files(stored)}
    (model,), (dataset,) = ([key for key in keys if key.startswith(f"{kind}/")] for kind in ("models", "datasets"))
    stages = {model: "import", dataset: "dataset"}
    stages |= {f"output_model_path/{epoch}": "checkpoint" for epoch in ("epoch_1", "epoch_2")}
    stages |= {"output_model_path/final": "train"}
    for name, stage in stages.items():
        assert storage.read_manifest(f"{stored}/{name}", stage=stage).files
    final = storage.read_manifest(f"{stored}/output_model_path/final")
    assert {file.path: file.size for file in final.files} == {
        path.name: path.stat().st_size for path in whole[1].iterdir()
    }
    assert storage.read_bytes(f"{stored}/output_model_path/final/model.safetensors") == (
        (whole[1] / "model.safetensors").read_bytes()
    )


def test_a_second_run_uses_the_target_and_the_data_set_of_the_first(whole, stored):
    log = (whole[0] / "run.log").read_text()
    assert f"is at {stored}/models/" in log
    assert "already, whole: nothing is copied" in log
    assert re.search(rf"{stored}/datasets/\w+ is already built from the same inputs; nothing to do", log)


def test_no_process_and_no_scratch_folder_is_left(whole):
    folder = whole[0]
    assert [left for left in processes_of(folder) if left.pid != os.getpid()] == []
    assert list((folder / "work").iterdir()) == []


def test_the_log_is_kept_without_keys(whole):
    log = (whole[0] / "run.log").read_text()
    assert [step for step in STEPS if step not in log] == []
    keys = json.loads((whole[0] / "store/keys.json").read_text())
    assert keys["secret_key"] not in log


def test_the_summary_shows_the_result_and_what_to_type_next(whole, values, capsys):
    final = whole[1]
    print_summary(final)
    printed = capsys.readouterr().out
    reached = json.loads((final / "evaluation.json").read_text())["trained"]["acceptance_length"]
    assert f"{reached:.2f} tokens per step" in printed
    assert f"vllm serve {values['pytorch_model_path']} --speculative-config " in printed
    assert str(final / "report.html") in printed
