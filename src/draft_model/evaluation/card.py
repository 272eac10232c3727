"""The model card, a draft's README.md as the Hugging Face Hub reads it; and what a local run prints last."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_model.drafts import family_of

if TYPE_CHECKING:
    from draft_model.drafts.base import Family

FOLDER, _TARGET = "THIS_FOLDER", "TARGET"
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
    """Shell commands that serve a draft, by engine.

    Args:
        target: the target's Hub id or path.
        revision: its revision on the Hub; may be empty.
        draft: the draft's folder.
        proposals: tokens to propose at a time.
        family: the draft's.
    """
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


def plain(text: object) -> str:
    """Text that Markdown shows as it is, also in a table's cell; line breaks become spaces."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def write_card(path: Path, training: Json, evaluation: Json | None, dataset: Json, *, name: str) -> None:
    """Writes the card.

    Args:
        path: the Markdown file.
        training: training.json; `target` may have `licence` and `revision` (the Hub's).
        evaluation: evaluation.json; None where nothing was measured.
        dataset: the data set's report.json.
        name: the model's, its title.
    """
    from huggingface_hub import ModelCard, ModelCardData

    hub_id, revision = hub_source(training)
    target, given, split = training["target"], training["parameters"], dataset["splits"]["train"]
    proposals = best_proposals(training, evaluation)
    family = family_of(training["draft"])
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=target.get("licence") or None,
        base_model=hub_id or None,
        tags=[family.vllm_method, "speculative-decoding"],
    )
    linked = f"[{plain(hub_id)}](https://huggingface.co/{hub_id})" if hub_id else plain(target_name(training))
    commands = serve_commands(hub_id or _TARGET, revision, FOLDER, proposals, family)
    placeholder = "" if hub_id else f"`{_TARGET}` is the path of the target, imported from {plain(target['source'])}.\n"
    serving = "\n".join(
        f"{engine}:\n\n```bash\n{command.replace(' --', f' {chr(92)}{chr(10)}  --')}\n```\n"
        for engine, command in commands.items()
    )
    facts = {
        "Conversations": f"{split['rows_kept']:,}",
        "Tokens": f"{split['tokens']:,}, of them {split['supervised_tokens']:,} supervised",
        "Chat template": f"{dataset['chat_template']}, at most {dataset['max_length']:,} tokens a conversation",
        "Draft vocabulary": f"{dataset['draft_vocab_size']:,} of {dataset['vocab_size']:,} tokens, "
        f"{split['coverage']:.2%} of the supervised ones",
        "Steps": f"{training['steps']:,} of {given['draft_global_batch_size']} conversations",
        "Unroll steps (ttt_length)": given["ttt_length"],
        "Learning rate": f"{given['learning_rate']} at its peak, then cosine to 0",
        "Seed": given["seed"],
        "Hardware": f"{training['hardware']}, {training['seconds'] / 60:,.1f} minutes",
        "Versions": ", ".join(f"{package} {number}" for package, number in training["versions"].items()),
    }
    body = f"""
# {plain(name)}

An {family.title} draft of {training["draft_parameters"]:,} parameters for speculative decoding with {linked}
({plain(target["architecture"])}, {target["parameters"]:,} parameters). It proposes tokens; the target checks them in
one forward pass and keeps those that it would have written itself. It is of use with this target only.

## Results

{_results(evaluation) if evaluation else "Not measured: nothing was decoded with this draft."}

## Serving

{FOLDER_NOTE}{placeholder}
{serving}
## Training

| | |
|---|---|
{_rows([fact, plain(value)] for fact, value in facts.items())}

## Limits

- Acceptance depends on the prompts: expect less on topics, languages and formats unlike the training conversations.
- Expect less when sampling than with greedy decoding, the less the higher the temperature.
- The draft does not change what the target writes: the target's own limits and biases apply.
"""
    ModelCard(f"---\n{header.to_yaml()}\n---\n{body}").save(path)


def _rows(rows: Any) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _results(evaluation: Json) -> str:
    trained, untrained, lossless = evaluation["trained"], evaluation["untrained"], evaluation["lossless"]
    before = f"{untrained['acceptance_length']:.2f}" if untrained else "not measured"
    rows = [["Tokens per target pass (mean acceptance length)", f"{trained['acceptance_length']:.2f}", before]]
    for index, share in enumerate(trained["acceptance_by_position"]):
        old = f"{untrained['acceptance_by_position'][index]:.1%}" if untrained else ""
        rows.append([f"Passes that accepted at least {index + 1} of the proposed tokens", f"{share:.1%}", old])
    speed = [
        [row["batch_size"], f"{row['target_alone_tokens_per_second']:,.1f}", f"{row['tokens_per_second']:,.1f}",
         f"{row['speed_up']:.2f}"] for row in evaluation["speed"]
    ]  # fmt: skip
    best = evaluation["recommended_num_speculative_tokens"]
    average = f" ({best} is the fastest number on average)" if best else ""
    timed = (
        f"""
Throughput, {evaluation["num_speculative_tokens"]} tokens proposed at a time{average}:

| requests at once | target alone, tokens/s | with the draft, tokens/s | speed-up |
|---:|---:|---:|---:|
{_rows(speed)}"""
        if speed
        else "\nThroughput was not measured."
    )
    verdict = "The replies are those of the target alone" if lossless["identical"] else (
        "**The replies differ from those of the target alone: do not serve this draft before that is understood**"
    )  # fmt: skip
    return f"""| | trained | before training |
|---|---:|---:|
{_rows(rows)}

Greedy decoding of {evaluation["prompts"]:,} prompts of {plain(evaluation["prompts_source"])}, up to
{evaluation["max_new_tokens"]:,} new tokens each, {evaluation["num_speculative_tokens"]} tokens proposed at a time, by
{plain(evaluation["engine"])} in {evaluation["dtype"]} on {plain(evaluation["hardware"])}. {verdict}:
{lossless["compared_tokens"]:,} tokens were compared, with {len(lossless["ties"])} ties.
{timed}"""


def markup(text: object) -> str:
    """Text that rich prints as it is: its markup escaped, control characters replaced."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def print_summary(final: Path, folder: Path) -> None:
    """Prints what a local run reached, and what to type next.

    Args:
        final: folder of the draft.
        folder: of the run.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
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
            "lossless": f"{verdict}: {lossless['compared_tokens']:,} compared on {lossless['prompts']} prompts, "
            f"{len(lossless['ties'])} ties",
        }
    family = family_of(training["draft"])
    table = Table(title=f"{family.title} draft model", show_header=False, title_style="bold")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, markup(value))
    console.print(table)
    hub_id, revision = hub_source(training)
    target = hub_id or source
    proposals = best_proposals(training, evaluation)
    commands = serve_commands(target, revision, str(final), proposals, family)
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
        console.print(f"  {what:<19} {markup(command)}", soft_wrap=True, highlight=False)
