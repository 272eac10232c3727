"""The table that ends a local run: what was reached, and what to type next."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(final: Path, folder: Path) -> None:
    """Prints what a run reached.

    Args:
        final: local folder of the served draft.
        folder: of the run.
    """
    console = Console()
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    evaluation_file = final / "evaluation.json"
    evaluation = json.loads(evaluation_file.read_text(encoding="utf-8")) if evaluation_file.exists() else None
    table = Table(title="EAGLE-3 draft model", show_header=False, title_style="bold")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(training, evaluation):
        table.add_row(name, value)
    console.print(table)
    proposals = evaluation["num_speculative_tokens"] if evaluation else 3
    target = training["target"]["source"]
    speculative = json.dumps({"method": "eagle3", "model": str(final), "num_speculative_tokens": proposals})
    console.print("\n[bold]Next[/bold]")
    console.print(f"  open the report     {final / 'report.html'}", soft_wrap=True, highlight=False)
    console.print(
        f"  serve it in vLLM    vllm serve {target} --speculative-config '{speculative}'",
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        f"  serve it in SGLang  python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {final} --speculative-num-steps {proposals} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {proposals + 1}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if (tracking := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("sqlite:"):
        console.print(f"  see the curves      {_mlflow_ui(tracking)}", soft_wrap=True, highlight=False)
    console.print(
        "  run on a cluster    upload kfp_pipeline/compiled/pipeline_draft_model.yaml in the KFP UI",
        soft_wrap=True,
        highlight=False,
    )


def _mlflow_ui(store: str) -> str:
    """A command that works as it stands: mlflow-skinny has no pages, and another version may change the store."""
    folder = ".venv-mlflow"
    install = f"{sys.executable} -m venv {folder} && {folder}/bin/pip install mlflow=={version('mlflow-skinny')}"
    return f"{install} && {folder}/bin/mlflow ui --backend-store-uri {store}"


def _rows(training: dict[str, Any], evaluation: dict[str, Any] | None) -> list[tuple[str, str]]:
    rows = [
        ("target", f"{training['target']['source']} ({training['target']['architecture']})"),
        (
            "draft",
            f"{training['draft_parameters'] / 1e6:.1f} M parameters, "
            f"vocabulary {training['draft']['draft_vocab_size']:,}",
        ),
        (
            "training",
            f"{training['steps']} steps, {training['tokens']:,} tokens in {training['seconds']:.0f} s "
            f"({training['tokens_per_second']:.0f} tokens/s on {training['hardware']})",
        ),
    ]
    if evaluation is None:
        return [*rows, ("acceptance length", "not measured: dataset_validation_split was not given")]
    trained, untrained, lossless = evaluation["trained"], evaluation["untrained"], evaluation["lossless"]
    positions = ", ".join(f"{share:.0%}" for share in trained["acceptance_by_position"])
    verdict = "the same tokens as the target alone" if lossless["identical"] else "DIFFERENT tokens"
    return [
        *rows,
        ("acceptance length", f"{trained['acceptance_length']:.2f} tokens per step of the target (untrained draft: "
                              f"{untrained['acceptance_length']:.2f}; without a draft: 1)"),
        ("kept by position", f"{positions} of the 1st, 2nd, ... proposed token"),
        ("lossless", f"{verdict}: {lossless['compared_tokens']:,} compared on {lossless['prompts']} prompts, "
                     f"{len(lossless['ties'])} ties"),
    ]  # fmt: skip
