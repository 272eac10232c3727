"""Recurring runs that a file in git lists: KFP's own list is made the same.

The Job of manifests/components/recurring-runs runs this after each sync. A hash in a recurring run's description says
what it was made from, so that a second time changes nothing; those without one were made by hand and are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draft_model.entrypoint import exit_code
from draft_model.errors import DraftModelError
from kfp_pipeline.client import Server, connect
from kfp_pipeline.pipeline import NAME
from kfp_pipeline.submit import EXPERIMENT, SERVICE_ACCOUNT, check, find_version
from kfp_pipeline.watch import ENDS

_MARK = re.compile(r"\[draft-model ([0-9a-f]{12})\]$")


class Schedule(BaseModel):
    """One recurring run: six fields of cron with seconds first, in UTC; parameters left out have their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str = Field(pattern=r"^(@[a-z]+( \S+)?|\S+( \S+){5})$")
    parameters: dict[str, Any]
    description: str = ""
    enabled: bool = True
    max_concurrency: int = Field(default=1, ge=1, le=10)
    catch_up: bool = False

    def typed(self) -> dict[str, Any]:
        """The parameters with the types of the pipeline's inputs; raises DraftModelError with all their problems."""
        parameters = check(self.parameters)
        return {name: getattr(parameters, name) for name in self.parameters}


class Schedules(BaseModel):
    """The file. It owns what it has made in its experiment: two files for one KFP need two experiments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str = EXPERIMENT
    service_account: str = SERVICE_ACCOUNT
    runs: dict[str, Schedule] = {}


def read(file: Path) -> Schedules:
    """Reads and validates a file of recurring runs; raises DraftModelError with all problems at once."""
    try:
        found = Schedules.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DraftModelError(f"--file: {file} cannot be read: {error}") from error
    except ValidationError as error:
        raise DraftModelError([f"{'.'.join(map(str, e['loc'])) or file}: {e['msg']}" for e in error.errors()]) from None
    problems = []
    for name, schedule in found.runs.items():
        try:
            schedule.typed()
        except DraftModelError as error:
            problems += [f"runs.{name}.parameters.{problem}" for problem in error.problems]
    if problems:
        raise DraftModelError(problems)
    return found


def apply(server: Server, wanted: Schedules, version: str) -> list[str]:
    """Makes KFP's recurring runs what the file says, without ending a run in progress; returns what was done.

    Kubernetes deletes a schedule's runs with it. So one with a run in progress is only disabled until a later sync, and
    the new one is created beside it.
    """
    client = server.client
    pipeline_id, version_id = find_version(server, version)
    if not version_id:
        raise DraftModelError(
            f"--version: {server.host} has no version {version!r} of the pipeline {NAME!r}: apply manifests/pipelines "
            "first, in the same namespace, with a server that runs with --pipelinesStoreKubernetes=true"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # kfp.Client prints a link
        experiment_id = client.create_experiment(wanted.experiment, namespace=server.namespace or None).experiment_id
    existing = [(run, found[1] if (found := _MARK.search(run.description or "")) else "")
                for run in _pages(client.list_recurring_runs, "recurring_runs", experiment_id)]  # fmt: skip
    if foreign := sorted({run.display_name for run, mark in existing if not mark} & wanted.runs.keys()):
        raise DraftModelError(
            f"runs: {', '.join(foreign)}: a recurring run of this name exists that no file made: delete it in KFP, or "
            "choose another name"
        )
    marks = {}
    for name, schedule in wanted.runs.items():
        content = json.dumps([schedule.model_dump(), wanted.service_account, version], sort_keys=True)
        marks[name] = hashlib.sha256(content.encode()).hexdigest()[:12]
    done, kept = [], set()
    for run, mark in (each for each in existing if each[1]):
        name, run_id = run.display_name, run.recurring_run_id
        if marks.get(name) == mark and name not in kept:
            kept.add(name)
            if wanted.runs[name].enabled and run.mode == "DISABLE":
                client.enable_recurring_run(run_id)
                done.append(f"enabled {name}")
            continue
        if run.mode != "DISABLE":  # first, so that no run starts in between
            client.disable_recurring_run(run_id)
        runs = _pages(client.list_runs, "runs", experiment_id)
        if active := [each.run_id for each in runs if each.recurring_run_id == run_id and each.state not in ENDS]:
            done.append(f"disabled {name}; it is deleted by a later sync, since its run {', '.join(active)} goes on")
            continue
        client.delete_recurring_run(run_id)
        why = ", which existed twice" if name in kept else ", which was different" if name in marks else ""
        done.append(f"deleted {name}{why}")
    for name in (name for name in wanted.runs if name not in kept):
        schedule = wanted.runs[name]
        made = client.create_recurring_run(
            experiment_id=experiment_id, pipeline_id=pipeline_id, version_id=version_id, job_name=name,
            description=f"{schedule.description} [draft-model {marks[name]}]".strip(), enabled=schedule.enabled,
            cron_expression=schedule.cron, max_concurrency=schedule.max_concurrency, no_catchup=not schedule.catch_up,
            params=schedule.typed(), service_account=wanted.service_account,
        )  # fmt: skip
        if not made.recurring_run_id:
            raise DraftModelError(f"--host: {server.host} accepted {name} and named no run: this is not KFP's API")
        done.append(f"created {name}")
    return done


def _pages(ask: Callable[..., Any], kind: str, experiment_id: str) -> Iterator[Any]:
    """All records of a list that comes in pages."""
    token = ""
    while True:
        page = ask(page_token=token, page_size=100, experiment_id=experiment_id)
        yield from getattr(page, kind) or ()
        if not (token := page.next_page_token or ""):
            return


@click.command()
@click.option("--file", required=True, type=click.Path(path_type=Path), help="Lists the recurring runs.")
@click.option("--version", required=True, help="Name of the pipeline's version that they run.")
@click.option("--host", default="", help="Address of KFP's API.  [default: KF_PIPELINES_ENDPOINT]")
@click.option("--token-file", type=click.Path(path_type=Path), help="Holds a bearer token for KFP.")
def main(file: Path, version: str, host: str, token_file: Path | None) -> None:
    """Make KFP's recurring runs what a file says."""
    wanted = read(file)
    done = apply(connect(host, token_file=token_file), wanted, version)
    click.echo("\n".join(done) or "nothing to do")


if __name__ == "__main__":
    sys.exit(exit_code(main))
