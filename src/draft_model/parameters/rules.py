"""Checks of a run's parameters: each by itself, and rules over several of them; all problems at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from draft_model.errors import DraftModelError, Problem, named_parameters
from draft_model.parameters.schema import PARAMETERS, REMOVED, STAGES, Parameters, Stage

MODEL_SOURCES = ("huggingface_id", "pytorch_model_path", "mlflow_model_path")


def _one_model_source(p: Parameters) -> Problem | None:
    values = {name: getattr(p, name) for name in MODEL_SOURCES if getattr(p, name)}
    if len(values) == 1:
        return None
    listed = ", ".join(f"{name}={value!r}" for name, value in values.items()) or "none of them"
    return Problem(", ".join(MODEL_SOURCES), f"exactly one must be given; given: {listed}")


def _hub_id_shape(p: Parameters) -> Problem | None:
    name = p.huggingface_id.partition("@")[0]
    if not p.huggingface_id or (name.count("/") == 1 and all(name.split("/")) and " " not in p.huggingface_id):
        return None
    return Problem("huggingface_id", f"given {p.huggingface_id!r}; allowed: `org/name` or `org/name@revision`")


def _training_data(p: Parameters) -> Problem | None:
    if p.dataset_train_split:
        return None
    return Problem("dataset_train_split", "not given; give the path or URI of JSONL conversations")


def _tensor_parallelism(p: Parameters) -> Problem | None:
    if p.world_size % p.tp_size == 0:
        return None
    fits = [size for size in range(1, p.world_size + 1) if p.world_size % size == 0]
    return Problem(
        "tp_size",
        f"given {p.tp_size}; it must divide num_nodes_draft_model_training x "
        f"number_of_gpu_to_use_draft_model_training = {p.world_size}: allowed: {', '.join(map(str, fits))}",
    )


def _world_size(p: Parameters) -> Problem | None:
    if p.dp_size == 1 or p.dp_size * p.tp_size == p.world_size or p.world_size % p.tp_size:
        return None
    return Problem(
        "dp_size",
        f"given {p.dp_size}; num_nodes_draft_model_training x number_of_gpu_to_use_draft_model_training = "
        f"{p.world_size} must equal tp_size x dp_size = {p.tp_size * p.dp_size}: use {p.world_size // p.tp_size}, or "
        "leave it at 1 to derive it",
    )


def _batch_arithmetic(p: Parameters) -> Problem | None:
    per_pass = p.world_size * p.draft_micro_batch_size
    passes, rest = divmod(p.draft_global_batch_size, per_pass)
    below, above = passes * per_pass, (passes + 1) * per_pass
    if rest:
        return Problem(
            "draft_global_batch_size",
            f"given {p.draft_global_batch_size}; it must be a multiple of processes x draft_micro_batch_size = "
            f"{p.world_size} x {p.draft_micro_batch_size} = {per_pass}: the nearest is "
            f"{f'{below} or {above}' if below else above}",
        )
    if p.draft_accumulation_steps not in (1, passes):
        return Problem(
            "draft_accumulation_steps",
            f"given {p.draft_accumulation_steps}; draft_global_batch_size / (processes x draft_micro_batch_size) = "
            f"{p.draft_global_batch_size} / ({p.world_size} x {p.draft_micro_batch_size}) = {passes}: use {passes}, "
            f"leave it at 1 to derive it, or set draft_global_batch_size to {p.draft_accumulation_steps * per_pass}",
        )
    return None


def _sampling(p: Parameters) -> Problem | None:
    if not p.evaluation_temperature or p.evaluation_engine != "transformers":
        return None
    return Problem(
        "evaluation_temperature",
        f"given {p.evaluation_temperature:g} with evaluation_engine=transformers, which decodes greedily only: use "
        "another engine, or leave one of the two out",
    )


def _samples(p: Parameters) -> Problem | None:
    if p.regenerate_samples_per_prompt == 1 or p.regenerate_temperature or p.regenerate_answers == "off":
        return None
    return Problem(
        "regenerate_samples_per_prompt",
        f"given {p.regenerate_samples_per_prompt} with regenerate_temperature=0, where all samples would be alike: use "
        "1, or another temperature",
    )


_WORLD = ("num_nodes_draft_model_training", "number_of_gpu_to_use_draft_model_training")
_BATCHES = ("draft_global_batch_size", "draft_micro_batch_size", "draft_accumulation_steps")
_RULES: tuple[tuple[Stage, Sequence[str], Callable[[Parameters], Problem | None]], ...] = (
    ("import", MODEL_SOURCES, _one_model_source),
    ("import", ("huggingface_id",), _hub_id_shape),
    ("dataset", ("dataset_train_split",), _training_data),
    ("regenerate", ("regenerate_samples_per_prompt", "regenerate_temperature", "regenerate_answers"), _samples),
    ("train", (*_WORLD, "tp_size"), _tensor_parallelism),
    ("train", (*_WORLD, "tp_size", "dp_size"), _world_size),
    ("train", (*_WORLD, *_BATCHES), _batch_arithmetic),
    ("evaluate", ("evaluation_temperature", "evaluation_engine"), _sampling),
)
"""Stage, the parameters that each must be valid by itself, and the rule."""


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
    broken = [rule(parameters) for stage, names, rule in _RULES if stage in wanted and bad.isdisjoint(names)]
    return [*problems, *(problem for problem in broken if problem is not None)]


def validate(values: Mapping[str, Any], stages: Iterable[Stage] = STAGES) -> Parameters:
    """Turns values by name into `Parameters`; raises DraftModelError with every problem there is."""
    if problems := problems_with(values, stages):
        raise DraftModelError(problems)
    return Parameters.model_validate(dict(values))
