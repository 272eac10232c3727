"""Parameters as options of commands, and the options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from draft_model.entrypoint import raise_on_sigterm
from draft_model.errors import DraftModelError, Problems, named_parameters
from draft_model.parameters import PARAMETERS, REMOVED, STAGES, Parameter, Stage, parameters_of
from draft_model.parameters.rules import problems_with, unknown
from draft_model.scratch import scratch_folder

_PROBLEMS = "draft_model.problems"
_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
Decorator = Callable[[Any], Any]


class Command(click.Command):
    """Reports all that is wrong with a command line at once, where click stops at the first problem."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As click's; each option and argument keeps its problem until all were read."""
        super().__init__(*args, **kwargs)
        self.context_settings.update(ignore_unknown_options=True, allow_extra_args=True)
        for parameter in self.params:
            vars(parameter)["handle_parse_result"] = partial(_collect, parameter.handle_parse_result)
            if isinstance(parameter, click.Option) and parameter.default == "":
                parameter.show_default = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's; raises a UsageError with all problems, those of the parameters' values too."""
        rest = super().parse_args(ctx, args)
        words = list(rest)
        for parameter in self.params:
            if isinstance(parameter, click.Argument):
                value = ctx.params.get(parameter.name or "")
                words += value if isinstance(value, tuple) else [value or ""]
        known = [option for parameter in self.get_params(ctx) for option in parameter.opts]
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        problems = [
            f"--{unknown(name)}" if (name := _normal(option.lstrip("-"))) in REMOVED
            else click.NoSuchOption(option, possibilities=known).format_message()
            for option in options
        ]  # fmt: skip
        if rest and not options:
            problems.append(f"Got unexpected extra argument ({' '.join(rest)})")
        if problems := problems + ctx.meta.get(_PROBLEMS, []):
            values = {parameter.name: ctx.params.get(parameter.name) for parameter in PARAMETERS}
            problems += problems_with(given(values), [stage for stage in STAGES if stage == self.name])
            raise click.UsageError(str(DraftModelError(problems)), ctx)
        return rest


def _collect(handle: Callable[..., Any], ctx: click.Context, options: Any, args: list[str]) -> tuple[Any, list[str]]:
    try:
        return handle(ctx, options, args)  # type: ignore[no-any-return]
    except click.UsageError as error:
        ctx.meta.setdefault(_PROBLEMS, []).append(error.format_message())
        return None, args


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
    default = f"  [default: {parameter.default}]" if parameter.default != "" else ""
    return click.option(
        *(["--engine"] if parameter.name == "evaluation_engine" else []),
        f"--{parameter.name}",
        parameter.name,
        metavar="|".join(parameter.choices) or _METAVARS[parameter.type],
        default=None,
        help=parameter.description + default,
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
    with scratch_folder("cli") as folder:
        yield folder


def values_of(params: Path | None, settings: tuple[str, ...]) -> dict[str, Any]:
    """The parameters that a file and settings give, by name.

    Raises:
        DraftModelError: where the file or a setting cannot be read, with all that is wrong with the others.
    """
    values, problems = dict[str, Any](), Problems()
    with problems.collect():
        values = _from_file(params) if params else {}
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
        problems += [other for other in others if not unread or named_parameters([other]) <= values.keys()]
        problems.raise_all()
    return values


def _from_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DraftModelError(f"--params: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DraftModelError(f"--params: {path} holds no parameters; a line is `name: value`")
    return {_normal(str(name)): value for name, value in values.items()}
