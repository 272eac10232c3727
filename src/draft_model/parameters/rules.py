"""Checks of a run's parameters: each by itself, and rules over several of them; all problems at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from draft_model.errors import Problem, named_parameters
from draft_model.parameters.schema import PARAMETERS, REMOVED, STAGES, Parameters, Stage

MODEL_SOURCES = ("huggingface_id", "pytorch_model_path", "mlflow_model_path")


_WORLD = ("num_nodes_draft_model_training", "number_of_gpu_to_use_draft_model_training")
_BATCHES = ("draft_global_batch_size", "draft_micro_batch_size", "draft_accumulation_steps")


def _broken_rules(p: Parameters) -> Iterator[tuple[Stage, Sequence[str], Problem]]:
    """What several parameters together break: problem, stage, and those that must be valid by themselves."""
    sources = {name: getattr(p, name) for name in MODEL_SOURCES if getattr(p, name)}
    if len(sources) != 1:
        listed = ", ".join(f"{name}={value!r}" for name, value in sources.items()) or "none of them"
        told = f"exactly one must be given; given: {listed}"
        yield "import", MODEL_SOURCES, Problem(", ".join(MODEL_SOURCES), told)
    organisation, _, name = p.huggingface_id.partition("@")[0].partition("/")
    if p.huggingface_id and (not (organisation and name) or "/" in name or " " in p.huggingface_id):
        told = f"given {p.huggingface_id!r}; allowed: `org/name` or `org/name@revision`"
        yield "import", ("huggingface_id",), Problem("huggingface_id", told)
    if not p.dataset_train_split:
        told = "not given; give the path or URI of JSONL conversations"
        yield "dataset", ("dataset_train_split",), Problem("dataset_train_split", told)
    if p.regenerate_answers != "off" and p.regenerate_samples_per_prompt > 1 and not p.regenerate_temperature:
        told = (
            f"given {p.regenerate_samples_per_prompt} with regenerate_temperature=0, where all samples would be alike: "
            "use 1, or another temperature"
        )
        name = "regenerate_samples_per_prompt"
        yield "regenerate", (name, "regenerate_temperature", "regenerate_answers"), Problem(name, told)

    if p.world_size % p.tp_size:
        fits = ", ".join(str(size) for size in range(1, p.world_size + 1) if p.world_size % size == 0)
        told = f"given {p.tp_size}; it must divide {' x '.join(_WORLD)} = {p.world_size}: allowed: {fits}"
        yield "train", (*_WORLD, "tp_size"), Problem("tp_size", told)
    elif p.dp_size not in (1, p.world_size // p.tp_size):
        told = (
            f"given {p.dp_size}; {' x '.join(_WORLD)} = {p.world_size} must equal tp_size x dp_size = "
            f"{p.tp_size * p.dp_size}: use {p.world_size // p.tp_size}, or leave it at 1 to derive it"
        )
        yield "train", (*_WORLD, "tp_size", "dp_size"), Problem("dp_size", told)
    per_pass = p.world_size * p.draft_micro_batch_size
    passes, rest = divmod(p.draft_global_batch_size, per_pass)
    if rest:
        below, above = passes * per_pass, (passes + 1) * per_pass
        told = (
            f"given {p.draft_global_batch_size}; it must be a multiple of processes x draft_micro_batch_size = "
            f"{p.world_size} x {p.draft_micro_batch_size} = {per_pass}: the nearest is "
            f"{f'{below} or {above}' if below else above}"
        )
        yield "train", (*_WORLD, *_BATCHES), Problem("draft_global_batch_size", told)
    elif p.draft_accumulation_steps not in (1, passes):
        told = (
            f"given {p.draft_accumulation_steps}; draft_global_batch_size / (processes x draft_micro_batch_size) = "
            f"{p.draft_global_batch_size} / ({p.world_size} x {p.draft_micro_batch_size}) = {passes}: use {passes}, "
            f"leave it at 1 to derive it, or set draft_global_batch_size to {p.draft_accumulation_steps * per_pass}"
        )
        yield "train", (*_WORLD, *_BATCHES), Problem("draft_accumulation_steps", told)

    if p.evaluation_temperature and p.evaluation_engine == "transformers":
        told = (
            f"given {p.evaluation_temperature:g} with evaluation_engine=transformers, which decodes greedily only: use "
            "another engine, or leave one of the two out"
        )
        name = "evaluation_temperature"
        yield "evaluate", (name, "evaluation_engine"), Problem(name, told)


def unknown(name: str) -> Problem:
    """Refuses a parameter's name: with the reason where it was taken away, else with the nearest name."""
    if name in REMOVED:
        return Problem(name, f"no longer a parameter: {REMOVED[name]}; leave it out")
    near = difflib.get_close_matches(name, [parameter.name for parameter in PARAMETERS], n=1)
    return Problem(name, "no such parameter" + (f"; did you mean {near[0]}?" if near else ""))


def _problem(error: Mapping[str, Any]) -> Problem:
    name = str(error["loc"][0])
    parameter = next((parameter for parameter in PARAMETERS if parameter.name == name), None)
    if parameter is None:
        return unknown(name)
    # What stands before an @ in a URI may be a password, and messages are logged.
    value = re.sub(r"//[^/@]*@", "//...@", repr(error["input"]))
    if error["type"] == "value_error":
        return Problem(name, f"given {value}; it {error['msg'].removeprefix('Value error, ')}")
    wanted = {int: "an integer", float: "a number", str: "a string"}[parameter.type]
    allowed = parameter.allowed if parameter.choices else f"{wanted} {parameter.allowed}".strip()
    return Problem(name, f"given {value}; allowed: {allowed}")


def valid_values(values: Mapping[str, Any]) -> tuple[Parameters, list[Problem]]:
    """The parameters that are valid by themselves, strings converted; defaults and what is wrong for all others."""
    try:
        return Parameters.model_validate(dict(values)), []
    except ValidationError as caught:
        problems = {str(error["loc"][0]): _problem(error) for error in reversed(caught.errors())}
    valid = Parameters.model_validate({name: value for name, value in values.items() if name not in problems})
    return valid, [problems[name] for name in values if name in problems]


def problems_with(values: Mapping[str, Any], stages: Iterable[Stage] = STAGES) -> list[str]:
    """All that is wrong with values for the stages that will run, as `Problem`s; empty where they can be used."""
    parameters, problems = valid_values(values)
    bad, wanted = named_parameters(problems), set(stages)
    broken = _broken_rules(parameters)
    return [*problems, *(problem for stage, names, problem in broken if stage in wanted and bad.isdisjoint(names))]
