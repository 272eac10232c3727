"""The commands of `draft-model` that have to do with Kubeflow: the whole pipeline, here or on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from draft_model.doors import raise_on_sigterm
from draft_model.errors import DraftModelError
from draft_model.options import VALUES, together, values_of

if TYPE_CHECKING:
    from kfp_pipeline.client import Server

_IMAGES = "DRAFT_MODEL_IMAGES"

_IMAGE = click.option(
    "--image", "images", multiple=True, metavar="[KIND=]NAME", envvar=_IMAGES, show_envvar=True,
    help="Images of the steps, by tag or digest, where the cluster pulls them.",
)  # fmt: skip
_SERVER = together(
    click.option("--host", default="", show_default=False, metavar="URL", envvar="KF_PIPELINES_ENDPOINT",
                 show_envvar=True, help="KFP's UI or API; not given: the cluster of this pod or of the kubeconfig."),
    click.option("--namespace", default="", show_default=False, help="Yours, where KFP serves several users."),
    click.option("--token-file", type=click.Path(path_type=Path), envvar="KF_PIPELINES_SA_TOKEN_PATH",
                 show_envvar=True, help="Holds a bearer token; read again for each request."),
    click.option("--ca-file", type=click.Path(path_type=Path), help="Certificates to trust, PEM."),
)  # fmt: skip


@click.command("run")
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

    print_summary(run_local(values, folder.resolve()).final, folder)


@click.command("compile")
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


@click.command("submit")
@_SERVER
@VALUES
@_IMAGE
@click.option("--experiment", default="draft-model", envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME", show_envvar=True,
              help="Lists the run; made where it is not there.")  # fmt: skip
@click.option(
    "--run-name", default="", show_default=False, help="Shown in the UI.  [default: the target's name and the time]"
)
@click.option("--service-account", default="draft-model-coordinator", help="Of the run's pods.")
@click.option("--no-cache", is_flag=True, help="Import the model and build the data set even where a run has before.")
@click.option("--watch", "follow", is_flag=True, help="Follow the run; exit with 1 where it fails.")
def submit_command(
    params: Path | None, settings: tuple[str, ...], images: tuple[str, ...], experiment: str, run_name: str,
    service_account: str, no_cache: bool, follow: bool, namespace: str, **where: Any,
) -> None:  # fmt: skip
    """Run the pipeline on a cluster; prints the run's id.

    The pipeline is uploaded once: its version's name carries the hash of its content. Parameters are checked before
    anything is sent; the run's first step looks for the inputs that they name.

    \b
    draft-model submit --host http://127.0.0.1:8080 --image 'registry.example/team/{kind}:0.0.1' \\
        --params run.yaml --set num_epochs=1 --watch

    `draft-model parameters` lists the names.
    """  # noqa: D301
    if images:
        os.environ[_IMAGES] = " ".join(images)  # read when the components are imported
    from kfp_pipeline.client import connect, problems_with

    problems, values = problems_with(**where), {}
    if not images:
        problems.append(
            "--image: not given; name the steps' images where the cluster pulls them: one for all kinds of steps with "
            "{kind} in its name, or KIND=NAME for each"
        )
    try:
        values = values_of(params, settings)
        from kfp_pipeline.submit import check, submit

        check(values)
    except DraftModelError as error:
        problems += error.problems
    if problems:
        raise DraftModelError(problems)
    raise_on_sigterm()
    server = connect(namespace=namespace, **where)
    submitted = submit(
        server, values, cache=not no_cache, run_name=run_name, service_account=service_account,
        experiment=os.environ.get("KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME") or experiment,
    )  # fmt: skip
    click.echo(submitted.run_id)
    click.echo(submitted.link, err=True)
    if follow:
        _follow(server, submitted.run_id, {"namespace": namespace, **where})


@click.command("watch")
@_SERVER
@click.argument("run")
def watch_command(run: str, **where: Any) -> None:
    """Follow a run on a cluster until it ends; exit with 1 where it fails.

    \b
    draft-model watch --host http://127.0.0.1:8080 4f2c3c8e-5a0f-4f6c-9d5c-0d3f6f3f2a11
    """  # noqa: D301
    from kfp_pipeline.client import connect

    raise_on_sigterm()
    server = connect(**where)
    click.echo(server.run_link(run), err=True)
    _follow(server, run, where)


@click.command("terminate")
@_SERVER
@click.argument("run")
def terminate_command(run: str, **where: Any) -> None:
    """End a run on a cluster; its exit task deletes the training job.

    \b
    draft-model terminate --host http://127.0.0.1:8080 4f2c3c8e-5a0f-4f6c-9d5c-0d3f6f3f2a11
    """  # noqa: D301
    from kfp_pipeline.client import TIMEOUT, connect

    server = connect(**where)
    with server.asked():
        server.client.runs.run_service_terminate_run(run, _request_timeout=TIMEOUT)
    click.echo(f"is asked to end: {server.run_link(run)}", err=True)


def _follow(server: Server, run_id: str, where: Mapping[str, Any]) -> None:
    """Shows a run until it ends, and exits with its result; `where` are the options that led to the server."""
    from kfp_pipeline.client import NotLetIn, ServerAway
    from kfp_pipeline.watch import SUCCEEDED, watch

    try:
        ended = watch(server, run_id)
    except (KeyboardInterrupt, SystemExit, ServerAway, NotLetIn):
        again = " ".join([*(f"--{name.replace('_', '-')} {value}" for name, value in where.items() if value), run_id])
        click.echo("The run itself goes on.", err=True)
        click.echo(f"Follow it: draft-model watch {again}\nEnd it: draft-model terminate {again}", err=True)
        raise
    link = server.run_link(run_id)
    if ended.state == SUCCEEDED:
        click.echo(f"succeeded: {link}", err=True)
        return
    lines = [f"error: the run ended {ended.state}{f': {ended.error}' if ended.error else ''}; {link}"]
    lines += [f"  - {task.name}: {task.error or 'says why in its log'}" for task in ended.failed]
    pods = f"-n {server.namespace or 'kubeflow'} --selector pipeline/runid={run_id}"
    lines.append(f"logs: kubectl logs {pods} --container main --prefix --tail 20")
    click.echo("\n".join(lines), err=True)
    sys.exit(1)


COMMANDS = (run_command, compile_command, submit_command, watch_command, terminate_command)
