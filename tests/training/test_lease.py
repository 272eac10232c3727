"""A checkpoint_path that runs share: one at a time, and a later one goes on where an earlier one stopped."""

import json
import logging
import os
import signal
import threading
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from draft_model import storage
from draft_model.entrypoint import USER_ERROR
from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.storage.local import LocalFolder
from draft_model.training import job, lease
from draft_model.training.lease import Lease, hold
from draft_model.training.trainer import Interrupted
from training.case import Trained, when_logged
from training.processes import start, train_all, train_killed_in

SHORT = 0.4
"""Seconds that a lease of these tests holds."""


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", SHORT)


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A folder that runs share, of each kind; there is none yet."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('object_store').bucket}/{uuid.uuid4().hex}"
    return str(tmp_path / "shared")


def held(place):
    return json.loads(storage.read_file(f"{place}/lease.json") or b"null")


class Crash(Exception):
    """The process dies here."""


def crash():
    raise Crash


terminate = partial(os.kill, os.getpid(), signal.SIGTERM)


def test_a_second_run_is_refused_while_the_first_is_there(place, short):
    with hold(place, "first", outermost=True):
        assert held(place)["run_id"] == "first"
        with pytest.raises(DraftModelError) as caught, hold(place, "second", outermost=True):
            pass
        (problem,) = caught.value.problems
        assert problem.startswith(f"checkpoint_path: given '{place}', where run first (process ")
        assert f"has been at work since {held(place)['since']}: wait for its end, or give this run another" in problem
        assert held(place)["run_id"] == "first"
    with hold(place, "second", outermost=True):  # now it may
        assert held(place)["run_id"] == "second"
    assert held(place) is None


@pytest.fixture
def elsewhere(monkeypatch):
    """Gives the lease of a run on another machine, whose processes cannot be looked up here."""

    def taken(place, run_id="gone"):
        other = Lease(place, run_id)
        with monkeypatch.context() as there:
            there.setattr(lease, "this_process", lambda: lease.Process(name="there:7", table="another", pid=7))
            assert other.acquire()
        return other

    return taken


def test_a_run_that_is_gone_loses_its_lease(place, short, elsewhere, caplog):
    caplog.set_level(logging.INFO, "draft_model")
    gone = elsewhere(place)
    begun = time.monotonic()
    with hold(place, "next", outermost=True):
        assert time.monotonic() - begun >= SHORT
        assert held(place)["run_id"] == "next"
        with pytest.raises(DraftModelError, match=r"belongs to run next .*writes nothing more there"):
            gone.renew()  # it was only slow, and must not write any more
        assert gone.lost
        gone.end(release=True)
        assert held(place)["run_id"] == "next"
    assert "has the lease of run gone (process there:7)" in caplog.text
    assert "run gone (process there:7) is gone, and its lease taken over" in caplog.text


def test_a_holder_that_slept_while_another_came_and_ended_writes_nothing_more(place, short, elsewhere):
    slow = elsewhere(place, "slow")
    with hold(place, "next", outermost=True):
        pass
    with pytest.raises(DraftModelError, match="is no longer leased to this run"):
        slow.renew()
    assert slow.lost
    assert held(place) is None


def test_of_two_that_take_over_at_once_one_does(place, short, elsewhere, monkeypatch):
    elsewhere(place)
    both = {name: Lease(place, name) for name in ("one", "two")}
    replace_file, found = storage.replace, {}

    def overtaken(uri, data, version):
        monkeypatch.setattr(storage, "replace", replace_file)
        found["two"] = both["two"].acquire()  # between the first one's reading and its writing
        return replace_file(uri, data, version)

    monkeypatch.setattr(storage, "replace", overtaken)
    with pytest.raises(DraftModelError, match="where run two"):
        both["one"].acquire()
    assert found == {"two": True}
    assert held(place)["run_id"] == "two"


@pytest.mark.parametrize("request_", ["create", "replace"])
def test_an_output_in_a_store_without_conditional_writes_goes_without_a_lease(place, monkeypatch, caplog, request_):
    def refuse(uri, *_):
        raise DraftModelError(f"{uri}: the store does not support conditional writes")

    monkeypatch.setattr(storage, request_, refuse)
    with hold(place, "run", outermost=True, parameter="output") as none:
        assert none is None
        assert held(place) is None
    assert "a second run there would not be noticed" in caplog.text
    with pytest.raises(DraftModelError, match="conditional writes"), hold(place, "run", outermost=True):
        pass


def test_two_runs_at_once_do_not_share_an_output(train, plain, tmp_path):
    output = str(tmp_path / "shared")
    with hold(output, "first", outermost=True, parameter="output"):
        with pytest.raises(
            DraftModelError, match=r"output: given .*, where run first \(process .*\) has been at work since"
        ):
            train(output)
        assert [path.name for path in (tmp_path / "shared").iterdir()] == ["lease.json"]
    assert train(output).losses == plain.losses
    assert held(output) is None


def test_processes_of_one_run_share_its_lease_until_the_outermost_ends(place, short):
    with hold(place, "run", outermost=True):
        with hold(place, "run", outermost=False):
            pass
        assert held(place)["run_id"] == "run"
    assert held(place) is None


def test_a_coordinator_that_is_started_again_ends_the_lease_that_it_found(place, short):
    Lease(place, "run").acquire()
    with hold(place, "run", outermost=True):
        pass
    assert held(place) is None


@pytest.mark.parametrize(
    "left",
    [
        '{"run_id": "x', "[1]", '{"processes": 5}', '{"seconds": 1e300}', '{"seconds": NaN}',
        json.dumps({"run_id": 3, "processes": [{"table": lease.this_process().table, "name": "x"}]}),
        json.dumps({"run_id": "x", "renewed": "soon", "processes": [lease.this_process().model_dump()]}),
    ],
)  # fmt: skip
def test_a_lease_that_is_half_written_or_in_another_form_runs_out(tmp_path, short, left):
    (tmp_path / "lease.json").write_text(left)
    with hold(str(tmp_path), "next", outermost=True):
        assert held(str(tmp_path))["run_id"] == "next"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_lease_that_is_no_plain_file_is_refused(tmp_path, make):
    make(tmp_path / "lease.json")
    with pytest.raises(DraftModelError, match=r"lease.json is there and no plain file"):
        Lease(str(tmp_path), "run").acquire()


def test_a_lease_is_renewed_again_when_the_store_is_back(place, short, monkeypatch, caplog):
    with hold(place, "run", outermost=True):
        write, tried = storage.replace, threading.Event()

        def away(uri, data, version):
            tried.set()
            raise StoreUnavailable(f"{uri}: the object store cannot be reached")

        monkeypatch.setattr(storage, "replace", away)
        assert tried.wait(10)
        before = held(place)
        monkeypatch.setattr(storage, "replace", write)
        deadline = time.monotonic() + 10
        while held(place) == before:
            assert time.monotonic() < deadline
    assert "cannot be reached" in caplog.text


def test_a_later_run_goes_on_where_an_earlier_one_stopped(train, plain, place):
    first = replace(train.config(checkpoint_path=place), run_id="first")
    with when_logged("step 5, ", terminate), pytest.raises(Interrupted):
        job.run(first)
    assert json.loads(storage.read_bytes(f"{place}/checkpoints.json")) == ["epoch_1", "step_5"]
    assert not list(Path(first.output).iterdir())
    second = replace(train.config(checkpoint_path=place, resume="true"), run_id="second")
    trained = Trained(job.run(second))
    assert trained.losses == plain.losses
    assert trained.read("final/model.safetensors") == plain.read("final/model.safetensors")
    assert [path.name for path in Path(trained.output).iterdir()] == ["final"]
    names = json.loads(storage.read_bytes(f"{place}/checkpoints.json"))
    runs = [storage.read_manifest(f"{place}/{name}").properties["run_id"] for name in names]
    assert list(zip(names, runs, strict=True)) == [
        ("epoch_1", "first"), ("step_5", "first"), ("epoch_2", "second"), ("epoch_3", "second"), ("epoch_4", "second"),
    ]  # fmt: skip
    assert held(place) is None


def test_a_run_without_resume_begins_anew_and_its_attempts_go_on_from_its_own(train, plain, place, caplog):
    Trained(job.run(replace(train.config(checkpoint_path=place, num_epochs=1, seed=3), run_id="first")))
    second = replace(train.config(checkpoint_path=place), run_id="second")
    with when_logged("step 2, ", crash), pytest.raises(Crash):
        job.run(second)
    assert "resumed from" not in caplog.text  # the first run's checkpoint is none of its own
    assert f"resume=false: 1 checkpoint(s) under {place} are forgotten" in caplog.text
    with when_logged("step 8, ", crash), pytest.raises(Crash):
        job.run(second)
    assert "resumed from" not in caplog.text
    assert Trained(job.run(second)).losses == plain.losses
    assert f"resumed from {place}/epoch_2 at step 6" in caplog.text


def test_a_killed_run_of_this_machine_is_known_to_be_gone_and_the_next_run_goes_on(train, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=time.monotonic, sleep=None))  # it waits for nothing
    place, log = str(tmp_path / "shared"), tmp_path / "log"
    config = replace(train.config(checkpoint_path=place, num_epochs=8, eval_interval=8), run_id="killed")
    process = start(train_all, [config.to_json()], [0], log=log)
    while not (log.exists() and "checkpoint epoch_1: " in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert held(place)["run_id"] == "killed"
    trained = train(checkpoint_path=place, resume="true", num_epochs=8, eval_interval=8)
    assert trained.result.steps == 26
    assert held(place) is None


def give_to_another(place):
    (place / "lease.json").write_text(json.dumps({"run_id": "other", "processes": [{"name": "there:1"}]}))


def test_a_run_whose_lease_went_to_another_stops_and_writes_nothing_more(train, tmp_path):
    place = tmp_path / "shared"

    lost = pytest.raises(DraftModelError, match="belongs to run other")
    with when_logged("checkpoint epoch_1: ", partial(give_to_another, place)), lost as caught:
        train(checkpoint_path=str(place))
    assert json.loads((place / "checkpoints.json").read_text()) == ["epoch_1"]
    assert held(str(place))["run_id"] == "other"
    kept = Path(str(caught.value).partition("it stays in ")[2].partition(",")[0])
    assert (kept / "manifest.json").is_file()


@pytest.mark.parametrize("late", ["epoch_1", "final"])
def test_a_holder_that_paused_within_an_upload_publishes_nothing(train, tmp_path, monkeypatch, late):
    place, put = tmp_path / "shared", LocalFolder.put

    def overtaken(folder, path, record):
        put(folder, path, record)
        if folder.uri.endswith(late):
            give_to_another(place)

    monkeypatch.setattr(LocalFolder, "put", overtaken)
    with pytest.raises(DraftModelError, match="belongs to run other"):
        train(str(place), num_epochs=1)
    assert (place / late / "model.safetensors").is_file()
    assert not (place / late / "manifest.json").exists()


def stopped_with_a_short_lease(config, point, name):
    lease.SECONDS = SHORT
    return train_killed_in(config, f"draft_model.storage.{point}", name, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("where", "point", "name", "resume"),
    [
        ("local", "local:LocalFolder.put", "epoch_2", "true"),
        ("local", "local:LocalFolder.replace", "checkpoints.json", "false"),
        ("s3", "s3:S3Folder.write", "epoch_2/manifest.json", "false"),
        ("s3", "s3:S3Folder.remove_all", "epoch_1", "false"),
    ],
)
def test_a_holder_that_is_stopped_within_a_publication_harms_nothing_of_the_next_run(
    train, tmp_path, request, short, where, point, name, resume
):
    place = str(tmp_path / "shared")
    if where == "s3":
        place = f"s3://{request.getfixturevalue('object_store').bucket}/{uuid.uuid4().hex}"
    config = replace(train.config(checkpoint_path=place, keep_checkpoints=1), run_id="stopped")
    process = start(stopped_with_a_short_lease, config.to_json(), point, name, log=tmp_path / "log")
    try:
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            assert process.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.01)
        time.sleep(SHORT)  # until its lease runs out
        job.run(replace(train.config(checkpoint_path=place, resume=resume, learning_rate=1e-3), run_id="second"))
        names = storage.read_bytes(f"{place}/checkpoints.json")
        os.kill(process.pid, signal.SIGCONT)
        process.join()
    finally:
        process.kill()
    assert process.exitcode == USER_ERROR, (tmp_path / "log").read_text()
    assert storage.read_bytes(f"{place}/checkpoints.json") == names
    manifests = {uri: storage.read_manifest(uri) for uri in (f"{place}/{name}" for name in json.loads(names))}
    own = {uri: manifest for uri, manifest in manifests.items() if manifest.properties["run_id"] == "second"}
    assert len(own) == (3 if resume == "true" else 4)
    assert all(storage.is_whole(*whole) for whole in own.items())
