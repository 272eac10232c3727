"""`draft-model submit`, `watch`, `logs` and `terminate` as a user and a CI job meet them, against a KFP API server."""

import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command import draft_model

from kfp_pipeline.compile import COMPILED

pytestmark = pytest.mark.usefixtures("nothing_of_this_machine")
DOCS = Path(__file__).parents[2] / "docs" / "client.md"
PROGRAM = "from kfp_pipeline import watch; watch.PAUSES = 0.05, 0.05; from draft_model.cli import main; main()"
GIVEN = ["--image", "registry.example/{kind}:1", "--set", "huggingface_id=org/name"]
GIVEN += ["--set", "dataset_train_split=s3://bucket/train.jsonl"]
RUNNING = [("RUNNING", {"preflight": "RUNNING"})]
DONE = [("SUCCEEDED", {"preflight": "SUCCEEDED", "evaluate-draft-model": "SUCCEEDED"})]
LAUNCHER = """I1127 13:00:00.000001      12 launcher_v2.go:151] publish success.
F1127 13:00:00.000002      12 main.go:49] failed to execute component: exit status 2
time="2026-11-27T13:00:01.000Z" level=info msg="sub-process exited" argo=true error="<nil>"
Error: exit status 2
"""
EXECUTOR = """[KFP Executor 2026-11-27 13:00:00,001 INFO]: Looking for component `preflight` in --component_module_path
[KFP Executor 2026-11-27 13:00:00,002 INFO]: Got executor_input:
{
    "inputs": {
        "parameterValues": {"seed": -1}
    }
}
"""
SENTENCES = "error: 2 problems:\n  - seed: given -1\n  - num_epochs: given 0\n"
DRIVER = "KFP driver: failed to resolve inputs: Expected a non-empty string"
CHECKPOINT = "checkpoint step_20: step 20, s3://bucket/run/checkpoints/step_20"
TRAINING = f"13:00:00 step 19 of 40\n13:00:00 {CHECKPOINT}\n"
CLEAN_UP = ("SUCCEEDED", "", f"13:00:09 the training was stopped at step 20\n{LAUNCHER}")


def failed(message, log, *driver):
    """A run whose training fails."""
    tasks = {"preflight": "SUCCEEDED", "train-draft-model": ("FAILED", message, log, *driver), "clean-up": CLEAN_UP}
    return [("RUNNING", {"preflight": "SUCCEEDED"}), ("FAILED", tasks)]


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "HOME": str(tmp_path)}


@pytest.fixture
def started(environment):
    """Starts the program; its standard error comes line by line."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def read_until(process, words):
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return "".join(seen)
    raise AssertionError("".join(seen))


def states(text):
    """What the log lines say of tasks."""
    return [line[9:].strip() for line in text.splitlines() if re.match(r"\d\d:\d\d:\d\d \S+: [A-Z]", line)]


def test_a_run_is_followed_to_its_end_through_an_outage_and_a_new_token(api, started, tmp_path):
    api.story, api.token = RUNNING, "first"
    (tmp_path / "token").write_text("first")
    process = started("submit", "--host", api.host, "--token-file", tmp_path / "token", *GIVEN, "--watch")
    error = read_until(process, "preflight: RUNNING")
    api.token = "second"
    error += read_until(process, "answers 401")
    (tmp_path / "token").write_text("second")
    error += read_until(process, "The server answers again.")
    api.stop()
    error += read_until(process, "does not answer")
    api.story = DONE
    api.start()
    error += read_until(process, "The server answers again.")
    error += process.stderr.read()  # communicate() would lose what was read ahead
    (run_id,) = api.runs
    assert (process.wait(60), process.stdout.read()) == (0, f"{run_id}\n")
    assert "Retrying" not in error
    assert f"succeeded: {api.host}/#/runs/details/{run_id}\n" in error
    told = [line.partition(" after ")[0] for line in states(error)]
    assert told == ["preflight: RUNNING", "preflight: SUCCEEDED", "evaluate-draft-model: SUCCEEDED"]
    images = re.findall("registry.example/[a-z]+:1", str(api.versions))
    assert set(images) == {f"registry.example/{kind}:1" for kind in ("importer", "dataset", "trainer", "coordinator")}


@pytest.mark.parametrize(
    ("story", "what", "why"),
    [
        (failed("Error (exit code 2)", f"13:00:00 imported\n{SENTENCES}{LAUNCHER}"), "failed",
         ["Error (exit code 2)", *SENTENCES.splitlines()]),
        (failed("OOMKilled (exit code 137)", TRAINING), "lost a step, whose pod was killed",
         ["OOMKilled (exit code 137)", *TRAINING.splitlines()]),
        (failed("Error (exit code 1)", f"F1127 13:00:00.000002 1 main.go:79] {DRIVER}\nError: exit 1\n", "driver"),
         "failed", ["Error (exit code 1)", f"KFP's driver failed before the step began: {DRIVER}"]),
        (failed("Error (exit code 1)", "13:00:00 \x1b]0;title\x07said\n"), "failed",
         ["Error (exit code 1)", r"13:00:00 \x1b]0;title\x07said"]),
    ],
    ids=["sentences", "killed", "driver", "escape"],
)  # fmt: skip
def test_a_failed_run_says_why(api, story, what, why):
    api.story = story
    done = draft_model("submit", "--host", api.host, *GIVEN, "--watch")
    (run_id,) = api.runs
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    checkpoint = [f"  newest {CHECKPOINT}"] if TRAINING.splitlines()[-1] in why else []
    assert done.stderr.partition("error: the run ")[2].splitlines() == [
        f"{what} (KFP: FAILED); {api.host}/#/runs/details/{run_id}",
        "  - train-draft-model:",
        *(f"      {line}" for line in why),
        "  13:00:09 the training was stopped at step 20",
        *checkpoint,
        "  Retry in KFP's UI runs what did not succeed; a training goes on from its newest checkpoint.",
        f"logs: draft-model logs --host {api.host} {run_id}",
    ]


@pytest.mark.parametrize("ui", [False, True])
def test_logs_of_a_failed_run_of_a_step_and_of_a_run_without_failures(api, ui):
    api.ui, api.story = ui, failed("Error (exit code 2)", f"{EXECUTOR}13:00:00 imported\n{SENTENCES}{LAUNCHER}")
    draft_model("submit", "--host", api.host, *GIVEN, "--watch")
    (run_id,) = api.runs
    told = draft_model("logs", "--host", api.host, run_id).stdout
    assert told == f"train-draft-model: Error (exit code 2)\n{re.sub('(?m)^', '  ', SENTENCES.strip())}\n"
    assert (
        draft_model("logs", "--host", api.host, run_id, "train-draft-model").stdout == f"13:00:00 imported\n{SENTENCES}"
    )
    unknown = draft_model("logs", "--host", api.host, run_id, "evaluate")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "its steps so far: root, preflight, train-draft-model, clean-up" in unknown.stderr
    api.story = DONE
    done = draft_model("logs", "--host", api.host, run_id)
    told = (done.returncode, done.stdout, done.stderr)
    assert told == (0, "", "no step has failed; its steps: root, preflight, evaluate-draft-model\n")


def test_a_server_that_gives_no_logs(api):
    api.v1, api.story = False, failed("Error (exit code 2)", SENTENCES)
    done = draft_model("submit", "--host", api.host, *GIVEN, "--watch")
    (run_id,) = api.runs
    kubectl = f"kubectl logs -n kubeflow --selector pipeline/runid={run_id} --container main --prefix --tail 20"
    assert "  - train-draft-model:\n" in done.stderr
    assert done.stderr.endswith(f"logs: {kubectl}\n")
    logs = draft_model("logs", "--host", api.host, run_id)
    assert (logs.returncode, kubectl in logs.stderr) == (2, True)


def test_all_problems_at_once_and_nothing_is_sent(api, tmp_path):
    (tmp_path / "token").touch()
    (tmp_path / "run.yaml").write_text("num-epochs: 2\nlerning_rate: 1\ndataset_train_split: data.jsonl\n")
    done = draft_model(
        "submit", "--params", tmp_path / "run.yaml", "--set", "num_epochs=none", "--set", "seed",
        "--set", "chat_tempate=qwen", "--token-file", tmp_path / "token", "--ca-file", tmp_path / "run.yaml/empty",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: 9 problems:\n")
    for told in (
        f"--token-file: {tmp_path / 'token'} is empty",
        f"--ca-file: {tmp_path / 'run.yaml/empty'} cannot be read: Not a directory",
        "--host: not given, and neither KF_PIPELINES_ENDPOINT nor a kubeconfig says where KFP is",
        "--image: not given; ",
        "--set: given 'seed'; allowed: NAME=VALUE",
        "lerning_rate: no such parameter; did you mean learning_rate?",
        "chat_tempate: no such parameter; did you mean chat_template?",
        "num_epochs: given 'none'; allowed: an integer >= 1",
        "huggingface_id, pytorch_model_path, mlflow_model_path: exactly one must be given",
    ):
        assert f"  - {told}" in done.stderr
    assert not api.requests


def test_the_environment_can_say_who_where_and_what(api, tmp_path):
    api.token = "never-shown"
    (tmp_path / "token").write_text(api.token)
    done = draft_model(
        "submit", *GIVEN[2:], DRAFT_MODEL_IMAGES="importer=a:1 b/{kind}:1", KF_PIPELINES_ENDPOINT=api.host,
        KF_PIPELINES_SA_TOKEN_PATH=str(tmp_path / "token"), KF_PIPELINES_DEFAULT_EXPERIMENT_NAME="nightly",
        KF_PIPELINES_UI_ENDPOINT="https://kubeflow.example/pipeline/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "https://kubeflow.example/pipeline/#/runs/details/" in done.stderr
    assert not any(method == "GET" and "/runs/" in path for method, path, _ in api.requests), "nobody watches"
    assert [experiment["display_name"] for experiment in api.experiments.values()] == ["nightly"]
    assert "never-shown" not in done.stdout + done.stderr
    overridden = draft_model(
        "submit", "--host", api.host, "--token-file", tmp_path / "token", *GIVEN, "--experiment", "mine",
        KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME="the-platforms",
    )  # fmt: skip
    assert overridden.returncode == 0, overridden.stderr
    assert [experiment["display_name"] for experiment in api.experiments.values()][1:] == ["the-platforms"]


def test_who_stops_watching_is_told_how_to_go_on_and_how_to_end_the_run(api, started, tmp_path):
    api.story = RUNNING
    (tmp_path / "my token; id").write_text("token")
    process = started("submit", "--host", api.host, "--token-file", tmp_path / "my token; id", *GIVEN, "--watch")
    read_until(process, "preflight: RUNNING")
    process.terminate()
    _, error = process.communicate(timeout=60)
    (run_id,) = api.runs
    assert process.returncode == 143
    assert "Traceback" not in error
    follow, end = map(shlex.split, re.findall(r": draft-model (.+)", error))
    assert api.runs[run_id]["state"] == "RUNNING"
    assert (follow[0], end[0]) == ("watch", "terminate")
    assert draft_model(*end).returncode == 0
    ended = draft_model(*follow)
    assert ended.returncode == 1
    assert "error: the run was terminated (KFP: FAILED)" in ended.stderr


def test_a_watch_ends_where_a_pod_is_pending_for_longer_than_start_limit(api, monkeypatch):
    monkeypatch.setattr("kfp_pipeline.watch.STALL", -1.0)
    assert draft_model("submit", "--host", api.host, *GIVEN, "--set", "start_limit=1").returncode == 0
    (run,) = api.runs.values()
    run["created_at"] = f"{datetime.now(UTC) - timedelta(minutes=2):%Y-%m-%dT%H:%M:%SZ}"
    api.story = [("RUNNING", {"import-model": ("PENDING", "Unschedulable: 0/3 nodes are available", "")})]
    done = draft_model("watch", "--host", api.host, run["run_id"])
    assert done.returncode == 2
    assert f"End it: draft-model terminate --host {api.host} {run['run_id']}\n" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: import-model: its pod cannot start, and has waited for longer than start_limit (0:01:"
    )
    assert "Unschedulable: 0/3 nodes are available" in last


def test_a_run_that_is_not_there(api):
    for command in ("watch", "logs", "terminate"):
        done = draft_model(command, "--host", api.host, "no-such-run")
        assert done.returncode == 2
        assert "404: no-such-run not found" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_the_snippets_of_the_docs_run(api, environment, tmp_path, number):
    snippet = re.findall(r"```python\n(.+?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[number]
    (tmp_path / "pipeline.yaml").write_bytes(COMPILED.read_bytes())
    api.story = DONE
    done = subprocess.run(
        [sys.executable, "-c", snippet.replace("http://127.0.0.1:8080", api.host)], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (run,) = api.runs.values()
    assert done.stdout.split()[-1] == "SUCCEEDED"
    assert run["runtime_config"]["parameters"]["huggingface_id"] == "Qwen/Qwen3-8B"
    assert run["service_account"] == "draft-model-steps"


def test_the_docs_name_every_command_and_exit_code():
    text = DOCS.read_text(encoding="utf-8")
    for command in ("submit", "watch", "logs", "terminate", "compile"):
        assert f"draft-model {command} " in text
    options = set(re.findall(r"draft-model (?:submit|watch|terminate)[^`#]+", text))
    known = draft_model("submit", "--help").stdout
    assert all(option in known for line in options for option in re.findall(r"--[a-z-]+", line))
