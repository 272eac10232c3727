"""Following a job: states, limits, an API server that is away, queues that nobody manages, reasons of failure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from draft_model.jobs import follow as following
from draft_model.jobs import states
from draft_model.jobs.backends import Backend
from draft_model.jobs.cluster import Forbidden, Unavailable
from draft_model.jobs.follow import Follower, LogStreams, prefixed
from draft_model.jobs.states import Pod, State, pod_of, status_of
from jobs.fake import Clock, FakeCluster, pod, status
from jobs.requests import GOLDEN, request


@pytest.fixture
def follow(tmp_path, at_once):
    """Follows a job through scripted looks; gives its end and the cluster."""

    def follow(*script, wanted=None, prepare=None):
        clock = Clock()
        cluster = FakeCluster(script, clock)
        backend = Backend(cluster, "pytorchjob")
        job = backend.create_or_adopt(wanted or GOLDEN["1x1"])
        if prepare:
            prepare(cluster)
        streams = LogStreams(backend, tmp_path)
        return Follower(backend, job, streams, clock).follow(), cluster

    return follow


STARTING, RUNNING, DONE = status("Created"), status("Running"), status("Succeeded")


def test_the_states_in_a_row_are_told(follow, caplog):
    caplog.set_level("INFO", "draft_model")
    failure, _ = follow(STARTING, RUNNING, status("Restarting", "again"), RUNNING, DONE)
    assert failure is None
    told = [found[1] for record in caplog.records if (found := re.search(r"-a0: ([A-Z]+)", record.message))]
    assert told == ["STARTING", "RUNNING", "RESTARTING", "RUNNING", "SUCCEEDED"]


def waiting_pod(reason, message):
    said = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return {**pod(), "status": {"conditions": [said]}}


UNPULLED = pod(waiting={"reason": "ImagePullBackOff", "message": "no such tag"})


@pytest.mark.parametrize(
    ("script", "parameters", "reason", "words"),
    [
        ([STARTING], {"start_limit": 5}, "Start", "start_limit: .* exceeded 5 minutes"),
        ([status("Created", pods=[waiting_pod("Unschedulable", "0/5 nodes have 8 GPUs")])], {"start_limit": 2},
         "Unschedulable", "start_limit: .* 0/5 nodes have 8 GPUs"),
        ([status("Created", pods=[UNPULLED])], {}, "ImagePull", "no such tag"),
        ([status("Suspended", suspend=True)], {"queue_limit": 7}, "Queue", "queue_limit: .* exceeded 7 minutes"),
        ([RUNNING], {"run_limit": 9}, "Run", "run_limit: .* exceeded 9 minutes"),
        ([RUNNING, RUNNING, status("Suspended", suspend=True), STARTING] * 9, {"run_limit": 12}, "Run", "run_limit"),
        ([RUNNING, None], {}, "Deleted", "was deleted while it was RUNNING"),
        ([{}], {"start_limit": 60}, "NoOperator", "PyTorchJob draft-3f2c9a10-a0 has no status"),
    ],
)  # fmt: skip
def test_each_phase_has_its_own_limit_and_what_is_hopeless_ends_earlier(follow, script, parameters, reason, words):
    failure, cluster = follow(*script, wanted=request(**parameters))
    assert failure.reason == reason
    assert not failure.retryable
    assert re.search(words, " ".join(failure.problems))
    assert reason != "NoOperator" or cluster.clock.minutes <= 4


def test_a_long_queue_does_not_use_up_the_time_to_start_or_run(follow):
    queued = [status("Suspended", suspend=True)] * 50
    failure, _ = follow(*queued, STARTING, RUNNING, DONE, wanted=request(start_limit=3, run_limit=3))
    assert failure is None


def test_a_server_that_has_not_read_its_roles_yet_is_waited_for(follow):
    refused = Forbidden("may not get pytorchjobs")
    assert follow(RUNNING, refused, DONE)[0] is None
    for script in ([RUNNING, *[refused] * 5, DONE], [refused]):  # for long, or from the start
        with pytest.raises(Forbidden, match="get pytorchjobs"):
            follow(*script)


def test_a_queue_without_kueue_is_found_out_and_one_with_it_is_not(follow, caplog):
    caplog.set_level("INFO", "draft_model")
    waiting = status("Suspended", suspend=True)
    failure, _ = follow(waiting, wanted=GOLDEN["queue"])
    assert failure.reason == "UnmanagedQueue"

    def manage(cluster):
        (job,) = cluster.there.values()
        said = [{"type": "QuotaReserved", "message": "16 more GPUs are needed"}]
        owner = [{"uid": job["metadata"]["uid"]}]
        cluster.kueue = [{"metadata": {"ownerReferences": owner}, "status": {"conditions": said}}]

    running = status("Running", suspend=False, pods=[pod(), pod("b")])
    failure, _ = follow(*[waiting] * 5, running, DONE, wanted=GOLDEN["queue"], prepare=manage)
    assert failure is None
    assert any("queue research: 16 more GPUs are needed" in record.message for record in caplog.records)


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
    failure = states.classify("job", "train", "failed", [PEER, cause], tails)
    assert (failure.reason, failure.retryable) == (reason, retryable)


def test_a_pod_that_lost_its_peers_is_not_blamed_while_another_still_ends(follow, monkeypatch):
    monkeypatch.setattr(following, "DRAIN_SECONDS", 0.0)
    lost = pod("a", exitCode=1, message="Connection reset by peer", finishedAt="2026-01-01T00:00:01Z")
    killed = pod("b", exitCode=137, finishedAt="2026-01-01T00:00:09Z")
    looks = iter([[lost, pod("b")]] * 20)

    def still_ends(cluster):
        cluster.pods = lambda selector: next(looks, [lost, killed])

    failure, _ = follow(status("Failed"), prepare=still_ends)
    assert failure.reason == "Killed"
    assert next(looks, None) is None


def test_a_crash_comes_with_its_last_lines_and_a_deadline_and_an_unknown_end_are_told():
    crashed = [Pod("p0", 0, ended=True, exit_code=1)]
    crash = states.classify("job", "train", "", crashed, {"p0": ["one", "KeyError: 'x'"]})
    assert crash.problems[-1].strip() == "KeyError: 'x'"
    late = "Job job has failed because it was active longer than specified deadline"
    assert states.classify("job", "train", late, [], {}).reason == "Deadline"
    assert "quota" in states.classify("job", "train", "pods were refused: quota", [], {}).problems[0]


@pytest.mark.parametrize(
    ("conditions", "suspended", "started", "expected"),
    [
        ([], True, 0, State.QUEUED),
        ([], False, 1, State.STARTING),
        ([], False, 2, State.RUNNING),
        (["Complete"], False, 2, State.SUCCEEDED),
        (["Failed"], False, 1, State.FAILED),
    ],
)
@pytest.mark.parametrize("where", ["runPolicy", ""])
def test_the_states_of_a_job(conditions, suspended, started, expected, where):
    policy = {"suspend": suspended}
    job = {
        "spec": {where: policy} if where else policy,
        "status": {"conditions": [{"type": kind, "status": "True"} for kind in conditions]},
    }
    pods = [Pod(str(node), node, started=True) for node in range(started)]
    assert status_of(job, pods, 2).state is expected


def test_the_table_of_the_docs_is_the_one_in_code():
    docs = (Path(__file__).parents[2] / "docs/kubernetes.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in docs.splitlines() if line.startswith("| ")]
    told = {row[0]: re.findall(r"`(\w+_limit)`", row[2]) for row in rows if row[0] in State.__members__}
    assert told == {state.value: [state.limit] if state.limit else [] for state in State}


def test_lines_carry_the_rank_that_wrote_them_and_a_bar_its_last_state():
    assert prefixed("[3] step 5, epoch 1", 0) == "[3] step 5, epoch 1"
    assert prefixed("torchrun says", 1) == "[node 1] torchrun says"
    assert prefixed("[0] \rtraining: 10%[0] \rtraining: 20%", 0) == "[0] training: 20%"
    assert prefixed("\x1b]0;title\x07text", 0) == r"[node 0] \x1b]0;title\x07text"


REJECTED = ["UnexpectedAdmissionError", "OutOfcpu", "OutOfephemeral-storage", "OutOfexample.com/gpu", "NodeAffinity",
            "NodeUnschedulable", "TaintToleration", "TopologyAffinityError", "NodePorts", "Preempting"]  # fmt: skip


def test_a_pod_that_a_kubelet_rejects_is_the_machines_fault():
    for reason in REJECTED:
        rejected = pod_of(pod(reason=reason), 0)
        assert states.classify("job", "train", "1 Master replica(s) failed", [rejected], {}).retryable, reason


@pytest.mark.parametrize(
    ("ended", "line", "retryable"),
    [
        *(({"reason": "StartError", "exit_code": 128, "message": f"OCI runtime create failed: {said}"}, "", True)
          for said in ("nvidia-container-cli: driver error", "nvidia-container-cli: device error: 0: unknown device",
                       "failed to initialize NVML: Unknown Error", "unresolvable CDI devices nvidia.com/gpu=0")),
        ({"reason": "StartError", "exit_code": 128, "message": 'exec: "pyhton": not found'}, "", False),
        ({"exit_code": 1}, "CUDA error: uncorrectable ECC error encountered", True),
    ],
)  # fmt: skip
def test_a_broken_gpu_or_driver_is_the_machines_fault(ended, line, retryable):
    broken = Pod("p0", 0, ended=True, **ended)
    assert states.classify("job", "train", "", [broken], {"p0": [line]}).retryable is retryable
    waits = Pod("p0", 0, waiting=f"CreateContainerError: {ended.get('message', line)}")
    assert states.never_starts([waits]).retryable is retryable


def test_what_a_start_waits_for_is_told(follow, caplog):
    caplog.set_level("INFO", "draft_model")
    old = pod("draft-3f2c9a10-a7-worker-0", job="draft-3f2c9a10-a7")
    follow(status("Created", pods=[old]), RUNNING, DONE)
    assert "earlier pods of this run still end and hold their GPUs: draft-3f2c9a10-a7-worker-0" in caplog.text


def test_a_watch_that_breaks_is_told_once_and_the_job_is_read_without(follow, caplog):
    caplog.set_level("INFO", "draft_model")
    answers = iter([Unavailable("cut"), Forbidden("no watch"), None, Unavailable("cut")])

    def wait(*_):
        if error := next(answers, None):
            raise error

    failure, _ = follow(*[RUNNING] * 5, DONE, prepare=lambda cluster: setattr(cluster, "wait", wait))
    assert failure is None
    assert [r.message for r in caplog.records if "no watch now" in r.message] == [
        "no watch now, so the job is read every 0 s (cut)"
    ] * 2
