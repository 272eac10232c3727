"""Which part of the lock file each image gets, and what is known to be wrong with the lock file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from containers import imports
from containers.conftest import KINDS

ROOT = Path(__file__).parents[2]
AUDIT = ROOT / ".venv-images" / "bin" / "pip-audit"
ANSWERS = ROOT / "containers" / "audit.yaml"


def requirements(kind, *how):
    command = [sys.executable, ROOT / "containers" / "requirements.py", kind, *(how or ("cpu",))]
    return subprocess.run(command, capture_output=True, text=True)


def lines(kind, torch="cpu"):
    done = requirements(kind, torch)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def test_what_an_image_gets_is_in_the_lock_file_as_it_is_but_for_torchs_build():
    locks = "".join((ROOT / name).read_text() for name in ("requirements-torch.lock", "requirements.lock"))
    pins = [line.partition(";")[0].strip(" \\") for line in locks.lower().replace("_", "-").splitlines()]
    for kind in KINDS:
        assert lines(kind) - {line for line in lines(kind) if line.startswith("torch==")} <= set(pins)
    (cpu,) = (line for line in lines("trainer") if line.startswith("torch=="))
    (cuda,) = (line for line in lines("trainer", "cuda") if line.startswith("torch=="))
    assert cpu.removesuffix("+cpu") == cuda.replace("===", "==") in pins
    assert cpu.endswith("+cpu")


@pytest.mark.parametrize("kind", [*KINDS, "engine"])
def test_whatever_is_installed_but_torch_has_the_hashes_of_its_files(kind):
    hashed = requirements(kind, "cpu", "hashes").stdout.replace(" \\\n", "").splitlines()
    assert {entry.split()[0].partition(";")[0] for entry in hashed} == {
        line for line in lines(kind) if not line.startswith("torch==")
    }
    assert all(" --hash=sha256:" in entry for entry in hashed)
    for file, given in (("Makefile", "requirements.lock"), ("containers/build", '"$context/hashed.txt"')):
        commands = (ROOT / file).read_text().replace("\\\n", "").splitlines()
        uses = [line for line in commands if re.search(rf"--requirement {re.escape(given)}", line)]
        assert uses
        assert all("--require-hashes" in line for line in uses)


def test_the_trainers_image_can_stand_for_each_other_and_the_coordinators_is_the_smallest():
    assert lines("trainer") == set().union(*map(lines, KINDS))
    assert lines("coordinator") == set.intersection(*map(lines, KINDS))


def test_the_engines_image_has_the_trainers_packages_but_torch_which_is_vllms():
    assert {line.partition("==")[0] for line in lines("trainer") - lines("engine")} == {"torch"}
    assert lines("engine") == lines("engine", "cuda") < lines("trainer")


def test_an_unknown_kind_is_told():
    done = requirements("stage")
    assert done.returncode == 1
    assert "allowed: one of coordinator, dataset, importer, trainer" in done.stderr


GPU = {"triton"}
"""Comes with torch for CUDA."""
EVALUATION = {"datasets", "matplotlib", "torch", "vllm"} | GPU
"""What the evaluation and the import use, of which the preflight asks only whether their inputs can be read."""
JOB = {"mlflow-skinny", "torch"}
"""What the job uses, which the coordinator only follows: tracking, torchrun."""
PAGES = {"jinja2"}
"""Of the other stages' reports; these write Markdown alone."""


@pytest.mark.parametrize(
    ("kind", "module", "function", "elsewhere"),
    [
        ("dataset", "draft_model.steps", "preflight", EVALUATION),
        ("importer", "draft_model.steps", "_run_import", GPU),
        ("dataset", "draft_model.steps", "_run_dataset", set()),
        ("coordinator", "draft_model.steps", "train_draft_model", JOB | PAGES),
        ("trainer", "draft_model.steps", "_run_evaluate", GPU | {"vllm"}),
        ("coordinator", "draft_model.steps", "clean_up", JOB | PAGES),
        ("trainer", "draft_model.training.__main__", "", GPU),
        ("dataset", "kfp_pipeline.recurring", "", EVALUATION),
    ],
)
def test_an_image_has_what_its_steps_import(kind, module, function, elsewhere):
    there = {line.partition("==")[0] for line in lines(kind)}
    importers = imports.imported(module, function)
    assert {name: importer for name, importer in importers.items() if name not in there | elsewhere} == {}
    assert elsewhere <= importers.keys() - there


def audit(file):
    """Findings of pip-audit by id; None where its service does not know the packages."""
    command = [AUDIT, "--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off", "--requirement", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return None
    if any("skip_reason" in package for package in packages):
        return None
    return {found["id"]: package["name"] for package in packages for found in package["vulns"]}


def test_every_known_vulnerability_of_the_lock_file_has_an_answer(tmp_path):
    if not AUDIT.exists():
        pytest.skip(f"{AUDIT} is not installed: run `make images`")
    answers = yaml.safe_load(ANSWERS.read_text())["answers"]
    assert all(answer["package"] and answer["why"] for answer in answers.values())
    one = tmp_path / "one.txt"
    one.write_text("requests==2.19.0\n")
    known = audit(one)
    if known is None:
        pytest.skip("the service that pip-audit asks cannot be reached from here")
    assert known, "requests 2.19.0 has known vulnerabilities"
    found = audit(ROOT / "requirements.lock") | audit(ROOT / "requirements-torch.lock")
    assert found == {name: answer["package"] for name, answer in answers.items()}
