"""Recurring runs against a KFP API server: what the file says is there once, and a second time changes nothing."""

import json
import os
import subprocess
import sys

import kfp
import pytest
import yaml
from kfp_api import KfpApi

from draft_model.errors import DraftModelError
from kfp_pipeline.client import connect
from kfp_pipeline.compile import MANIFEST
from kfp_pipeline.recurring import apply, read

pytestmark = pytest.mark.usefixtures("nothing_of_this_machine")
VERSION = "pipeline-draft-model-of-today"
WEEKLY = {
    "cron": "0 0 2 * * 6",
    "parameters": {"huggingface_id": "org/name", "dataset_train_split": "s3://bucket/train.jsonl", "num_epochs": 3},
}


class SchedulingApi(KfpApi):
    """A server with the pipeline and its version, as GitOps applies them."""

    def __init__(self, **more) -> None:
        super().__init__(**more)
        self.pipelines["p"] = {
            "pipeline_id": "p", "display_name": "pipeline-draft-model", "namespace": min(self.namespaces, default=""),
        }  # fmt: skip
        (spec,) = (d["spec"] for d in yaml.safe_load_all(MANIFEST.read_text()) if d["kind"] == "PipelineVersion")
        self.add_version(VERSION, spec["pipelineSpec"])

    def add_version(self, name: str, spec: dict) -> None:
        """As GitOps applies one."""
        self.versions[f"id-of-{name}"] = {
            "pipeline_id": "p", "pipeline_version_id": f"id-of-{name}", "display_name": name, "pipeline_spec": spec,
        }  # fmt: skip

    def trigger(self, name: str, state: str) -> str:
        """Starts a run of a schedule, as the controller does."""
        schedule, run_id = self.by_name()[name], f"run-{len(self.runs)}"
        self.runs[run_id] = {
            "run_id": run_id, "experiment_id": schedule["experiment_id"], "state": state,
            "recurring_run_id": schedule["recurring_run_id"],
        }  # fmt: skip
        return run_id

    def by_name(self) -> dict[str, dict]:
        """All recurring runs; no name twice."""
        found = {run["display_name"]: run for run in self.recurring.values()}
        assert len(found) == len(self.recurring)
        return found


@pytest.fixture
def api():
    with SchedulingApi() as api:
        yield api


@pytest.fixture
def file(tmp_path):
    """Writes the file and reads it as the Job does."""

    def write(runs: dict, **more):
        path = tmp_path / "recurring_runs.yaml"
        path.write_text(yaml.safe_dump({"runs": runs, **more}))
        return read(path)

    return write


def test_a_run_is_created_as_the_file_says(api, file):
    weekly = WEEKLY | {"description": "each Saturday", "max_concurrency": 2, "enabled": False}
    assert apply(connect(api.host), file({"weekly": weekly}), VERSION) == ["created weekly"]
    run = api.by_name()["weekly"]
    assert run["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * 6"
    assert run["runtime_config"]["parameters"] == WEEKLY["parameters"]
    assert run["pipeline_version_reference"] == {"pipeline_id": "p", "pipeline_version_id": f"id-of-{VERSION}"}
    assert (run["mode"], run["service_account"], run["no_catchup"]) == ("DISABLE", "draft-model-steps", True)
    assert (int(run["max_concurrency"]), run["description"][:13]) == (2, "each Saturday")
    (experiment,) = api.experiments.values()
    assert (experiment["display_name"], experiment["experiment_id"]) == ("draft-model", run["experiment_id"])


def test_a_second_time_changes_nothing(api, file):
    runs = {f"run-{number}": WEEKLY for number in range(5)}  # three pages of the list
    apply(connect(api.host), file(runs), VERSION)
    before = json.dumps(api.recurring)
    api.requests.clear()
    assert apply(connect(api.host), file(runs), VERSION) == []
    assert {method for method, *_ in api.requests} == {"GET"}
    assert json.dumps(api.recurring) == before


@pytest.mark.parametrize(
    "change",
    [{"cron": "0 30 2 * * 6"}, {"parameters": WEEKLY["parameters"] | {"num_epochs": 4}}, {"enabled": False},
     {"max_concurrency": 3}, {"catch_up": True}, {"description": "other words"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_differs_is_deleted_and_created(api, file, change):
    apply(connect(api.host), file({"weekly": WEEKLY, "other": WEEKLY}), VERSION)
    old = api.by_name()
    done = apply(connect(api.host), file({"weekly": WEEKLY | change, "other": WEEKLY}), VERSION)
    assert done == ["deleted weekly, which was different", "created weekly"]
    new = api.by_name()
    assert new["other"] == old["other"]
    assert new["weekly"]["recurring_run_id"] != old["weekly"]["recurring_run_id"]
    assert apply(connect(api.host), file({"weekly": WEEKLY | change, "other": WEEKLY}), VERSION) == []


def test_a_new_version_of_the_pipeline_is_taken_up_and_rolled_back(api, file):
    apply(connect(api.host), file({"weekly": WEEKLY}), VERSION)
    api.add_version("tomorrow", api.versions[f"id-of-{VERSION}"]["pipeline_spec"])
    for version in ("tomorrow", VERSION):
        assert apply(connect(api.host), file({"weekly": WEEKLY}), version)
        assert api.by_name()["weekly"]["pipeline_version_reference"]["pipeline_version_id"] == f"id-of-{version}"


def test_what_the_file_no_longer_has_is_deleted_and_others_are_left_alone(api, file):
    server = connect(api.host)
    apply(server, file({"weekly": WEEKLY, "nightly": WEEKLY}), VERSION)
    by_hand = api.add_recurring(api.by_name()["nightly"] | {"display_name": "by-hand", "description": "mine"})
    apply(server, file({"weekly": WEEKLY}, experiment="somebody-elses"), VERSION)
    assert apply(server, file({"weekly": WEEKLY}), VERSION) == ["deleted nightly"]
    assert by_hand["recurring_run_id"] in api.recurring
    assert len(api.recurring) == 3
    with pytest.raises(DraftModelError, match="by-hand: a recurring run of this name exists that no file made"):
        apply(server, file({"by-hand": WEEKLY}), VERSION)
    assert len(api.recurring) == 3


@pytest.mark.parametrize("left", [{}, {"weekly": WEEKLY | {"cron": "0 0 3 * * 6"}}], ids=["taken out", "changed"])
def test_a_run_in_progress_outlives_its_schedule(api, file, left):
    server = connect(api.host)
    apply(server, file({"weekly": WEEKLY}), VERSION)
    (old,) = api.recurring
    for state in ("SUCCEEDED", "FAILED"):  # two pages of the list
        api.trigger("weekly", state)
    run = api.trigger("weekly", "RUNNING")
    created = ["created weekly"] if left else []
    for more in (created, []):  # a second sync, while the run still goes on
        kept = f"disabled weekly; it is deleted by a later sync, since its run {run} goes on"
        assert apply(server, file(left), VERSION) == [kept, *more]
        assert (api.recurring[old]["mode"], api.runs[run]["state"]) == ("DISABLE", "RUNNING")
        assert len(api.recurring) == 1 + len(left)
    api.runs[run]["state"] = "SUCCEEDED"
    (done,) = apply(server, file(left), VERSION)
    assert done.startswith("deleted weekly")
    assert old not in api.recurring
    assert api.by_name().keys() == left.keys()


def test_a_change_that_is_taken_back_while_a_run_goes_on(api, file):
    server = connect(api.host)
    apply(server, file({"weekly": WEEKLY}), VERSION)
    (old,) = api.recurring
    api.trigger("weekly", "RUNNING")
    apply(server, file({"weekly": WEEKLY | {"catch_up": True}}), VERSION)
    done = apply(server, file({"weekly": WEEKLY}), VERSION)
    assert done == ["enabled weekly", "deleted weekly, which existed twice"]
    assert (list(api.recurring), api.recurring[old]["mode"]) == ([old], "ENABLE")


def test_on_a_server_of_several_users_by_the_pods_token_and_namespace(file, tmp_path, monkeypatch):
    token, namespace = tmp_path / "token", tmp_path / "namespace"
    token.write_text("of-the-scheduler")
    namespace.write_text("team-a")
    monkeypatch.setattr(kfp.Client, "_NAMESPACE_PATH", str(namespace))
    with SchedulingApi(namespaces=["team-a"]) as api:
        api.token = "of-the-scheduler"
        apply(connect(api.host, token_file=token), file({"weekly": WEEKLY}), VERSION)
        assert api.by_name().keys() == {"weekly"}
        (experiment,) = api.experiments.values()
        assert experiment["namespace"] == "team-a"


def test_a_version_that_is_not_there_and_a_gateways_answer_are_told(api, file):
    with pytest.raises(DraftModelError, match=r"no version 'of-yesterday' .* apply manifests/pipelines first"):
        apply(connect(api.host), file({"weekly": WEEKLY}), "of-yesterday")
    assert not api.recurring
    api.pages = {"/recurringruns$": "{}"}
    with pytest.raises(DraftModelError, match="accepted weekly and named no run"):
        apply(connect(api.host), file({"weekly": WEEKLY}), VERSION)


def test_all_that_is_wrong_with_a_file_is_told_at_once(file, tmp_path):
    bad = {"parameters": {"huggingface_id": "org/name", "num_epochs": 0, "num_epoch": 3}, "cron": WEEKLY["cron"]}
    with pytest.raises(DraftModelError) as told:
        file({"one": bad, "two": WEEKLY | {"parameters": {}}})
    text = "\n".join(told.value.problems)
    for words in ("runs.one.parameters.num_epochs: given", "runs.one.parameters.num_epoch:",
                  "runs.one.parameters.dataset_train_split:", "runs.two.parameters.dataset_train_split:"):  # fmt: skip
        assert words in text
    with pytest.raises(DraftModelError, match=r"runs\.three\.cron"):
        file({"three": WEEKLY | {"cron": "0 2 * * 6"}})
    with pytest.raises(DraftModelError, match="schedule"):
        file({}, schedule="weekly")
    with pytest.raises(DraftModelError, match="cannot be read"):
        read(tmp_path / "absent.yaml")


def test_the_command_of_the_job(api, tmp_path):
    path, token = tmp_path / "recurring_runs.yaml", tmp_path / "token"
    path.write_text(yaml.safe_dump({"runs": {"weekly": WEEKLY}}))
    token.write_text("of-the-scheduler")
    command = [sys.executable, "-m", "kfp_pipeline.recurring", f"--file={path}", f"--version={VERSION}"]

    def run(*more: str):
        environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True)

    first = run(f"--host={api.host}", f"--token-file={token}")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("created weekly\n")
    assert run(f"--host={api.host}").stdout.endswith("nothing to do\n")
    api.failing = 503
    failed = run(f"--host={api.host}")
    assert failed.returncode == 2
    assert "503" in failed.stderr
    assert "Traceback" not in failed.stderr
