"""Tracking on a real MLflow store: what arrives, and that no state of a server stops the tracked code."""

import logging
import math
import os
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest
from answers import answering

from draft_model import tracking
from draft_model.tracking import RUN, track

STEPS = 300
EXPECTED = [(step, step / 2) for step in range(STEPS)]


@pytest.fixture
def uri(store, tmp_path, monkeypatch):
    """A store that the environment leads to; no variable of the machine's own is left."""
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv(RUN, raising=False)
    monkeypatch.setattr(tracking, "_DEFAULTS", {"MLFLOW_DISABLE_TELEMETRY": "true"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(tmp_path / "mlflow.db"))
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def test_mlflow_is_imported_before_a_second_thread_can(tmp_path):
    """Two threads that import it at once get a module that is half initialised."""
    code = """
import sys
from draft_model.tracking import Tracker, track
Tracker.work = lambda tracker: print("mlflow.tracking" in sys.modules)
with track("import", sys.argv[1]):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def runs(client, name):
    experiment = client.get_experiment_by_name("draft-model")
    return client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")


def history(client, run, metric):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]


def test_a_stage_is_a_run_with_all_that_it_reported(client, monkeypatch):
    monkeypatch.setenv(RUN, "one run")
    with track("train") as tracker:
        tracker.parameters({"seed": 0, "draft_model_config": "", "long": "x" * 9000})
        for step in range(STEPS):
            values = {"loss": [step / 2, None, 3.0], "learning_rate": 0.5, "nothing": None, "diverged": math.nan}
            tracker.metrics(step, values | {"far": [math.inf]})
        tracker.references({"final": "s3://b/final"})
    (run,) = runs(client, "train")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "long": "x" * 6000}
    assert run.data.tags["artifact.final"] == "s3://b/final"
    assert set(run.data.metrics) == {"loss_1", "loss_3", "learning_rate"}
    assert history(client, run, "loss_1") == EXPECTED
    with pytest.raises(ZeroDivisionError), track("evaluate"):
        raise ZeroDivisionError
    (evaluation,) = runs(client, "evaluate")
    parents = {found.data.tags["mlflow.parentRunId"] for found in (run, evaluation)}
    assert len(parents) == 1
    parent = client.get_run(parents.pop())
    assert (parent.info.run_name, parent.info.status, evaluation.info.status) == ("draft-model", "FAILED", "FAILED")


def test_a_stage_that_succeeds_the_second_time_leaves_no_failed_parent(client, monkeypatch):
    monkeypatch.setenv(RUN, "again")
    with pytest.raises(ZeroDivisionError), track("train"):
        raise ZeroDivisionError
    assert runs(client, "draft-model")[0].info.status == "FAILED"
    for stage, status in (("other", "FAILED"), ("train", "FINISHED")):
        with track(stage):
            pass
        assert runs(client, "draft-model")[0].info.status == status


def test_the_run_that_kfp_made_is_written_to_and_left_to_kfp(client, store, tmp_path, monkeypatch):
    made = client.create_run(client.create_experiment("of kfp"), run_name="task")
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with track("train") as tracker:
        tracker.metrics(1, {"loss": 2.0})
    found = client.get_run(made.info.run_id)
    assert (found.data.metrics, found.info.status) == ({"loss": 2.0}, "RUNNING")
    with track("train", store(tmp_path / "other.db")) as tracker:  # the environment's ids are not those of another
        tracker.metrics(1, {"loss": 3.0})
    assert client.get_run(made.info.run_id).data.metrics == {"loss": 2.0}


@pytest.mark.parametrize("given", ["", "mlflow:5000", "10.0.0.1:5000/path"])
def test_without_a_tracking_uri_nothing_is_tracked(uri, tmp_path, monkeypatch, given, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with track("train") as tracker:
        assert not tracker.active
        tracker.metrics(1, {"loss": 2.0})
    assert list(here.iterdir()) == []
    assert ("put http:// or https:// before it" in caplog.text) == bool(given)


def test_a_server_that_comes_back_gets_what_follows(uri, store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "PAUSE", 0.0)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    away = tmp_path / "away"
    away.write_text("no folder, so there can be no database in it")
    with track("train", f"sqlite:///{away}/mlflow.db") as tracker:
        tracker.metrics(1, {"loss": 1.0})
        while not caplog.records:
            threading.Event().wait(0.01)
        away.unlink()
        away.mkdir()
        store(away / "mlflow.db")
        tracker.metrics(2, {"loss": 2.0})
    from mlflow import MlflowClient

    back = MlflowClient(tracking_uri=f"sqlite:///{away}/mlflow.db")
    (run,) = runs(back, "train")
    assert run.info.status == "FINISHED"
    assert history(back, run, "loss") == [(2, 2.0)]
    assert [record.levelname for record in caplog.records if record.name == "draft_model.tracking"] == ["WARNING"] * 2
    assert "has not taken 1 records" in caplog.text


@pytest.fixture
def front(uri, monkeypatch):
    """Starts a server that answers each request by a function; the environment leads to it."""
    with ExitStack() as started:

        def start(answer):
            address = started.enter_context(answering(answer))
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{address.replace('//', '//me:s3cret@')}/?x=s3cret")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            return address

        yield start


def test_nothing_waits_for_a_server_that_never_answers(front, caplog, monkeypatch):
    gate = threading.Event()
    front(lambda path: gate.wait() and (200, b""))
    monkeypatch.setattr(tracking, "END_SECONDS", 0.1)
    with track("slow") as tracker:
        for step in range(STEPS):
            tracker.metrics(step, {"loss": step / 2})
    (record,) = caplog.records
    assert "records; their numbers are in the stage's output" in record.message
    assert "s3cret" not in caplog.text
    gate.set()


def test_a_server_that_refuses_is_asked_once(front, caplog):
    content = b'{"error_code": "PERMISSION_DENIED", "message": "not you, http://a:s3cret@b"}'
    asked = []
    address = front(lambda path: asked.append(path) or (403, content))
    with caplog.at_level(logging.WARNING, "draft_model.tracking"), track("refused") as tracker:
        for step in range(STEPS):
            tracker.metrics(step, {"loss": 1.0})
    assert len(asked) == 2  # with the first record, and at the end
    # The thread of the test before may still report its own server.
    first, last = (r.message for r in caplog.records if f"tracking: {address}" in r.message)
    assert "not you" in first
    assert f"has not taken {STEPS + 1} records" in last
    assert "s3cret" not in first + last
