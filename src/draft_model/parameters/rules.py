"""What is wrong with a run's parameters: each by itself, and the rules over several of them; all at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS, STAGES, Parameters, Stage


@dataclass(frozen=True)
class _Rule:
    """A condition over several parameters; it is checked where each of them is valid by itself."""

    names: tuple[str, ...]
    stage: Stage
    check: Callable[[Parameters], str | None]


def _one_model_source(p: Parameters) -> str | None:
    given = {name: getattr(p, name) for name in MODEL_SOURCES if getattr(p, name)}
    if len(given) == 1:
        return None
    found = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
    return f"{', '.join(MODEL_SOURCES)}: exactly one must be given; given: {found}"


def _hub_id_shape(p: Parameters) -> str | None:
    name = p.huggingface_id.partition("@")[0]
    if not p.huggingface_id or (name.count("/") == 1 and all(name.split("/")) and " " not in p.huggingface_id):
        return None
    return f"huggingface_id: given {p.huggingface_id!r}; allowed: `org/name` or `org/name@revision`"


def _training_data_given(p: Parameters) -> str | None:
    if p.dataset_train_split:
        return None
    return "dataset_train_split: not given; give the path or URI of JSONL conversations"


def _tensor_parallelism(p: Parameters) -> str | None:
    if p.world_size % p.tp_size == 0:
        return None
    fits = [size for size in range(1, p.world_size + 1) if p.world_size % size == 0]
    return (
        f"tp_size: given {p.tp_size}; it must divide num_nodes_draft_model_training x "
        f"number_of_gpu_to_use_draft_model_training = {p.world_size}: allowed: {', '.join(map(str, fits))}"
    )


def _world_size(p: Parameters) -> str | None:
    if p.dp_size == 1 or p.dp_size * p.tp_size == p.world_size or p.world_size % p.tp_size:
        return None
    fits = p.world_size // p.tp_size
    return (
        f"dp_size: given {p.dp_size}; num_nodes_draft_model_training x number_of_gpu_to_use_draft_model_training = "
        f"{p.world_size} must equal tp_size x dp_size = {p.tp_size * p.dp_size}: use {fits}, or "
        "leave it at 1 to derive it"
    )


def _batch_arithmetic(p: Parameters) -> str | None:
    per_pass = p.world_size * p.draft_micro_batch_size
    given, rest = divmod(p.draft_global_batch_size, per_pass)
    below, above = given * per_pass, (given + 1) * per_pass
    if rest:
        nearest = f"{below} or {above}" if below else f"{above}"
        return (
            f"draft_global_batch_size: given {p.draft_global_batch_size}; it must be a multiple of processes x "
            f"draft_micro_batch_size = {p.world_size} x {p.draft_micro_batch_size} = {per_pass}: the nearest "
            f"is {nearest}"
        )
    if p.draft_accumulation_steps not in (1, given):
        return (
            f"draft_accumulation_steps: given {p.draft_accumulation_steps}; draft_global_batch_size / (processes x "
            f"draft_micro_batch_size) = {p.draft_global_batch_size} / ({p.world_size} x {p.draft_micro_batch_size}) = "
            f"{given}: use {given}, leave it at 1 to derive it, or set draft_global_batch_size to "
            f"{p.draft_accumulation_steps * per_pass}"
        )
    return None


MAX_TREE = 64
"""Proposals of the largest tree that the evaluation decodes."""


def _tree_shape(p: Parameters) -> str | None:
    parts = [part.strip() for part in p.evaluation_tree.split(",")]
    if not p.evaluation_tree:
        return None
    level = total = 1
    for part in parts:
        level *= int(part) if part.isdecimal() else 0
        total += level
    if level and total - 1 <= MAX_TREE:
        return None
    return (
        f"evaluation_tree: given {p.evaluation_tree!r}; allowed: children of each proposal at each depth, as 4,2,1 (4 "
        f"+ 8 + 8 proposals), {MAX_TREE} proposals at most"
    )


MODEL_SOURCES = ("huggingface_id", "pytorch_model_path", "mlflow_model_path")
_RULES = (
    _Rule(MODEL_SOURCES, "import", _one_model_source),
    _Rule(("huggingface_id",), "import", _hub_id_shape),
    _Rule(("dataset_train_split",), "dataset", _training_data_given),
    _Rule(("evaluation_tree",), "evaluate", _tree_shape),
    _Rule(("num_nodes_draft_model_training", "number_of_gpu_to_use_draft_model_training", "tp_size"),
          "train", _tensor_parallelism),
    _Rule(("num_nodes_draft_model_training", "number_of_gpu_to_use_draft_model_training", "tp_size", "dp_size"),
          "train", _world_size),
    _Rule(("num_nodes_draft_model_training", "number_of_gpu_to_use_draft_model_training", "draft_global_batch_size",
           "draft_micro_batch_size", "draft_accumulation_steps"), "train", _batch_arithmetic),
)  # fmt: skip


def _sentence(name: str, error: Mapping[str, Any]) -> str:
    known = {parameter.name: parameter for parameter in PARAMETERS}
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=1)
        return f"{name}: no such parameter" + (f"; did you mean {near[0]}?" if near else "")
    parameter = known[name]
    if error["type"] == "value_error":
        # What stands before an @ in a URI may be a password, and messages are logged.
        given = re.sub(r"//[^/@]*@", "//...@", repr(error["input"]))
        return f"{name}: given {given}; it {error['msg'].removeprefix('Value error, ')}"
    wanted = {"string": "a string", "integer": "an integer", "number": "a number"}.get(parameter.kind, "a string")
    allowed = parameter.allowed if parameter.choices else f"{wanted} {parameter.allowed}".strip()
    return f"{name}: given {error['input']!r}; allowed: {allowed}"


def problems_with(values: Mapping[str, Any], stages: Iterable[Stage] = STAGES) -> list[str]:
    """All that is wrong with the values, a sentence each; empty where they can be used.

    Args:
        values: parameters by name; strings are converted as a command line needs it.
        stages: the stages that will run; rules over parameters of other stages are left out.
    """
    values = dict(values)
    problems: list[str] = []
    bad: set[str] = set()
    try:
        parameters = Parameters.model_validate(values)
    except ValidationError as caught:
        for error in caught.errors():
            name = str(error["loc"][0])
            if name not in bad:
                problems.append(_sentence(name, error))
            bad.add(name)
        parameters = Parameters.model_validate({name: v for name, v in values.items() if name not in bad})
    wanted = set(stages)
    for rule in _RULES:
        if rule.stage in wanted and not bad.intersection(rule.names) and (problem := rule.check(parameters)):
            problems.append(problem)
    return problems


def validate(values: Mapping[str, Any], stages: Iterable[Stage] = STAGES) -> Parameters:
    """Turns values by name into `Parameters`.

    Raises:
        DraftModelError: with every problem there is, not only the first.
    """
    if problems := problems_with(values, stages):
        raise DraftModelError(problems)
    return Parameters.model_validate(dict(values))
