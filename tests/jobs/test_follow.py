"""Following a job: states, limits, an API server that is away, queues that nobody manages, reasons of failure."""

from __future__ import annotations

import re
import threading

import pytest

from draft_model.jobs import watch
from draft_model.jobs.backend import Forbidden, Pod, Unavailable
from draft_model.jobs.cluster import Gone
from draft_model.jobs.failures import classify
from draft_model.jobs.follow import Follower
from draft_model.jobs.logs import LogStreams, Valve, prefixed
from draft_model.jobs.pytorchjob import PyTorchJobs
from draft_model.jobs.states import State
from draft_model.jobs.trainjob import TrainJobs
from jobs.fake import Clock, FakeCluster, pod, status
from jobs.requests import GOLDEN, request


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Follows a job through scripted looks; gives its end and the cluster."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(watch, "POLL_ALONE_SECONDS", 0.0)

    def follow(*script, wanted=None, prepare=None):
        clock = Clock()
        cluster = FakeCluster(script, clock)
        backend = PyTorchJobs(cluster)
        job = backend.create_or_adopt(wanted or GOLDEN["1x1"])
        if prepare:
            prepare(cluster)
        logs = LogStreams(backend, job, tmp_path, lambda line: None)
        return Follower(backend, job, logs, clock).follow(), cluster

    return follow


STARTING, RUNNING, DONE = status("Created"), status("Running", active=1), status("Succeeded")


def test_the_states_in_a_row_are_told(follow, caplog):
    caplog.set_level("INFO", "draft_model")
    outcome, _ = follow(STARTING, RUNNING, status("Restarting", "again"), RUNNING, DONE)
    assert outcome.state is State.SUCCEEDED
    told = [found[1] for record in caplog.records if (found := re.search(r"-a0: ([A-Z]+)", record.message))]
    assert told == ["STARTING", "RUNNING", "RESTARTING", "RUNNING", "SUCCEEDED"]


@pytest.mark.parametrize(
    ("script", "parameters", "reason", "words"),
    [
        ([STARTING], {"start_limit": 5}, "Start", "start_limit: .* exceeded 5 minutes"),
        ([status(suspend=True)], {"queue_limit": 7}, "Queue", "queue_limit: .* exceeded 7 minutes"),
        ([RUNNING], {"run_limit": 9}, "Run", "run_limit: .* exceeded 9 minutes"),
        ([RUNNING, RUNNING, status(suspend=True), STARTING] * 9, {"run_limit": 12}, "Run", "run_limit"),
    ],
)
def test_each_phase_has_its_own_limit(follow, script, parameters, reason, words):
    outcome, _ = follow(*script, wanted=request(**parameters))
    assert outcome.failure.reason == reason
    assert not outcome.failure.retryable
    assert re.search(words, outcome.failure.problems[0])


def test_a_long_queue_does_not_use_up_the_time_to_start_or_run(follow):
    queued = [status(suspend=True)] * 50
    outcome, _ = follow(*queued, STARTING, RUNNING, DONE, wanted=request(start_limit=3, run_limit=3))
    assert outcome.state is State.SUCCEEDED


def test_an_api_server_that_is_away_ends_nothing(follow, caplog):
    caplog.set_level("INFO", "draft_model")
    away = [Unavailable("refused")] * 30
    outcome, _ = follow(RUNNING, *away, RUNNING, *away, DONE)
    assert outcome.state is State.SUCCEEDED
    assert sum("does not answer" in record.message for record in caplog.records) == 2


def test_a_right_that_is_missing_from_the_start_is_told_at_once(follow):
    with pytest.raises(Forbidden, match="get pytorchjobs"):
        follow(Forbidden("may not get pytorchjobs"))


def test_a_server_that_has_not_read_its_roles_yet_is_waited_for(follow):
    outcome, _ = follow(RUNNING, Forbidden("may not get pytorchjobs"), DONE)
    assert outcome.state is State.SUCCEEDED
    with pytest.raises(Forbidden):
        follow(RUNNING, *[Forbidden("may not get pytorchjobs")] * 5, DONE)


def test_a_job_that_is_gone_was_deleted(follow):
    outcome, _ = follow(RUNNING, None)
    assert outcome.state is State.DELETED
    assert "was deleted while it was RUNNING" in outcome.failure.problems[0]


def test_a_queue_without_kueue_is_found_out_and_one_with_it_is_not(follow, caplog):
    caplog.set_level("INFO", "draft_model")
    waiting = status("Suspended", suspend=True)
    outcome, _ = follow(waiting, wanted=GOLDEN["queue"])
    assert outcome.failure.reason == "UnmanagedQueue"

    def manage(cluster):
        (job,) = cluster.objects_there.values()
        said = [{"type": "QuotaReserved", "message": "16 more GPUs are needed"}]
        owner = [{"uid": job["metadata"]["uid"]}]
        cluster.kueue = [{"metadata": {"ownerReferences": owner}, "status": {"conditions": said}}]

    running = status("Running", active=2, suspend=False)
    outcome, _ = follow(*[waiting] * 5, running, DONE, wanted=GOLDEN["queue"], prepare=manage)
    assert outcome.state is State.SUCCEEDED
    assert any("queue research: 16 more GPUs are needed" in record.message for record in caplog.records)


def test_an_image_that_cannot_be_pulled_ends_the_wait(follow):
    stuck = status("Created", pods=[pod(waiting={"reason": "ImagePullBackOff", "message": "no such tag"})])
    outcome, _ = follow(stuck)
    assert outcome.failure.reason == "ImagePull"
    assert "no such tag" in outcome.failure.problems[0]


def test_what_was_never_scheduled_is_told_with_the_schedulers_words(follow):
    unscheduled = pod(waiting={})
    unscheduled["status"] = {"conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/5 nodes have 8 GPUs"}
    ]}  # fmt: skip
    outcome, _ = follow(status("Created", pods=[unscheduled]), wanted=request(start_limit=2))
    assert outcome.failure.reason == "Unschedulable"
    assert "0/5 nodes have 8 GPUs" in " ".join(outcome.failure.problems)


def test_warning_events_of_the_job_are_shown_once(follow, caplog):
    def warn(cluster):
        cluster.events = [
            {"involvedObject": {"name": "draft-3f2c9a10-a0"}, "reason": "FailedCreatePod", "message": "exceeded quota"},
            {"involvedObject": {"name": "draft-00000000-a0"}, "reason": "Other", "message": "somebody else's"},
        ]

    follow(STARTING, STARTING, STARTING, DONE, prepare=warn)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "draft-3f2c9a10-a0: FailedCreatePod: exceeded quota"
    ]


PEER = Pod("p1", 1, ended=True, exit_code=1, finished="2026-01-01T00:00:03Z")


@pytest.mark.parametrize(
    ("cause", "tail", "reason", "retryable"),
    [
        (Pod("p0", 0, ended=True, exit_code=2, message='{"problems": ["a: bad"]}'), [], "UserError", False),
        (Pod("p0", 0, ended=True, exit_code=137, reason="OOMKilled"), [], "OOMKilled", False),
        (Pod("p0", 0, ended=True, exit_code=137, reason="Error"), [], "Killed", True),
        (Pod("p0", 0, ended=True, exit_code=143, reason="Error"), [], "Killed", True),
        (Pod("p0", 0, ended=True, reason="Evicted", message="low on memory"), [], "Evicted", True),
        (Pod("p0", 0, ended=True, reason="NodeLost"), [], "NodeLost", True),
        (Pod("p0", 0, ended=True, reason="PreemptionByScheduler", exit_code=143), [], "PreemptionByScheduler", True),
        (Pod("p0", 0, ended=True, exit_code=1), ["Traceback ...", "KeyError: 'x'"], "Error", False),
        (Pod("p0", 0, ended=True, exit_code=1), ["torch.OutOfMemoryError: CUDA out of memory"], "GPUMemory", False),
        (Pod("p0", 0, ended=True, exit_code=134), ["Watchdog caught collective operation timeout"], "Collective", True),
    ],
)  # fmt: skip
def test_the_cause_is_told_and_not_what_it_did_to_the_others(cause, tail, reason, retryable):
    tails = {"p0": tail, "p1": ["RuntimeError: Connection closed by peer [10.0.0.7]:4711"]}
    failure = classify("job", "failed", [PEER, cause], tails)
    assert (failure.reason, failure.retryable) == (reason, retryable)


def test_a_pod_that_lost_its_peers_is_not_blamed_while_another_still_ends(follow, monkeypatch):
    monkeypatch.setattr("draft_model.jobs.follow.DRAIN_SECONDS", 0.0)
    monkeypatch.setattr("draft_model.jobs.logs._AGAIN_SECONDS", 0.01)
    lost = pod("a", exitCode=1, message="Connection reset by peer", finishedAt="2026-01-01T00:00:01Z")
    killed = pod("b", exitCode=137, finishedAt="2026-01-01T00:00:09Z")
    looks = iter([[lost, pod("b")]] * 20)

    def still_ends(cluster):
        cluster.pods = lambda selector: next(looks, [lost, killed])

    outcome, _ = follow(status("Failed"), prepare=still_ends)
    assert outcome.failure.reason == "Killed"
    assert next(looks, None) is None


def test_a_trainers_problems_come_word_for_word_and_a_crash_with_its_last_lines():
    mistake = Pod("p0", 0, ended=True, exit_code=2, message='{"problems": ["a: given 1", "b: given 2"]}')
    assert classify("job", "", [PEER, mistake], {}).problems == ["a: given 1", "b: given 2"]
    crash = classify("job", "", [Pod("p0", 0, ended=True, exit_code=1)], {"p0": ["one", "KeyError: 'x'"]})
    assert crash.problems[-1].strip() == "KeyError: 'x'"


def test_a_deadline_and_an_unknown_end_are_told():
    late = classify("job", "Job job has failed because it was active longer than specified deadline", [], {})
    assert late.reason == "Deadline"
    assert "quota" in classify("job", "pods were refused: quota", [], {}).problems[0]


@pytest.mark.parametrize(
    ("conditions", "suspended", "phases", "expected"),
    [
        ([], True, [], State.QUEUED),
        ([], False, ["Running", "Pending"], State.STARTING),
        ([], False, ["Running", "Running"], State.RUNNING),
        (["Complete"], False, ["Succeeded", "Succeeded"], State.SUCCEEDED),
        (["Failed"], False, ["Failed", "Running"], State.FAILED),
    ],
)
def test_the_states_of_a_trainjob(conditions, suspended, phases, expected):
    job = {
        "spec": {"suspend": suspended, "trainer": {"numNodes": 2}},
        "status": {"conditions": [{"type": kind, "status": "True"} for kind in conditions]},
    }
    assert TrainJobs.status_of(job, [{"status": {"phase": phase}} for phase in phases]).state is expected


def test_lines_carry_the_rank_that_wrote_them_and_a_bar_its_last_state():
    assert prefixed("[3] step 5, epoch 1", 0) == "[3] step 5, epoch 1"
    assert prefixed("torchrun says", 1) == "[node 1] torchrun says"
    assert prefixed("[0] \rtraining: 10%[0] \rtraining: 20%", 0) == "[0] training: 20%"


def test_too_many_lines_are_held_back_and_counted():
    shown, clock = [], Clock()
    valve = Valve(shown.append, clock)
    for number in range(1000):
        valve(str(number))
    assert len(shown) == 200
    clock.minutes += 1
    valve("later")
    assert shown[200:] == ["... 800 lines are only in the whole log", "later"]


def test_a_watch_goes_on_where_it_was_and_starts_anew_when_that_is_gone(monkeypatch):
    monkeypatch.setattr(watch, "_BACK_OFF", (0.0,))
    asked, over = [], threading.Event()
    answers = iter([["5", "7"], [], Gone(), ["9"], Unavailable("cut"), ["11"]])

    def follow(version):
        asked.append(version)
        answer = next(answers, None)
        if answer is None:
            over.set()
            threading.Event().wait(0.01)
            return
        if isinstance(answer, Exception):
            raise answer
        yield from answer

    with watch.Changes(follow) as changes:
        assert over.wait(10)
        changes.wait()
    assert asked[:7] == ["", "7", "7", "", "9", "9", "11"]
