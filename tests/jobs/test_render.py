"""What is rendered: golden files and what they do not show; schemas: tests/cluster, the policy: tests/manifests."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from draft_model.jobs.compute import Compute
from draft_model.jobs.spec import SPEC_HASH, pytorchjob, trainjob
from jobs.requests import GOLDEN, other_settings, request

FOLDER = Path(__file__).parent / "golden"
BACKENDS = {"pytorchjob": pytorchjob, "trainjob": trainjob}


def text(manifests):
    """As YAML; without what every new parameter changes, which other tests look at: the configuration and the hash."""
    whole = json.dumps(manifests)
    whole = re.sub(
        r'(?<={"name": "DRAFT_MODEL_JOB", "value": )"(?:[^"\\]|\\.)*"', '"the configuration, as JSON"', whole
    )
    whole = re.sub(f'(?<="{SPEC_HASH}": )"[0-9a-f]{{64}}"', '"the hash of the specification"', whole)
    return "---\n".join(yaml.safe_dump(manifest, sort_keys=True, width=110) for manifest in json.loads(whole))


FILES = [("pytorchjob", "4x8"), ("pytorchjob", "elastic"), ("pytorchjob", "queue"), ("trainjob", "4x8")]


@pytest.mark.parametrize(("backend", "case"), FILES)
def test_the_golden_files(backend, case):
    """After a wanted change: `python tests/jobs/test_render.py` writes them anew, and git shows what changed."""
    expected = (FOLDER / f"{backend}-{case}.yaml").read_text(encoding="utf-8")
    assert text(BACKENDS[backend](GOLDEN[case])) == expected


def test_what_the_golden_files_do_not_show():
    wanted = replace(GOLDEN["1x1"], attempt=2, owner=None)
    (job,) = pytorchjob(wanted)
    assert job["metadata"]["name"] == "draft-3f2c9a10-a2"
    assert len(job["metadata"]["name"] + "-worker-9999") <= 63
    assert "ownerReferences" not in job["metadata"]
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert {"name": "DRAFT_MODEL_JOB", "value": wanted.config} in container["env"]
    (on_cpus,) = pytorchjob(GOLDEN["cpu-pool"])
    assert "com/gpu" not in json.dumps(on_cpus["spec"]["pytorchReplicaSpecs"])


def test_each_stage_has_names_and_a_command_of_its_own():
    wanted = GOLDEN["1x1"]
    (job,) = pytorchjob(replace(wanted, stage="evaluate"))
    assert job["metadata"]["name"] == "draft-3f2c9a10-evaluate-a0"
    assert job["metadata"]["labels"]["app.kubernetes.io/component"] == "evaluate"
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "draft_model.steps"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hash_covers_what_is_asked_for_and_not_the_owner(backend):
    def digest(wanted):
        return BACKENDS[backend](wanted)[-1]["metadata"]["annotations"][SPEC_HASH]

    wanted = GOLDEN["1x1"]
    assert re.fullmatch("[0-9a-f]{64}", digest(wanted))
    assert digest(replace(wanted, owner=None)) == digest(wanted)
    for other in (other_settings(wanted), replace(wanted, image="other"), request(Compute("1000m", "1Gi"))):
        assert digest(other) != digest(wanted)


if __name__ == "__main__":
    for backend, case in FILES:
        (FOLDER / f"{backend}-{case}.yaml").write_text(text(BACKENDS[backend](GOLDEN[case])), encoding="utf-8")
