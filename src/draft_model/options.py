"""Options that the commands share, and parameters as options; mistakes are told all at once, with the nearest name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from draft_model.doors import raise_on_sigterm
from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS, Parameter, Stage, parameters_of
from draft_model.parameters.rules import problems_with

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}

Decorator = Callable[[Any], Any]


class Command(click.Command):
    """A command that tells all that is wrong with its options, where click stops at the first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses as click does; a second look, only after a mistake, gathers the others."""
        given = [*args]
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as first:
            problems = list(self._problems(ctx, given))
            if len(problems) < 2:
                raise
            listed = "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])
            raise click.UsageError(listed, ctx) from first

    def _problems(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        values: dict[str, Any] = {}
        while args:
            try:
                values, *_ = self.make_parser(ctx).parse_args([*args])
                break
            except click.NoSuchOption as error:
                yield error.format_message()
                unknown = _normal(error.option_name)
                left = [arg for arg in args if _normal(arg.partition("=")[0]) != unknown]
                args = left if len(left) < len(args) else []
            except click.UsageError as error:
                yield error.format_message()
                return
        for param in self.get_params(ctx):
            try:
                param.handle_parse_result(ctx, values, [])
            except click.UsageError as error:
                yield error.format_message()


class Group(click.Group):
    """Commands in the order in which they are used."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were added."""
        return list(self.commands)


def _normal(name: str) -> str:
    return name.replace("-", "_")


SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": _normal,
    "max_content_width": 110,
    "show_default": True,
}


def _option(parameter: Parameter) -> Decorator:
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


def options_of(stage: Stage, *others: str) -> Decorator:
    """The options of a stage's parameters, and of some others by name."""
    chosen = [*parameters_of(stage), *(parameter for parameter in PARAMETERS if parameter.name in others)]
    return together(*map(_option, chosen))


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


WORK = click.option("--work", type=click.Path(path_type=Path), help="Scratch folder; a temporary one if not given.")

VALUES = together(
    click.option("--params", type=click.Path(path_type=Path), help="YAML or JSON file with parameters by name."),
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="One parameter; wins over the file."),
)
"""Parameters of a whole run; `values_of` reads them."""


def uri(name: str, help: str) -> Decorator:
    """A required URI."""
    return click.option(f"--{name}", required=True, metavar="URI", help=help)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def scratch(work: Path | None) -> Iterator[Path]:
    """A folder to work in, removed at the end unless the user named it."""
    raise_on_sigterm()
    if work is not None:
        yield work.resolve()
        return
    with TemporaryDirectory(prefix="draft-model-") as folder:
        yield Path(folder)


def values_of(params: Path | None, settings: tuple[str, ...]) -> dict[str, Any]:
    """The parameters that a file and settings give, by name.

    Raises:
        DraftModelError: where the file or a setting cannot be read, with all that is wrong with the others.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    try:
        values = _from_file(params) if params else {}
    except DraftModelError as error:
        problems += error.problems
    unread = bool(problems)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if equals and name.strip():
            values[_normal(name.strip())] = value
        else:
            problems.append(f"--set: given {setting!r}; allowed: NAME=VALUE")
    if problems:
        others = problems_with(values)
        # What a file that was not read may hold is not missing.
        problems += [o for o in others if o.partition(":")[0] in values] if unread else others
        raise DraftModelError(problems)
    return values


def _from_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DraftModelError(f"--params: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DraftModelError(f"--params: {path} holds no parameters; a line is `name: value`")
    # YAML reads `resume: true` as a truth value; the contract has a word there.
    return {_normal(str(name)): str(v).lower() if isinstance(v, bool) else v for name, v in values.items()}
