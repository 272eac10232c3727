"""Tracking on a real MLflow server: what arrives, and that no state of the server stops the tracked code."""

import http.client
import http.server
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest
from click.testing import CliRunner
from training.case import QUICK, make_inputs

from draft_model.cli import cli
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from draft_model.tracking import send_log, track
from draft_model.tracking.server import RUN, Server, Settings
from draft_model.training import TrainConfig
from draft_model.training.job import run as train

STEPS = 300
batch = Server._batch


class MlflowServer:
    """`mlflow server` on a port and a database that outlive its process."""

    def __init__(self, root):
        self.root = root
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self):
        with (self.root / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.root}/tracking.db",
                 "--artifacts-destination", str(self.root / "artifacts"), "--port", str(self.port), "--workers", "1"],
                stdout=log, stderr=log, cwd=self.root, start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        waiting = threading.Event()
        for _ in range(600):
            assert self.process.poll() is None, (self.root / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                waiting.wait(0.2)
        raise AssertionError((self.root / "server.log").read_text())

    def kill(self):
        os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def tracked(server, monkeypatch):
    """Leads to the server; no variable of the machine's own is left."""
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv(RUN, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    return server


@pytest.fixture
def client(tracked):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracked.address)


def runs(client, name):
    experiment = client.get_experiment_by_name("draft-model")
    return client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")


def history(client, run, metric):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]


def tracking(stage, folder, **settings):
    """Tracks a stage whose scratch folder and output lie in a folder."""
    return track(stage, folder / "work", str(folder / "output"), **settings)


EXPECTED = [(step, step / 2) for step in range(STEPS)]


def test_a_stage_is_a_run_with_all_that_it_told(client, tmp_path, monkeypatch):
    monkeypatch.setenv(RUN, "one run")
    with tracking("train", tmp_path) as tracker:
        tracker.parameters({"seed": 0, "draft_model_config": ""})
        tracker.inputs({"target": ("s3://b/model", "d" * 64), "dataset": ("s3://b/data", "e" * 64)})
        for step in range(STEPS):
            tracker.metrics(step, {"loss": [step / 2, None, 3.0], "learning_rate": 0.5, "nothing": None})
        tracker.references({"final": "s3://b/final"})
        tracker.register("my-draft", "s3://b/final")
    (run,) = runs(client, "train")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0"}
    assert run.data.tags["artifact.final"] == "s3://b/final"
    assert set(run.data.metrics) == {"loss_1", "loss_3", "learning_rate"}
    assert history(client, run, "loss_1") == EXPECTED
    assert {i.dataset.name: json.loads(i.dataset.source)["uri"] for i in run.inputs.dataset_inputs} == {
        "target": "s3://b/model", "dataset": "s3://b/data",
    }  # fmt: skip
    (version,) = client.search_model_versions("name = 'my-draft'")
    assert (version.source, version.run_id) == ("s3://b/final", run.info.run_id)
    with pytest.raises(ZeroDivisionError), tracking("evaluate", tmp_path):
        raise ZeroDivisionError
    (evaluation,) = runs(client, "evaluate")
    parents = {found.data.tags["mlflow.parentRunId"] for found in (run, evaluation)}
    assert len(parents) == 1
    parent = client.get_run(parents.pop())
    assert (parent.info.run_name, parent.info.status, evaluation.info.status) == ("draft-model", "FAILED", "FAILED")


def test_stages_that_run_beside_one_another_have_one_parent(client, tmp_path, monkeypatch):
    monkeypatch.setenv(RUN, "two at once")
    both = threading.Barrier(2)
    look = Server._oldest_first

    def look_at_once(server, *what):
        found = look(server, *what)
        if not found:  # neither has made one yet, and both are about to
            both.wait(60)
        return found

    monkeypatch.setattr(Server, "_oldest_first", look_at_once)
    with tracking("import", tmp_path) as one, tracking("dataset", tmp_path) as other:
        one.metrics(1, {"a": 1.0})
        other.metrics(1, {"a": 1.0})
    parents = {run.data.tags["mlflow.parentRunId"] for name in ("import", "dataset") for run in runs(client, name)[:1]}
    assert len(parents) == 1
    experiment = client.get_experiment_by_name("draft-model").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`draft_model.run` = 'two at once'")
    assert (parent.info.run_id, parent.info.status) == (parents.pop(), "FINISHED")


def test_a_stage_that_succeeds_the_second_time_leaves_no_failed_parent(client, tmp_path, monkeypatch):
    monkeypatch.setenv(RUN, "again")

    def parent():
        experiment = client.get_experiment_by_name("draft-model").experiment_id
        (found,) = client.search_runs([experiment], "tags.`draft_model.run` = 'again'")
        return found.info.status

    with pytest.raises(ZeroDivisionError), tracking("train", tmp_path):
        raise ZeroDivisionError
    assert parent() == "FAILED"
    with tracking("other", tmp_path):
        pass
    assert parent() == "FAILED"
    with tracking("train", tmp_path):
        pass
    assert parent() == "FINISHED"


def test_the_run_that_kfp_made_is_written_to_and_left_to_kfp(client, tmp_path, monkeypatch):
    made = client.create_run(client.create_experiment("of kfp"), run_name="task")
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with tracking("train", tmp_path) as tracker:
        tracker.metrics(1, {"loss": 2.0})
    found = client.get_run(made.info.run_id)
    assert (found.data.metrics, found.info.status) == ({"loss": 2.0}, "RUNNING")


def test_without_a_tracking_uri_nothing_is_tracked(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracking("train", tmp_path) as tracker:
        tracker.metrics(1, {"loss": 2.0})
    assert list(tmp_path.iterdir()) == []


def test_the_ids_of_the_environment_hold_for_its_own_server():
    there = {"MLFLOW_TRACKING_URI": "http://a", "MLFLOW_RUN_ID": "1", "MLFLOW_EXPERIMENT_ID": "2"}
    for uri in ("", "http://a"):
        settings = Settings.of_environment("train", there, uri)
        assert (settings.uri, settings.run_id, settings.experiment_id) == ("http://a", "1", "2")
    settings = Settings.of_environment("train", there, "http://b")
    assert (settings.uri, settings.run_id, settings.experiment_id) == ("http://b", "", "")


def test_a_password_is_never_shown():
    settings = Settings.of_environment("train", {"MLFLOW_TRACKING_URI": "https://me:secret@host:1/x?token=secret"})
    assert settings.shown_uri == "https://host:1/x"


def test_a_server_that_is_killed_in_the_middle_gets_what_it_missed(tracked, client, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "draft_model.tracking"), tracking("killed", tmp_path) as tracker:
        for step in range(STEPS):
            tracker.metrics(step, {"loss": step / 2})
            if step == STEPS // 2:
                tracked.kill()
        while not caplog.records:  # the sender has met the dead server
            threading.Event().wait(0.05)
        tracked.start()
    assert len(caplog.records) == 1
    assert "what is missed is sent later" in caplog.text
    (run,) = runs(client, "killed")
    assert history(client, run, "loss") == EXPECTED
    assert run.info.status == "FINISHED"


class Gate(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a server once a gate is open."""

    def _pass_on(self):
        self.server.asked.set()
        self.server.gate.wait()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        behind.request(self.command, self.path, body, kept)
        answer = behind.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = _pass_on

    def log_message(self, *_):
        pass


class Refusing(Gate):
    """Refuses every request."""

    def _refuse(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b'{"error_code": "PERMISSION_DENIED", "message": "no"}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = _refuse


@pytest.fixture
def front(monkeypatch, tracked):
    """Starts a server in front of the real one; the environment leads to it."""
    started = []

    def start(handler):
        front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        front.daemon_threads = True
        front.gate, front.asked, front.behind = threading.Event(), threading.Event(), tracked.port
        threading.Thread(target=front.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{front.server_port}")
        started.append(front)
        return front

    yield start
    for server in started:
        server.gate.set()
        server.shutdown()
        server.server_close()


def test_nothing_waits_for_a_server_that_does_not_answer(client, front, tmp_path):
    gate = front(Gate)
    with tracking("slow", tmp_path) as tracker:
        for step in range(STEPS):
            tracker.metrics(step, {"loss": step / 2})
        # All steps are done, and the server has not answered once: it has a request, and no answer was let through.
        assert gate.asked.wait(60)
        assert not gate.gate.is_set()
        gate.gate.set()
    (run,) = runs(client, "slow")
    assert history(client, run, "loss") == EXPECTED


def test_a_training_is_done_before_the_server_has_answered_once(client, front, tmp_path):
    inputs = make_inputs(tmp_path)
    gate = front(Gate)
    p = Parameters(**{**QUICK, "draft_model_config": inputs.draft_config})
    final = tmp_path / "output/final"

    def open_at_the_end():
        while not (final / "manifest.json").exists():
            threading.Event().wait(0.05)
        gate.asked.wait()
        gate.gate.set()

    threading.Thread(target=open_at_the_end, daemon=True).start()
    train(TrainConfig(inputs.model, inputs.dataset, str(tmp_path / "output"), tmp_path / "work", p))
    run, *_ = runs(client, "train")
    log = json.loads((final / "training.json").read_text(encoding="utf-8"))["log"]
    assert len(log) > 1
    assert history(client, run, "loss_1") == [(entry["step"], entry["loss"][0]) for entry in log]
    assert run.info.status == "FINISHED"


def test_a_server_that_never_answers_is_left_at_the_end_and_told_later(
    front, tracked, client, tmp_path, caplog, monkeypatch
):
    front(Gate)
    with tracking("silent", tmp_path, end_seconds=0.1) as tracker:
        for step in range(STEPS):
            tracker.metrics(step, {"loss": step / 2})
    assert len(caplog.records) == 1
    (log,) = (tmp_path / "output").iterdir()
    assert f"has not taken everything; all of it is in {log}" in caplog.text
    shutil.rmtree(tmp_path / "work")  # what a pod leaves
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(DraftModelError, match=r"MLFLOW_TRACKING_URI: http://127.0.0.1:9 does not take"):
        send_log(str(log))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked.address)
    done = CliRunner().invoke(cli, ["track", str(log)], catch_exceptions=False)
    assert done.exit_code == 0
    (run,) = runs(client, "silent")
    assert done.stdout.strip() == run.info.run_id
    assert history(client, run, "loss") == EXPECTED
    assert run.info.status == "FINISHED"


def test_a_log_that_is_sent_later_goes_on_in_the_run_that_was_begun(tracked, client, tmp_path, caplog, monkeypatch):
    begun = threading.Event()
    monkeypatch.setattr(Server, "_batch", lambda server, records: begun.set() or batch(server, records))
    with tracking("begun", tmp_path, end_seconds=0.1) as tracker:
        tracker.metrics(0, {"loss": 0.0})
        assert begun.wait(60)
        tracked.kill()
        for step in range(1, STEPS):
            tracker.metrics(step, {"loss": step / 2})
    tracked.start()
    (log,) = (tmp_path / "output").iterdir()
    assert send_log(str(log)) == runs(client, "begun")[0].info.run_id
    (run,) = runs(client, "begun")
    assert history(client, run, "loss") == EXPECTED
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("text", ["", "no log", "[]", '{"kind": "metrics", "values": {"loss": 1.0}}'])
def test_what_is_no_log_is_refused(tracked, tmp_path, text):
    file = tmp_path / "log.jsonl"
    file.write_text(text)
    with pytest.raises(DraftModelError, match="is no log of a stage's tracking"):
        send_log(str(file))


def test_a_server_that_refuses_is_asked_once(front, tmp_path, caplog):
    front(Refusing)
    with tracking("refused", tmp_path) as tracker:
        for step in range(STEPS):
            tracker.metrics(step, {"loss": 1.0})
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "the server refuses" in caplog.text
    (log,) = (tmp_path / "output").iterdir()
    assert log.read_text().count('"loss": 1.0') == STEPS
