"""The commands of `draft-model` for the whole pipeline, on this machine or on a cluster."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from draft_model.entrypoint import printable, raise_on_sigterm
from draft_model.errors import DraftModelError, Problems
from draft_model.options import VALUES, Command, together, values_of

if TYPE_CHECKING:
    from kfp_pipeline.client import Server

_IMAGES = "DRAFT_MODEL_IMAGES"

_IMAGE = click.option(
    "--image", "images", multiple=True, metavar="[KIND=]NAME", envvar=_IMAGES, show_envvar=True,
    help="Images of the steps, by tag or digest, where the cluster pulls them.",
)  # fmt: skip
_SERVER = together(
    click.option("--host", default="", metavar="URL", envvar="KF_PIPELINES_ENDPOINT",
                 show_envvar=True, help="KFP's UI or API; not given: the cluster of this pod or of the kubeconfig."),
    click.option("--namespace", default="", help="Yours, where KFP serves several users."),
    click.option("--token-file", type=click.Path(path_type=Path), envvar="KF_PIPELINES_SA_TOKEN_PATH",
                 show_envvar=True, help="Holds a bearer token; read again for each request."),
    click.option("--ca-file", type=click.Path(path_type=Path), help="Certificates to trust, PEM."),
)  # fmt: skip


@click.command("run", cls=Command)
@VALUES
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/local"), help="Where the run's files go.")
def run_command(params: Path | None, settings: tuple[str, ...], folder: Path) -> None:
    """Run the whole compiled pipeline on this machine, with an embedded object store.

    \b
    draft-model run --params run.yaml --set num_epochs=1

    `draft-model parameters` lists the names.
    """  # noqa: D301
    values = values_of(params, settings)
    from draft_model.evaluation.card import print_summary
    from kfp_pipeline.local import run_local

    print_summary(run_local(values, folder.resolve()))


@click.command("compile", cls=Command)
@click.option("--output", type=click.Path(path_type=Path), help="File for the IR, to upload.")
@click.option("--manifest", type=click.Path(path_type=Path), help="File for the Kubernetes resources, to apply.")
@_IMAGE
def compile_command(output: Path | None, manifest: Path | None, images: tuple[str, ...]) -> None:
    """Write the pipeline's files: for the KFP UI and kfp.Client, and as Kubernetes resources for GitOps.

    --image names the images where your cluster pulls them, by tag or digest: for all kinds (importer, dataset,
    trainer, coordinator) with {kind} in the name, or one at a time. Without --output and --manifest, the committed
    files are written, which name no registry's images.

    \b
    draft-model compile --image 'registry.example/team/{kind}:0.0.1' --output pipeline.yaml
    """  # noqa: D301
    if images and output is None and manifest is None:
        raise DraftModelError(
            "--image: given without --output or --manifest; the committed files name no registry's image"
        )
    if images:
        os.environ[_IMAGES] = " ".join(images)  # read when the components are imported
    from kfp_pipeline.compile import write_compiled

    click.echo("\n".join(map(str, write_compiled(output, manifest))))


@click.command("submit", cls=Command)
@_SERVER
@VALUES
@_IMAGE
@click.option("--experiment", default="draft-model", envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME", show_envvar=True,
              help="Lists the run; created if missing.")  # fmt: skip
@click.option("--run-name", default="", help="Shown in the UI.  [default: the target's name and the time]")
@click.option("--service-account", default="draft-model-steps", help="Of the run's pods.")
@click.option("--watch", "follow", is_flag=True, help="Follow the run; exit with 1 where it fails.")
def submit_command(
    params: Path | None, settings: tuple[str, ...], images: tuple[str, ...], experiment: str, run_name: str,
    service_account: str, follow: bool, namespace: str, **where: Any,
) -> None:  # fmt: skip
    """Run the pipeline on a cluster (KFP 2.16.1 or newer); prints the run's id.

    The pipeline is uploaded once: its version's name carries the hash of its content. Parameters are checked before
    anything is sent; the run's first step checks the inputs that they name.

    \b
    draft-model submit --host http://127.0.0.1:8080 --image 'registry.example/team/{kind}:0.0.1' \\
        --params run.yaml --set num_epochs=1 --watch

    `draft-model parameters` lists the names.
    """  # noqa: D301
    if images:
        os.environ[_IMAGES] = " ".join(images)  # read when the components are imported
    from kfp_pipeline.client import connect, problems_with

    problems, values = Problems(problems_with(**where)), dict[str, Any]()
    if not images:
        problems.append(
            "--image: not given; name the steps' images where the cluster pulls them: one for all kinds of steps with "
            "{kind} in its name, or KIND=NAME for each"
        )
    with problems.collect():
        values = values_of(params, settings)
        from kfp_pipeline.submit import check, submit

        check(values)
    problems.raise_all()
    raise_on_sigterm()
    server = connect(namespace=namespace, **where)
    submitted = submit(
        server, values, run_name=run_name, service_account=service_account,
        experiment=os.environ.get("KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME") or experiment,
    )  # fmt: skip
    click.echo(submitted.run_id)
    click.echo(submitted.link, err=True)
    if follow:
        _follow(server, submitted.run_id, {"namespace": namespace, **where})


@click.command("watch", cls=Command)
@_SERVER
@click.argument("run")
def watch_command(run: str, **where: Any) -> None:
    """Follow a run on a cluster until it ends; where it fails, say why and exit with 1.

    \b
    draft-model watch --host http://127.0.0.1:8080 4f2c3c8e-5a0f-4f6c-9d5c-0d3f6f3f2a11
    """  # noqa: D301
    from kfp_pipeline.client import connect

    raise_on_sigterm()
    server = connect(**where)
    click.echo(server.run_link(run), err=True)
    _follow(server, run, where)


@click.command("logs", cls=Command)
@_SERVER
@click.argument("run")
@click.argument("step", required=False, default="")
def logs_command(run: str, step: str, **where: Any) -> None:
    """Print a step's log without KFP's own lines; without STEP, why the failed steps of a run failed.

    \b
    draft-model logs --host http://127.0.0.1:8080 4f2c3c8e-5a0f-4f6c-9d5c-0d3f6f3f2a11 train-draft-model
    """  # noqa: D301
    from kfp_pipeline.client import connect
    from kfp_pipeline.watch import own_lines, pods, read_log, reason, workflow

    server = connect(**where)
    server.client.get_run(run)
    found = pods(workflow(server, run))
    if not found or (step and step not in found):
        known = f"its steps so far: {', '.join(found)}" if found else f"for its pods' logs: {_kubectl(server, run)}"
        raise DraftModelError(f"{step or run}: the server shows no pods of it; {known}")
    chosen = [found[step]] if step else [pod for pod in found.values() if pod.failed]
    if not chosen:
        click.echo(f"no step has failed; its steps: {', '.join(found)}", err=True)
    for pod in chosen:
        lines = read_log(server, run, pod)
        why = [f"{pod.step}: {pod.message or pod.phase}", *(f"  {line}" for line in reason(pod, lines))]
        click.echo(printable("\n".join(own_lines(lines) if step and not pod.driver else why)))


@click.command("terminate", cls=Command)
@_SERVER
@click.argument("run")
def terminate_command(run: str, **where: Any) -> None:
    """End a run on a cluster; its exit task deletes the training job.

    \b
    draft-model terminate --host http://127.0.0.1:8080 4f2c3c8e-5a0f-4f6c-9d5c-0d3f6f3f2a11
    """  # noqa: D301
    from kfp_pipeline.client import connect

    server = connect(**where)
    server.client.terminate_run(run)
    click.echo(f"termination requested: {server.run_link(run)}", err=True)


def _follow(server: Server, run_id: str, where: Mapping[str, Any]) -> None:
    """Watches a run until it ends, and exits with its result; `where` are the options that led to the server."""
    from kfp_pipeline.client import NotLetIn, ServerAway
    from kfp_pipeline.watch import Stuck, watch

    named = {f"--{name.replace('_', '-')}": str(value) for name, value in where.items() if value}
    options = shlex.join([*itertools.chain(*named.items()), run_id])
    try:
        ended = watch(server, run_id)
    except (KeyboardInterrupt, SystemExit, ServerAway, NotLetIn, Stuck):
        click.echo("The run itself goes on.", err=True)
        click.echo(f"Follow it: draft-model watch {options}\nEnd it: draft-model terminate {options}", err=True)
        raise
    if ended.outcome == "succeeded":
        click.echo(f"succeeded: {server.run_link(run_id)}", err=True)
        return
    what = {"failed": "failed", "terminated": "was terminated", "lost": "lost a step, whose pod was killed"}
    lines = [f"error: the run {what[ended.outcome]} (KFP: {ended.state}); {server.run_link(run_id)}"]
    for step, why in ended.failures.items():
        lines += [f"  - {step}:", *(f"      {line}" for line in why)]
    lines += [f"  {note}" for note in ended.notes]
    lines.append(f"logs: draft-model logs {options}" if ended.explained else f"logs: {_kubectl(server, run_id)}")
    click.echo(printable("\n".join(lines)), err=True)  # logs may hold what a terminal obeys
    sys.exit(1)


def _kubectl(server: Server, run_id: str) -> str:
    pods = ["-n", server.namespace or "kubeflow", "--selector", f"pipeline/runid={run_id}"]
    return shlex.join(["kubectl", "logs", *pods, "--container", "main", "--prefix", "--tail", "20"])


COMMANDS = (run_command, compile_command, submit_command, watch_command, logs_command, terminate_command)
