"""What a local run prints last."""

import json
import sys
from importlib.metadata import version

import pytest

from draft_model.summary import print_summary

TRAINING = {
    "target": {"source": "org/target", "architecture": "LlamaForCausalLM"}, "draft": {"draft_vocab_size": 8192},
    "draft_parameters": 9_839_232, "steps": 10, "tokens": 1000, "seconds": 5.0, "tokens_per_second": 200.0,
    "hardware": "CPU",
}  # fmt: skip


@pytest.fixture
def printed(tmp_path, capsys, monkeypatch):
    """Prints the summary of a run that evaluated nothing, tracked at some URI; what was printed."""
    (tmp_path / "training.json").write_text(json.dumps(TRAINING), encoding="utf-8")

    def of(tracking):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
        print_summary(tmp_path, tmp_path)
        return capsys.readouterr().out

    return of


def test_a_local_store_is_shown_by_a_command_that_needs_nothing_installed(printed):
    (line,) = (line for line in printed("sqlite:////runs/mlflow.db").splitlines() if "see the curves" in line)
    install, fill, show = line.removeprefix("  see the curves").strip().split(" && ")
    assert install == f"{sys.executable} -m venv .venv-mlflow"
    assert fill == f".venv-mlflow/bin/pip install mlflow=={version('mlflow-skinny')}"
    assert show == ".venv-mlflow/bin/mlflow ui --backend-store-uri sqlite:////runs/mlflow.db"


def test_a_server_has_its_own_pages(printed):
    assert "mlflow" not in printed("http://127.0.0.1:5000")
