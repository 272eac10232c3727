"""`draft-model`: every stage by hand, the whole pipeline on this machine, and the pipeline's file for a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from draft_model.doors import exit_code, raise_on_sigterm
from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS, Parameter, Stage, parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "max_content_width": 110,
    "show_default": True,
}


@click.group(context_settings=_SETTINGS)
@click.version_option(package_name="pipeline-draft-model")
def cli() -> None:
    """Train the draft model that makes an LLM decode faster (EAGLE-3 speculative decoding).

    \b
    On this machine, all at once:   draft-model run --params run.yaml
    One stage at a time:            draft-model import | dataset | train | evaluate
    With what was trained:          draft-model compare | export
    For a cluster:                  draft-model compile

    A URI is a path, file://..., s3://bucket/key or minio://bucket/key; for S3 the endpoint and the keys come from the
    usual AWS_* environment variables.
    """  # noqa: D301


def _option(parameter: Parameter) -> Callable[[Any], Any]:
    """A click option of one parameter; its value stays text, so that validation sees all of them at once."""
    notes = [f"Unit: {parameter.unit}."] if parameter.unit else []
    notes += [f"Allowed: {parameter.allowed}."] if parameter.allowed else []
    return click.option(
        f"--{parameter.name}",
        metavar="|".join(parameter.choices) or _METAVARS[parameter.type],
        default=None,
        help=" ".join([parameter.help, *notes])
        + (f"  [default: {parameter.default}]" if parameter.default != "" else ""),
        show_default=False,
    )


def _options_of(stage: Stage, *others: str) -> Callable[[Any], Any]:
    """The options of a stage's parameters, and of some others by name."""
    chosen = [*parameters_of(stage), *(parameter for parameter in PARAMETERS if parameter.name in others)]

    def add(command: Any) -> Any:
        for parameter in reversed(chosen):
            command = _option(parameter)(command)
        return command

    return add


_WORK = click.option("--work", type=click.Path(path_type=Path), help="Scratch folder; a temporary one if not given.")


def _uri(name: str, help: str) -> Callable[[Any], Any]:
    return click.option(f"--{name}", required=True, metavar="URI", help=help)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _scratch(work: Path | None) -> Iterator[Path]:
    raise_on_sigterm()
    if work is not None:
        yield work.resolve()
        return
    with TemporaryDirectory(prefix="draft-model-") as folder:
        yield Path(folder)


@cli.command("import")
@_uri("output", "Where the imported model goes.")
@_options_of("import")
@_WORK
def import_command(output: str, work: Path | None, **options: Any) -> None:
    """Bring a target model from the Hub, a Transformers folder or MLflow into one canonical folder.

    \b
    draft-model import --huggingface_id Qwen/Qwen3-8B --output s3://bucket/qwen3-8b
    """  # noqa: D301
    from draft_model.model_import import ImportConfig, run
    from draft_model.preflight import check

    parameters = check(_given(options), ["import"])
    with _scratch(work) as folder:
        click.echo(run(ImportConfig(output=output, work=folder, parameters=parameters)).uri)


@cli.command("dataset")
@_uri("model", "The imported model.")
@_uri("output", "Where the data set goes.")
@_options_of("dataset")
@click.option("--part", metavar="I/N", help="Encode one of N parts; without it, what is missing, and merge.")
@_WORK
def dataset_command(model: str, output: str, part: str | None, work: Path | None, **options: Any) -> None:
    """Turn conversations (JSONL) into tokens, loss masks and the draft vocabulary.

    A line is {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]};
    `messages`, ShareGPT's from/value, tools, tool calls, reasoning_content and rendered `text` are taken too. An
    assistant message with "finish": "length" was cut: its end-of-turn token is not learnt. The files may be given as
    a path, a folder or a glob, on disk, s3://, gs:// or https://. What was interrupted goes on where it was.

    \b
    Several machines at once:   draft-model dataset --part 1/8 ...   to --part 8/8, then without --part.
    """  # noqa: D301
    from draft_model.dataset import DatasetConfig, run, run_part
    from draft_model.preflight import check

    share = _share(part) if part else None
    parameters = check(_given(options), ["dataset"])
    with _scratch(work) as folder:
        config = DatasetConfig(model=model, output=output, parameters=parameters, work=folder)
        if share:
            run_part(config, *share)
        else:
            click.echo(run(config).uri)


def _share(part: str) -> tuple[int, int]:
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise DraftModelError(f"--part: given {part!r}; allowed: I/N with I from 1 to N, as 1/8")
    return int(number) - 1, int(parts)


@cli.command("train")
@_uri("model", "The imported model.")
@_uri("dataset", "The built data set.")
@_uri("output", "Where the checkpoints go.")
@_options_of("train")
@_WORK
def train_command(model: str, dataset: str, output: str, work: Path | None, **options: Any) -> None:
    """Train the draft: epoch_N/ checkpoints and final/, which vLLM and SGLang load unchanged."""
    from draft_model import jobs
    from draft_model.preflight import check
    from draft_model.training import TrainConfig

    parameters = check(_given(options), ["train"])
    with _scratch(work) as folder:
        config = TrainConfig(model=model, dataset=dataset, output=output, work=folder, parameters=parameters)
        click.echo(jobs.run(config).final)


@cli.command("evaluate")
@_uri("model", "The imported model.")
@_uri("dataset", "The built data set; its validation split is decoded.")
@_uri("draft", "The trained draft (.../final); report and model card are added to it.")
@_options_of("evaluate")
@_WORK
def evaluate_command(model: str, dataset: str, draft: str, work: Path | None, **options: Any) -> None:
    """Measure the acceptance length, and prove that the output does not change."""
    from draft_model.evaluation import EvaluateConfig, run
    from draft_model.preflight import check

    parameters = check(_given(options), ["evaluate"])
    with _scratch(work) as folder:
        config = EvaluateConfig(model=model, dataset=dataset, final=draft, work=folder, parameters=parameters)
        result = run(config)
        click.echo(
            f"acceptance length {result.acceptance_length:.2f} (untrained {result.untrained_acceptance_length:.2f}), "
            f"{result.compared_tokens} tokens equal to the target's own; report beside {result.final}"
        )


@cli.command("compare")
@_uri("model", "The target, imported or a Transformers folder.")
@click.option("--dataset", default="", metavar="URI", help="Built data set; its validation split is decoded.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="File for the comparison as JSON.")
@click.argument("drafts", nargs=-1, required=True, metavar="DRAFT DRAFT...")
@_options_of("evaluate", "chat_template")
@_WORK
def compare_command(
    model: str, dataset: str, file: Path | None, drafts: tuple[str, ...], work: Path | None, **options: Any
) -> None:
    """Decode the same prompts with several drafts of one target: ours, SpecForge's or speculators'.

    \b
    draft-model compare --model s3://b/model --dataset s3://b/dataset s3://b/one/final s3://b/other/final
    draft-model compare --model s3://b/model --evaluation_prompts mt-bench,gsm8k ours/ theirs/
    """  # noqa: D301
    import json

    from rich.console import Console
    from rich.table import Table

    from draft_model.preflight import check

    parameters = check(_given(options), ["evaluate"])
    from draft_model.evaluation.compare import CompareConfig, compare, table

    with _scratch(work) as folder:
        records = compare(CompareConfig(model, dataset, drafts, folder, parameters))
    head, *rows = table(records)
    shown = Table(*head, title=f"on {records[0]['hardware']}, {parameters.num_speculative_tokens} proposals, greedy")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    if file is not None:
        file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


@cli.command("export")
@_uri("draft", "The trained draft (.../final), or one of another trainer.")
@click.option("--format", "form", required=True, type=click.Choice(["vllm", "sglang", "speculators"]), help="For whom.")
@click.option("--target", default="", help="Hub id or path of the target; speculators only.  [default: as trained]")
@_uri("output", "Folder to write.")
@_WORK
def export_command(draft: str, form: Any, target: str, output: str, work: Path | None) -> None:
    """Write a draft as one engine's own tools write theirs."""
    from draft_model.export import export

    with _scratch(work) as folder:
        click.echo(export(draft, form, output, folder, target))


@cli.command("run")
@click.option("--params", type=click.Path(path_type=Path), help="YAML or JSON file with parameters by name.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="One parameter; wins over the file.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/local"), help="Where the run's files go.")
def run_command(params: Path | None, settings: tuple[str, ...], folder: Path) -> None:
    """Run the whole compiled pipeline on this machine, with an embedded object store.

    \b
    draft-model run --params run.yaml --set num_epochs=1

    `draft-model parameters` lists the names.
    """  # noqa: D301
    from draft_model.summary import print_summary
    from kfp_pipeline.local import run_local

    values = {**_from_file(params), **_from_settings(settings)}
    print_summary(run_local(values, folder.resolve()).final, folder)


def _from_file(path: Path | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DraftModelError(f"--params: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DraftModelError(f"--params: {path} holds no parameters; a line is `name: value`")
    # YAML reads `resume: true` as a truth value; the contract has a word there.
    return {str(name): str(v).lower() if isinstance(v, bool) else v for name, v in values.items()}


def _from_settings(settings: tuple[str, ...]) -> dict[str, str]:
    if bad := [setting for setting in settings if "=" not in setting]:
        raise DraftModelError([f"--set: given {setting!r}; allowed: NAME=VALUE" for setting in bad])
    return {
        name.strip().replace("-", "_"): value for name, _, value in (setting.partition("=") for setting in settings)
    }


@cli.command("compile")
@click.option("--output", type=click.Path(path_type=Path), help="File to write.  [default: the committed ones]")
@click.option("--image", "images", multiple=True, metavar="[KIND=]NAME", help="Images of the steps; needs --output.")
def compile_command(output: Path | None, images: tuple[str, ...]) -> None:
    """Write the pipeline's file, which the KFP UI and the kfp client upload.

    --image names the images where your cluster pulls them, by tag or digest: for all kinds (importer, dataset,
    trainer, coordinator) with {kind} in the name, or one at a time.

    \b
    draft-model compile --image 'registry.example/team/{kind}:0.0.1' --output pipeline.yaml
    """  # noqa: D301
    if images and output is None:
        raise DraftModelError("--image: given without --output; the committed files name no registry's image")
    if images:
        os.environ["DRAFT_MODEL_IMAGES"] = " ".join(images)  # read when the components are imported
    from kfp_pipeline.compile import write_compiled

    click.echo("\n".join(map(str, write_compiled(output))))


@cli.command("plan")
@click.option("--config", required=True, metavar="URI", help="The target's config.json, or its folder.")
@click.option("--memory", default=80.0, help="Of a GPU, GB.")
@click.option("--peak", default=989.0, help="Of a GPU in the compute type, TFLOP/s.")
@click.option("--share", default=0.4, help="Of the peak that training reaches; see docs/scaling.md.")
@click.option("--network", default=50.0, help="Between nodes, GB/s for each GPU.")
@click.option("--tokens", default=1000.0, help="Of a conversation on average.")
@click.option("--supervised", default=0.6, help="Share of the tokens that is the assistant's.")
@_options_of("train", "max_length")
def plan_command(
    config: str, memory: float, peak: float, share: float, network: float, tokens: float, supervised: float,
    **options: Any,
) -> None:  # fmt: skip
    """Work out memory, time and network of a training, without loading the target.

    \b
    draft-model plan --config docs/targets/llama-3.3-70b.json --tp_size 4 \\
        --number_of_gpu_to_use_draft_model_training 8 --draft_global_batch_size 64
    """  # noqa: D301
    from rich.console import Console
    from rich.table import Table

    from draft_model.preflight import check
    from draft_model.training import plan

    parameters = check(_given(options), ["train"])
    cluster = plan.Cluster(memory * 1e9, peak * 1e12, share, network * 1e9)
    target = plan.read_config(config)
    draft = plan.draft_of(target, parameters)
    made = plan.make_plan(target, draft, parameters, cluster, plan.Workload(tokens, supervised))
    table = Table(show_header=False)
    for name, value in plan.rows_of(made, parameters, cluster):
        table.add_row(name, value)
    Console(width=110).print(table)


@cli.command("parameters")
def parameters_command() -> None:
    """Print the table of all parameters, as Markdown."""
    click.echo(parameter_table())


def parameter_table() -> str:
    """All parameters as a Markdown table, the contract's first."""
    rows = ["| parameter | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for p in PARAMETERS:
        default = f"`{p.default}`" if p.default != "" and p.name != "total_steps" else "-"
        allowed = ", ".join(f"`{choice}`" for choice in p.choices) or p.allowed
        unit = f", {p.unit}" if p.unit else ""
        name = f"{p.name} (addition)" if p.addition else p.name
        rows.append(f"| {name} | {p.kind}{unit} | {default} | {allowed} | {p.help} |")
    return "\n".join(rows)


def main() -> None:
    """The command line's door: 0, or 2 for a user's mistake, without a traceback."""
    sys.exit(exit_code(_command_line))


def _command_line() -> None:
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as error:  # what click makes of Ctrl-C
        raise KeyboardInterrupt from error
