"""The model card, a draft's README.md as the Hugging Face Hub reads it; and what a local run prints last."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_model.drafts import family_of
from draft_model.entrypoint import printable
from draft_model.markdown import render

if TYPE_CHECKING:
    from draft_model.drafts.base import Family

FOLDER = "THIS_FOLDER"
FOLDER_NOTE = f"`{FOLDER}` is the path of this folder, or its id on a model hub.\n"
"""What a card says of FOLDER before the draft is on the Hub."""

Json = Mapping[str, Any]


def hub_source(training: Json) -> tuple[str, str]:
    """Id and revision of a target that came from the Hugging Face Hub; both empty for another."""
    target = training["target"]
    commit = str(target.get("revision") or "")
    given = str(training["parameters"].get("huggingface_id") or (target["source"] if commit else ""))
    name, _, revision = given.partition("@")
    return name, commit or revision


def target_name(training: Json) -> str:
    """What to call the target: its Hub id, or the last part of its path."""
    source = str(training["target"]["source"])
    return hub_source(training)[0] or source.rstrip("/").rpartition("/")[2] or source


def serve_commands(target: str, revision: str, draft: str, proposals: int, family: Family) -> dict[str, str]:
    """Shell commands that serve a draft, by engine; `target` is a Hub id, which may have a revision, or a path."""
    at = ("--revision", revision) if revision else ()
    speculative = json.dumps({"method": family.vllm_method, "model": draft, "num_speculative_tokens": proposals})
    sglang = (
        "python", "-m", "sglang.launch_server", "--model-path", target, *at,
        "--speculative-algorithm", family.sglang_algorithm, "--speculative-draft-model-path", draft,
        *(word for name, value in family.sglang_options(proposals).items() for word in (f"--{name}", str(value))),
    )  # fmt: skip
    vllm = ("vllm", "serve", target, *at, "--speculative-config", speculative)
    return {"vLLM": shlex.join(vllm), "SGLang": shlex.join(sglang)}


def best_proposals(training: Json, evaluation: Json | None) -> int:
    """How many tokens to propose at a time: the fastest number that was measured, else what the draft is made for."""
    best = evaluation and evaluation["recommended_num_speculative_tokens"]
    return int(best or training["parameters"].get("num_speculative_tokens") or 3)


def write_card(path: Path, training: Json, evaluation: Json | None, dataset: Json, *, name: str) -> None:
    """Writes the card from training.json, evaluation.json (None: nothing was measured) and the data's report.json."""
    from huggingface_hub import ModelCard, ModelCardData

    hub_id, revision = hub_source(training)
    target, family = training["target"], family_of(training["draft"])
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=target.get("licence") or None,
        base_model=hub_id or None,
        tags=[family.vllm_method, "speculative-decoding"],
    )
    body = render(
        "evaluation/templates/card.md.j2", name=name, family=family, training=training, target=target,
        given=training["parameters"], evaluation=evaluation, dataset=dataset,
        split=dataset["splits"]["train"], hub_id=hub_id, target_name=target_name(training), folder_note=FOLDER_NOTE,
        commands=serve_commands(hub_id or "TARGET", revision, FOLDER, best_proposals(training, evaluation), family),
    )  # fmt: skip
    ModelCard(f"---\n{header.to_yaml()}\n---\n{body}").save(path)


def print_summary(final: Path) -> None:
    """Prints what a local run reached, and what to type next; `final` is the folder of the draft."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(emoji=False)
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    file = final / "evaluation.json"
    evaluation = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    source = training["target"]["source"]
    rows = {
        "target": f"{source} ({training['target']['architecture']})",
        "draft": f"{training['draft_parameters'] / 1e6:.1f} M parameters, "
        f"vocabulary {training['draft']['draft_vocab_size']:,}",
        "training": f"{training['steps']} steps, {training['tokens']:,} tokens in {training['seconds']:.0f} s "
        f"({training['tokens_per_second']:.0f} tokens/s on {training['hardware']})",
        "acceptance length": "not measured: see the report",
    }
    if evaluation:
        trained, untrained, lossless = evaluation["trained"], evaluation["untrained"], evaluation["lossless"]
        before = f"untrained draft: {untrained['acceptance_length']:.2f}; " if untrained else ""
        verdict = "the same tokens as the target alone" if lossless["identical"] else "DIFFERENT tokens"
        rows |= {
            "acceptance length": f"{trained['acceptance_length']:.2f} tokens per step of the target ({before}"
            f"without a draft: 1), by {evaluation['engine']}",
            "kept by position": ", ".join(f"{share:.0%}" for share in trained["acceptance_by_position"])
            + " of the 1st, 2nd, ... proposed token",
            "by kind of prompt": ", ".join(
                f"{its['category']} {its['acceptance_length']:.2f}" for its in evaluation["by_category"]
            ),
            "lossless": f"{verdict}: {lossless['compared_tokens']:,} compared on {lossless['prompts']} prompts, "
            f"{len(lossless['ties'])} ties",
        }
    family = family_of(training["draft"])
    table = Table(title=f"{family.title} draft model", show_header=False, title_style="bold")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(printable(value)))
    console.print(table)
    hub_id, revision = hub_source(training)
    target = hub_id or source
    commands = serve_commands(target, revision, str(final), best_proposals(training, evaluation), family)
    steps = {"open the report": str(final / "report.html")}
    steps |= {f"serve it in {engine}": command for engine, command in commands.items()}
    if (tracking := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("sqlite:"):
        # mlflow-skinny has no pages, and another version may change the store.
        install = f"{shlex.quote(sys.executable)} -m venv .venv-mlflow"
        fill = f".venv-mlflow/bin/pip install mlflow=={version('mlflow-skinny')}"
        show = shlex.join([".venv-mlflow/bin/mlflow", "ui", "--backend-store-uri", tracking])
        steps["see the curves"] = f"{install} && {fill} && {show}"
    steps["run on a cluster"] = "upload kfp_pipeline/compiled/pipeline_draft_model.yaml in the KFP UI"
    console.print("\n[bold]Next[/bold]")
    for what, command in steps.items():
        console.print(f"  {what:<19} {escape(printable(command))}", soft_wrap=True, highlight=False)
