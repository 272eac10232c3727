"""What takes all memory or never ends in a stranger's files ends as a sentence, and finds no key."""

import json
import os
import subprocess
import sys

import pytest
import torch

from draft_model.errors import DraftModelError
from draft_model.model_import.stage import LIMITS, in_sandbox

from .case import change_config

GIB = 2**30


def inspect(folder, **limits):
    return in_sandbox("inspect", folder, ["model.safetensors"], limits=LIMITS._replace(**limits))


def template(text):
    def spoil(model):
        (model / "chat_template.jinja").write_text(text)

    return spoil


def normalizer(model):
    content = json.loads((model / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 40}
    content["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 12}
    (model / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "spoil",
    [
        template("{{ 9**9**9 }}"),
        template("{{ 'a' * 9999999999 }}"),
        normalizer,
        lambda model: change_config(model, num_hidden_layers=10**7),
    ],
    ids=["power", "text", "normalizer", "layers"],
)
def test_hostile_files_end_as_a_sentence(model, spoil):
    spoil(model)
    try:
        problems = inspect(model, cpu=1, memory=2 * GIB)["problems"]
    except DraftModelError as error:
        problems = error.problems
        assert "took more than" in problems[0]
    else:  # transformers limits some of these itself
        assert problems == [] or "MemoryError" in problems[0]


def test_a_wall_clock_limit_and_a_tensor_expanded_from_one_number(model, target, tmp_path):
    template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")(model)
    with pytest.raises(DraftModelError, match=r"took more than .* 1 s in all or .* and was stopped"):
        inspect(model, wall=1)
    assert inspect(target)["problems"] == []  # the next goes on
    path = tmp_path / "expanded.bin"
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(DraftModelError, match=r"or 6 GiB of memory"):
        in_sandbox("convert", [path], tmp_path)


def test_the_processes_have_no_keys_cannot_reach_the_hub_and_end_with_their_parent():
    program = (
        "import os, pathlib, huggingface_hub\n"
        "from draft_model import workers\n"
        "workers._PRELOADED.clear()\n"
        "with workers.Workers() as worker:\n"
        "    found = worker.call(pathlib.Path.read_text, pathlib.Path('/proc/self/environ'))\n"
        "    print('PATH=' in found, 'never shown' in found, worker.call(huggingface_hub.is_offline_mode))\n"
        "    print(os.environ['OTHER_API_KEY'], flush=True)\n"
        "    worker.call(exec, 'import time; print(\"busy\", flush=True); time.sleep(60)')\n"
    )
    names = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "OTHER_API_KEY")
    environment = os.environ | dict.fromkeys(names, "never shown")
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True) as it:
        assert [it.stdout.readline() for _ in range(3)] == ["True False True\n", "never shown\n", "busy\n"]
        it.kill()
        assert it.stdout.read() == ""  # it ends when no process holds it open
