"""`draft-model`: every stage by hand, and what goes with it; the commands for Kubeflow are kfp_pipeline's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import click

from draft_model.entrypoint import exit_code, printable
from draft_model.markdown import table
from draft_model.options import SETTINGS, WORK, Group, given, options_of, scratch, together, uri
from draft_model.parameters import PARAMETERS, Parameters, Stage
from kfp_pipeline.commands import COMMANDS


@click.group(cls=Group, context_settings=SETTINGS)
@click.version_option(package_name="pipeline-draft-model")
def cli() -> None:
    """Train the draft model that makes an LLM decode faster (speculative decoding).

    \b
    On this machine, all at once:   draft-model run --params run.yaml
    One stage at a time:            draft-model import | regenerate | dataset | train | evaluate
    With what was trained:          draft-model compare | export | push
    On a cluster:                   draft-model submit --params run.yaml --watch

    A URI is a path, file://..., s3://bucket/key or minio://bucket/key; for S3 the endpoint and the keys come from the
    usual AWS_* environment variables.
    """  # noqa: D301


def _run(stage: Stage, uris: Sequence[str], work: Path | None, **options: Any) -> None:
    """Runs a stage, after a look at its parameters and at every input that they name; prints what came of it."""
    from draft_model import jobs, steps
    from draft_model.training import TrainConfig

    chosen = {name: options.pop(name) for name in uris}
    with _checked(stage, options, work) as (parameters, folder):
        if stage == "train":
            click.echo(jobs.run(TrainConfig(**chosen, work=folder, parameters=parameters)).final)
        else:
            result = steps.RUNS[stage](parameters, folder, **chosen)
            click.echo(result.get("sentence") or result["uri"])


@contextmanager
def _checked(stage: Stage, options: dict[str, Any], work: Path | None) -> Iterator[tuple[Parameters, Path]]:
    """The parameters of a stage, with every input that they name read; and a scratch folder."""
    from draft_model.preflight import check

    asked = {"regenerate_answers": "all"} if stage == "regenerate" else {}
    parameters = check({**asked, **given(options)}, [stage])
    with scratch(work) as folder:
        yield parameters, folder


def _stage(stage: Stage, **uris: str) -> Callable[[Callable[[], None]], click.Command]:
    """Makes the command of a stage, whose help is the docstring; `uris` are those that it must be given."""
    options = together(*starmap(uri, uris.items()), options_of(stage), WORK)
    return lambda help: cli.command(stage, help=help.__doc__)(options(partial(_run, stage, tuple(uris))))


@_stage("import", output="Where the imported model goes.")
def import_command() -> None:
    """Bring a target model from the Hub, a Transformers folder or MLflow into one canonical folder.

    \b
    draft-model import --huggingface_id Qwen/Qwen3-8B --output s3://bucket/qwen3-8b
    """  # noqa: D301


@_stage("regenerate", model="The imported model.", output="Where the conversations go.")
def regenerate_command() -> None:
    """Replace the assistants' turns of conversations by the target's own answers, turn by turn.

    The lines are those that `draft-model dataset` takes. The answers go to OUTPUT/train, and with a validation split to
    OUTPUT/validation, as JSONL files for `dataset_train_split` and `dataset_validation_split`; OUTPUT/report.html shows
    them beside those that were there. vLLM generates where it is installed (DRAFT_MODEL_ENGINE_PYTHON names another
    Python that has it), else transformers. What was interrupted goes on where it was.

    \b
    draft-model regenerate --model s3://bucket/qwen3-8b --dataset_train_split s3://bucket/chats.jsonl \\
        --chat_template qwen --output s3://bucket/own
    """  # noqa: D301


@_stage("dataset", model="The imported model.", output="Where the data set goes.")
def dataset_command() -> None:
    """Turn conversations (JSONL) into tokens, loss masks and the draft vocabulary.

    A line is {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]};
    `messages`, ShareGPT's from/value, tools, tool calls, reasoning_content and rendered `text` are taken too. An
    assistant message with "finish": "length" was cut: its end-of-turn token is not learnt. The files may be given as
    a path, a folder or a glob, on disk, s3://, hf://, gs://, abfs:// or https://. What was interrupted goes on where
    it was.

    In the output, report.html shows in colour what is learnt of three conversations, and rejected.jsonl has each line
    that cannot be used, with its number and reason. docs/data.md has the whole of it.

    \b
    draft-model dataset --model s3://bucket/qwen3-8b --dataset_train_split 's3://bucket/chats/*.jsonl.gz' \\
        --chat_template qwen --output s3://bucket/dataset
    """  # noqa: D301


@_stage("train", model="The imported model.", dataset="The built data set.", output="Where the checkpoints go.")
def train_command() -> None:
    """Train the draft: epoch_N/ checkpoints and final/, which vLLM and SGLang load unchanged.

    \b
    draft-model train --model s3://bucket/qwen3-8b --dataset s3://bucket/dataset --output s3://bucket/draft \\
        --number_of_gpu_to_use_draft_model_training 8 --draft_global_batch_size 64
    """  # noqa: D301


@_stage(
    "evaluate", model="The imported model.", dataset="The built data set; its validation split is decoded.",
    draft="The trained draft (.../final); report and model card are added to it.",
)  # fmt: skip
def evaluate_command() -> None:
    """Measure the acceptance length, and prove that the output does not change.

    \b
    draft-model evaluate --model s3://bucket/qwen3-8b --dataset s3://bucket/dataset --draft s3://bucket/draft/final
    """  # noqa: D301


@cli.command("compare")
@uri("model", "The target, imported or a Transformers folder.")
@click.option("--dataset", default="", metavar="URI", help="Built data set, decoded by its validation split.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="File for the comparison as JSON.")
@click.argument("drafts", nargs=-1, required=True, metavar="DRAFT DRAFT...")
@options_of("evaluate", "chat_template")
@WORK
def compare_command(
    model: str, dataset: str, file: Path | None, drafts: tuple[str, ...], work: Path | None, **options: Any
) -> None:
    """Decode the same prompts with several drafts of one target: ours, SpecForge's or speculators'.

    \b
    draft-model compare --model s3://b/model --dataset s3://b/dataset s3://b/one/final s3://b/other/final
    draft-model compare --model s3://b/model --evaluation_prompts mt-bench,gsm8k ours/ theirs/
    """  # noqa: D301
    import json

    from draft_model.evaluation import compare

    with _checked("evaluate", options, work) as (parameters, folder):
        records = compare.compare(compare.CompareConfig(model, dataset, drafts, folder, parameters))
    heads, *rows = compare.table(records)
    title = f"on {records[0]['hardware']}, {parameters.num_speculative_tokens} proposals, greedy"
    _print_table(rows, heads, title=title)
    if file is not None:
        file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


@cli.command("export")
@uri("draft", "The trained draft (.../final), or one of another trainer.")
@click.option("--format", "form", required=True, type=click.Choice(["vllm", "sglang", "speculators"]), help="For whom.")
@click.option("--target", default="", help="Hub id or path of the target; speculators only.  [default: as trained]")
@click.option("--target-type", default="", help="The target's model_type.  [default: as trained]")
@uri("output", "Folder to write.")
@WORK
def export_command(draft: str, form: Any, target: str, target_type: str, output: str, work: Path | None) -> None:
    """Write a draft as one engine's own tools write theirs.

    \b
    draft-model export --draft s3://bucket/draft/final --format speculators --output drafts/speculators
    """  # noqa: D301
    from draft_model.export import export

    with scratch(work) as folder:
        click.echo(export(draft, form, output, folder, target, target_type))


@cli.command("push")
@click.argument("draft", metavar="FOLDER")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="A new repository is for its owners only.")
@click.option("--dry-run", is_flag=True, help="Only say which files would go.")
@WORK
def push_command(draft: str, repository: str, private: bool, dry_run: bool, work: Path | None) -> None:
    """Put a finished draft (.../final) with its card on the Hugging Face Hub.

    The token is HF_TOKEN's, or that of `hf auth login`. The state of the training stays here.

    \b
    draft-model push s3://bucket/draft/final my-org/qwen3-8b-eagle3 --private
    """  # noqa: D301
    from draft_model.evaluation import push

    push.check_name(repository)
    files = push.files_of(draft)
    for file in files:
        click.echo(f"{file.size:>15,}  {file.path}")
    click.echo(f"{sum(file.size for file in files):>15,}  bytes {'would go' if dry_run else 'go'} to {repository}")
    if not dry_run:
        with scratch(work) as folder:
            click.echo(push.push(draft, repository, folder, private=private))


@cli.command("plan")
@click.option("--config", required=True, metavar="URI", help="The target's config.json, or its folder.")
@click.option("--memory", default=80.0, help="Of a GPU, GB.")
@click.option("--peak", default=989.0, help="Of a GPU in the compute type, TFLOP/s.")
@click.option("--share", default=0.4, help="Of the peak that training reaches; see docs/scaling.md.")
@click.option("--network", default=50.0, help="Between nodes, GB/s for each GPU.")
@click.option("--tokens", default=1000.0, help="Of a conversation on average.")
@click.option("--supervised", default=0.6, help="Share of the tokens that is the assistant's.")
@click.option("--conversations", default=100_000, help="To train on; says what acceptance length to expect.")
@options_of("train", "max_length", "evaluation_max_new_tokens", "number_of_gpu_to_use_evaluation")
def plan_command(
    config: str, memory: float, peak: float, share: float, network: float, tokens: float, supervised: float,
    conversations: int, **options: Any,
) -> None:  # fmt: skip
    """Work out memory, time and network of a training, and whether the evaluation's GPUs hold the target.

    \b
    draft-model plan --config docs/targets/llama-3.3-70b.json --tp_size 4 \\
        --number_of_gpu_to_use_draft_model_training 8 --draft_global_batch_size 64
    """  # noqa: D301
    from draft_model import drafts
    from draft_model.drafts.base import check_proposals
    from draft_model.jobs.compute import Compute, misfit, weights_of
    from draft_model.preflight import check
    from draft_model.training import plan
    from draft_model.training.plan import advice, expectation

    parameters = check(given(options), ["train"])
    cluster = plan.Cluster(memory * 1e9, peak * 1e12, share, network * 1e9)
    target = plan.read_config(config)
    draft = plan.draft_of(target, parameters)
    note = check_proposals(draft, parameters.num_speculative_tokens)
    made = plan.make_plan(target, draft, parameters, cluster, plan.Workload(tokens, supervised))
    seen = conversations * parameters.num_epochs * tokens * supervised
    gpus = parameters.number_of_gpu_to_use_evaluation or parameters.number_of_gpu_to_use_draft_model_training
    weights = weights_of(target)
    size = 2.0 * drafts.family(draft.family).costs(draft, parameters.ttt_length).parameters
    room = "memory not known: config.json does not tell the size of the weights"
    if weights:
        node = Compute("", "", gpus=gpus, gpu_memory=cluster.memory)
        room = misfit(target, weights, size, parameters, node) or f"fits on {gpus} GPUs of {memory:.0f} GB"
    rows = [
        *plan.rows_of(made, parameters, cluster),
        ("evaluation", room),
        ("acceptance length", expectation(seen, parameters.num_speculative_tokens, draft.family)),
        ("recommended", advice(parameters)),
        *([("note", note)] if note else []),
    ]
    _print_table(rows, width=110)


def _print_table(
    rows: Iterable[Iterable[str]], heads: Iterable[str] = (), *, title: str = "", width: int | None = None
) -> None:
    """Prints a table; what stands in it may be a stranger's text, and is neither markup nor a terminal's command."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(*(escape(printable(head)) for head in heads), title=escape(title), show_header=bool(heads))
    for row in rows:
        shown.add_row(*(escape(printable(value)) for value in row))
    Console(width=width, emoji=False).print(shown)


@cli.command("parameters")
def parameters_command() -> None:
    """Print the table of all parameters, as Markdown.

    \b
    draft-model parameters | grep chat_template
    """  # noqa: D301
    click.echo(parameter_table())


def parameter_table() -> str:
    """All parameters as a Markdown table, the contract's first."""
    rows = [
        (
            f"{p.name} (addition)" if p.addition else p.name,
            f"{p.kind}, {p.unit}" if p.unit else p.kind,
            f"`{p.default}`" if p.default != "" and p.name != "total_steps" else "-",
            ", ".join(f"`{choice}`" for choice in p.choices) or p.allowed,
            p.help,
        )
        for p in PARAMETERS
    ]
    return table(rows, ("parameter", "type", "default", "allowed", "meaning"), raw=True).rstrip("\n")


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """The command line: exits with 0, or with 2 for a user's mistake, without a traceback."""
    sys.exit(exit_code(_command_line))


def _command_line() -> None:
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as error:  # what click makes of Ctrl-C
        raise KeyboardInterrupt from error
