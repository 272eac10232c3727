"""From a compute's name or an instance type to what a pod asks for.

The compute map lists both: a ConfigMap of the administrator's (key `compute_map.json`), or the built-in one, which
knows clouds but not the cluster. Schema: docs/compute_map.schema.json.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters, Stage

logger = logging.getLogger(__name__)

KEY = "compute_map.json"
SERVERLESS = "serverless"
INSTANCE_TYPE_LABEL = "node.kubernetes.io/instance-type"
_SHOWN = 12
_USED = 0.9
"""Share of a GPU's memory that vLLM takes."""
_SUFFIX: dict[Stage, str] = {"import": "model_import", "dataset": "model_import", "evaluate": "evaluation"}
"""Of the parameters that choose a stage's nodes, where they are not the training's."""

_Cpus = Annotated[float, Field(gt=0, description="CPUs that a pod may ask for when it has the node to itself.")]
_Memory = Annotated[float, Field(gt=0, description="Memory, GiB, that a pod may ask for on a node to itself.")]
_Gpus = Annotated[int, Field(ge=0, description="GPUs of the node; 0: processes train on its CPUs.")]
_GpuMemory = Annotated[
    float | None, Field(gt=0, description="Memory of one GPU, GiB; the evaluation refuses targets that do not fit.")
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Toleration(_Record):
    """A Kubernetes toleration."""

    key: str = ""
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""


class InstanceType(_Record):
    """A cloud's machine type; its key in the map is the value of the nodes' instance-type label."""

    cpus: _Cpus
    memory_gib: _Memory
    gpus: _Gpus = 0
    gpu_memory_gib: _GpuMemory = None
    gpu_resource: str = Field(default="nvidia.com/gpu", description="Resource name of the GPUs.")
    tolerations: list[Toleration] = Field(default=[], description="Of the taints that such nodes have.")


class NamedCompute(_Record):
    """A queue or a node pool under a name of its own; sizes come from the instance type, where it names one."""

    instance_type: str = Field(default="", description="An instance type of this map: sizes, selector and tolerations.")
    cpus: _Cpus | None = None
    memory_gib: _Memory | None = None
    gpus: _Gpus | None = None
    gpu_memory_gib: _GpuMemory = None
    gpu_resource: str = Field(default="", description="Resource name of the GPUs, where it is not the instance type's.")
    node_selector: dict[str, str] = Field(default={}, description="Labels of the nodes, besides the type's.")
    tolerations: list[Toleration] = Field(default=[], description="Besides the instance type's.")
    queue: str = Field(default="", description="Kueue LocalQueue that jobs wait in.")
    priority_class: str = Field(default="", description="PriorityClass of the jobs' pods.")
    restarts: int = Field(
        default=0, ge=0, description="Times that torchrun restarts a training's processes in place (an elastic job)."
    )


class ComputeMap(_Record):
    """What there is to run on: instance types of clouds, and computes with names."""

    instance_types: dict[str, InstanceType] = {}
    computes: dict[str, NamedCompute] = {}


@dataclass(frozen=True)
class Compute:
    """What one pod asks for."""

    cpus: str  # a Kubernetes quantity, as memory
    memory: str
    gpus: int = 0  # 0 on a CPU pool
    gpu_memory: float = 0.0  # of one GPU, bytes; 0 where the map does not say
    limited: bool = True  # memory and CPUs are all that it gets; else it may use what the node has
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, str]] = field(default_factory=list)  # as a pod has them
    queue: str = ""  # Kueue LocalQueue
    priority_class: str = ""
    restarts: int = 0  # of an elastic job; 0: the job is not elastic
    note: str = ""  # what the user should know of the choice


def built_in() -> ComputeMap:
    """The map that ships here: common GPU types of Azure, AWS and GCP, and a CPU pool."""
    return ComputeMap.model_validate_json(files(__package__).joinpath(KEY).read_text(encoding="utf-8"))


def load_map(name: str, config_map: Callable[[str], dict[str, str] | None]) -> ComputeMap:
    """The map that the parameter compute_map names: a ConfigMap, with a slash a JSON file, empty the built-in one."""
    if not name:
        return built_in()
    if "/" in name:
        text = storage.read_bytes(name).decode()
    else:
        data = config_map(name)
        if data is None or KEY not in data:
            raise DraftModelError(
                f"compute_map: given {name!r}, but there is no ConfigMap of that name with a key {KEY}; create it, "
                "or leave compute_map empty for the built-in map"
            )
        text = data[KEY]
    try:
        found = ComputeMap.model_validate_json(text)
    except ValidationError as error:
        raise DraftModelError(
            [f"compute_map: {name}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        ) from None
    privileged = [key for key, each in found.instance_types.items() if each.tolerations]
    privileged += [key for key, each in found.computes.items() if each.tolerations or each.priority_class]
    if "/" in name and privileged:
        raise DraftModelError(
            f"compute_map: {name} sets tolerations or a priority_class for {', '.join(privileged)}; only a ConfigMap "
            f"of the cluster's administrator may: put the map there (key {KEY}), or remove them"
        )
    return found


def resolve(compute_map: ComputeMap, stage: Stage, p: Parameters) -> Compute:
    """What a pod of a stage's job asks for; import and data set run on CPUs, whatever the node has."""
    suffix, gpus, count = _SUFFIX.get(stage, "draft_model_training"), 0, "number_of_gpu_to_use_draft_model_training"
    if suffix != "model_import":
        gpus = p.number_of_gpu_to_use_draft_model_training
    if stage == "evaluate":
        if p.number_of_gpu_to_use_evaluation:
            gpus, count = p.number_of_gpu_to_use_evaluation, "number_of_gpu_to_use_evaluation"
        if not (p.compute_evaluation or p.instance_type_evaluation):
            suffix = "draft_model_training"
    name = getattr(p, f"compute_{suffix}") or SERVERLESS
    type_name = getattr(p, f"instance_type_{suffix}") or p.instance_type_draft_model_training
    if name != SERVERLESS:
        if name not in compute_map.computes:
            raise DraftModelError(
                f"compute_{suffix}: given {name!r}, which the compute map does not have; it has "
                f"{_some(compute_map.computes, name)}: use one of them, or {SERVERLESS} with an instance type"
            )
        logger.info("compute_%s: %s is a named compute, so instance_type_%s is not used", suffix, name, suffix)
        found = _sized(compute_map, compute_map.computes[name], gpus, f"compute {name!r}", count)
    else:
        found = _of_type(compute_map, type_name, gpus, suffix, count)
    # A pod of CPUs alone asks for the least that it needs; only torchrun starts processes again.
    return replace(found, limited=suffix != "model_import", restarts=found.restarts if stage == "train" else 0)


def _of_type(compute_map: ComputeMap, name: str, gpus: int, suffix: str, count: str) -> Compute:
    known, defaults = built_in(), Parameters()
    default = getattr(defaults, f"instance_type_{suffix}") or defaults.instance_type_draft_model_training
    found = _find(compute_map.instance_types, name)
    if found is None and name.lower() != default.lower():
        raise DraftModelError(
            f"instance_type_{suffix}: given {name!r}, which the compute map does not have; it has "
            f"{_some(compute_map.instance_types, name)}: use one of them, name a compute in compute_{suffix}, or "
            "add the type to the map (compute_map)"
        )
    if found and (name.lower() != default.lower() or compute_map != known):
        return _sized(compute_map, NamedCompute(instance_type=found), gpus, f"instance type {found}", count)
    # Nobody chose it, and the cluster may not have it: its GPUs' share of a node, but no node label, since a pod that
    # no node fits would wait in vain. Without GPUs it asks for little.
    asked = replace(
        _sized(known, NamedCompute(instance_type=default), gpus, f"instance type {default}", count),
        node_selector={},
        note=f"instance_type_{suffix}: the default {default} may be none of this cluster's types, so the pods may run "
        "on any node that has the resources; name a type, or a compute of the cluster's compute map, to choose nodes",
    )
    logger.warning("%s", asked.note)
    return asked if gpus else replace(asked, cpus="1000m", memory="4096Mi")


def _find(names: Iterable[str], wanted: str) -> str | None:
    """The name as the map writes it: hosted pipelines write instance types in any case."""
    return next((name for name in names if name.lower() == wanted.lower()), None)


def _some(names: Iterable[str], wanted: str) -> str:
    """The names, the one that is most like the wanted one first."""
    likeness = {name: difflib.SequenceMatcher(None, name.lower(), wanted.lower()).ratio() for name in names}
    ordered = sorted(likeness, key=likeness.__getitem__, reverse=True)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return (", ".join(ordered[:_SHOWN]) or "none") + more


def _sized(compute_map: ComputeMap, named: NamedCompute, gpus: int, what: str, count: str) -> Compute:
    """The share of the node for so many of its GPUs; all of it where no GPU is asked for or the node has none."""
    type_name = _find(compute_map.instance_types, named.instance_type)
    if named.instance_type and type_name is None:
        raise DraftModelError(
            f"compute_map: {what} names the instance type {named.instance_type!r}, which the map does not have"
        )
    base = compute_map.instance_types[type_name].model_dump() if type_name else {}
    size = {**base, **{name: value for name, value in named if value is not None and value != ""}}
    if "cpus" not in size or "memory_gib" not in size:
        raise DraftModelError(f"compute_map: {what} needs cpus and memory_gib, or an instance type that has them")
    there = size.get("gpus", 0)
    if there and gpus > there:
        raise DraftModelError(
            f"{count}: given {gpus}; {what} has {there} per node: use at most {there}"
            + (", and more nodes (num_nodes_draft_model_training)" if "training" in count else "")
        )
    used = min(gpus, there)
    share = used / there if used else 1.0
    return Compute(
        cpus=f"{int(size['cpus'] * share * 1000)}m",
        memory=f"{int(size['memory_gib'] * share * 1024)}Mi",
        gpus=used,
        gpu_memory=(size.get("gpu_memory_gib") or 0.0) * 2**30,
        gpu_resource=size.get("gpu_resource", "nvidia.com/gpu"),
        node_selector={**({INSTANCE_TYPE_LABEL: type_name} if type_name else {}), **named.node_selector},
        tolerations=[
            {name: value for name, value in each.items() if value}
            for each in (*base.get("tolerations", ()), *named.model_dump()["tolerations"])
        ],
        queue=named.queue,
        priority_class=named.priority_class,
        restarts=named.restarts,
    )


def misfit(config: Mapping[str, Any], weights: float, draft: float, p: Parameters, node: Compute) -> str:
    """Why an evaluation's node cannot hold the target; empty where it can, or where the map does not say what it has.

    `config` is the target's config.json; `weights` (in bfloat16, or as quantized) and `draft` are bytes.
    """
    try:
        text = config.get("text_config") or config
        heads = text.get("num_key_value_heads") or text["num_attention_heads"]
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        tokens = p.max_length + p.evaluation_max_new_tokens
        cache = 2 * 2 * text["num_hidden_layers"] * heads * width * tokens
    except (ArithmeticError, AttributeError, KeyError, TypeError):  # such a target has no plain attention
        tokens, cache = 0, 0
    there = node.gpus * node.gpu_memory * _USED if node.gpus else 2**20 * float(node.memory.removesuffix("Mi"))
    needed = weights + draft + cache
    if not there or needed <= there:
        return ""
    what = f"{node.gpus} GPUs of {node.gpu_memory / 1e9:.0f} GB, of which engines use {_USED:.0%}" if node.gpus else (
        "pods without GPUs")  # fmt: skip
    return (
        f"number_of_gpu_to_use_evaluation: the evaluation needs {needed / 1e9:.1f} GB (target {weights / 1e9:.1f}, "
        f"draft {draft / 1e9:.1f}, keys and values of {tokens} tokens {cache / 1e9:.1f}), and its node gives it "
        f"{there / 1e9:.1f} GB ({what}): give it more GPUs, or a larger instance_type_evaluation or compute_evaluation"
    )


def weights_of(config: Mapping[str, Any]) -> float:
    """Bytes of a target's weights in bfloat16, by its config.json; 0 where that does not tell."""
    if config.get("quantization_config"):  # by fewer bits
        return 0.0
    try:
        text = config.get("text_config") or config
        hidden, queries = text["hidden_size"], text["num_attention_heads"]
        width = text.get("head_dim") or hidden // queries
        keys = text.get("num_key_value_heads") or queries
        experts = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 1
        wide = (text.get("moe_intermediate_size") if experts > 1 else None) or text["intermediate_size"]
        layer = 2 * hidden * width * (queries + keys) + 3 * experts * hidden * wide
        ends = text["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return 2.0 * float(text["num_hidden_layers"] * layer + ends)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):  # of any shape
        return 0.0
