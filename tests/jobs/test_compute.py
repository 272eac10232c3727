"""From a compute's name or an instance type to what a pod asks for; and what there is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draft_model.errors import DraftModelError
from draft_model.jobs import compute
from draft_model.jobs.compute import Compute, ComputeMap, built_in, load_map, misfit, resolve, weights_of
from draft_model.jobs.context import nodes_of
from draft_model.parameters import Parameters
from jobs.requests import MAP

ROOT = Path(__file__).parents[2]


def train(**parameters):
    return resolve(MAP, "train", Parameters(**parameters))


def test_a_default_type_that_nobody_chose_pins_no_node():
    """A cluster of another cloud has no such node: the pod would wait for ever."""
    defaults = Parameters()
    node = resolve(built_in(), "train", defaults)
    assert (node.node_selector, node.gpus, node.memory) == ({}, 1, "91750Mi")
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in node.tolerations
    assert "may be none of this cluster's types" in node.note
    importing = resolve(built_in(), "import", defaults)
    assert (importing.gpus, importing.cpus, importing.memory, importing.node_selector) == (0, "1000m", "4096Mi", {})
    assert resolve(ComputeMap(), "train", defaults).node_selector == {}
    # A map of the cluster's own that has the type, or another type: they were chosen.
    assert train().node_selector == {"node.kubernetes.io/instance-type": "Standard_NC24rs_v3"}
    assert not train().note
    chosen = resolve(built_in(), "train", Parameters(instance_type_draft_model_training="p3.8xlarge"))
    assert chosen.node_selector == {"node.kubernetes.io/instance-type": "p3.8xlarge"}


def test_a_node_of_any_cloud_in_any_case_gives_its_gpus_share():
    for name in ("STANDARD_ND96ISR_H100_V5", "p5.48xlarge", "A3-HighGPU-8g"):
        whole, half = (
            train(instance_type_draft_model_training=name, number_of_gpu_to_use_draft_model_training=count)
            for count in (8, 4)
        )
        assert (whole.gpus, half.gpus) == (8, 4)
        assert int(whole.cpus[:-1]) == 2 * int(half.cpus[:-1])
        assert abs(int(whole.memory[:-2]) - 2 * int(half.memory[:-2])) <= 1


def test_a_named_compute_wins_and_says_so(caplog):
    caplog.set_level("INFO", "draft_model")
    node = train(compute_draft_model_training="research", instance_type_draft_model_training="no such type")
    assert (node.queue, node.priority_class) == ("research", "low")
    assert "instance_type_draft_model_training is not used" in caplog.text
    pool = train(compute_draft_model_training="cpu-pool", number_of_gpu_to_use_draft_model_training=64)
    assert (pool.gpus, pool.node_selector) == (0, {"pool": "cpu"})  # for any number of processes


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"instance_type_draft_model_training": "Standard_ND96isr_H100"}, "Standard_ND96isr_H100_v5.* and [0-9]+ more"),
        ({"compute_draft_model_training": "reserch"}, "it has research, "),
        ({"number_of_gpu_to_use_draft_model_training": 5}, "has 4 per node: use at most 4"),
        ({"compute_draft_model_training": "of no type"}, "names the instance type 'nothing', which"),
        ({"compute_draft_model_training": "of no size"}, "needs cpus and memory_gib"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(parameters, words):
    with pytest.raises(DraftModelError, match=words):
        train(**parameters)


def test_all_stages_are_told_at_once_and_training_on_this_machine_needs_no_node():
    wrong = {"instance_type_model_import": "x", "instance_type_draft_model_training": "y"}
    with pytest.raises(DraftModelError) as caught:
        nodes_of(Parameters(**wrong), jobs=True)
    assert len(caught.value.problems) == 2
    assert nodes_of(Parameters(instance_type_draft_model_training="y"), jobs=False) == {}
    with pytest.raises(DraftModelError, match="compute_model_import: given 'nowhere'"):
        nodes_of(Parameters(compute_model_import="nowhere"), jobs=False)


def evaluation(**parameters):
    node = resolve(MAP, "evaluate", Parameters(instance_type_draft_model_training="p5.48xlarge", **parameters))
    return node.node_selector.get("node.kubernetes.io/instance-type"), node.gpus


def test_the_evaluation_gets_the_trainings_nodes_or_its_own():
    """By compute_evaluation, instance_type_evaluation and number_of_gpu_to_use_evaluation."""
    assert evaluation(number_of_gpu_to_use_draft_model_training=8) == ("p5.48xlarge", 8)
    assert evaluation(number_of_gpu_to_use_evaluation=2) == ("p5.48xlarge", 2)
    assert evaluation(instance_type_evaluation="g6.12xlarge") == ("g6.12xlarge", 1)
    assert evaluation(compute_evaluation="spot") == ("Standard_ND96isr_H100_v5", 1)
    assert evaluation(compute_draft_model_training="cpu-pool") == (None, 0)
    assert evaluation(compute_evaluation="serverless") == ("p5.48xlarge", 1)
    elastic = Parameters(compute_draft_model_training="spot")
    assert resolve(MAP, "train", elastic).restarts == 3  # torchrun alone starts processes again
    assert resolve(MAP, "evaluate", elastic).restarts == resolve(MAP, "regenerate", elastic).restarts == 0
    with pytest.raises(DraftModelError, match=r"number_of_gpu_to_use_evaluation: given 9; .* use at most 8$"):
        evaluation(number_of_gpu_to_use_evaluation=9)
    with pytest.raises(DraftModelError, match="compute_evaluation: given 'nowhere'"):
        evaluation(compute_evaluation="nowhere")


LLAMA_70B = json.loads((ROOT / "docs/targets/llama-3.3-70b.json").read_text(encoding="utf-8"))
MIXTRAL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "vocab_size": 32000, "num_local_experts": 8,
}  # fmt: skip


def test_weights_are_counted_from_the_configuration():
    assert weights_of(LLAMA_70B) == pytest.approx(2 * 70_553_706_496, rel=1e-4)
    assert weights_of(MIXTRAL) == pytest.approx(2 * 46_702_792_704, rel=1e-4)
    assert weights_of({**LLAMA_70B, "quantization_config": {}}) > 0
    assert weights_of({**LLAMA_70B, "quantization_config": {"bits": 4}}) == weights_of({"hidden_size": 4}) == 0


@pytest.mark.parametrize(
    ("type_name", "gpus", "fits"),
    [("p5.48xlarge", 1, False), ("p5.48xlarge", 2, True), ("Standard_NC24rs_v3", 4, False)],
)
def test_a_target_that_the_evaluations_gpus_cannot_hold_is_refused(type_name, gpus, fits):
    p = Parameters(instance_type_evaluation=type_name, number_of_gpu_to_use_evaluation=gpus)
    told = misfit(LLAMA_70B, weights_of(LLAMA_70B), 2e9, p, resolve(MAP, "evaluate", p))
    assert (told == "") is fits
    if not fits:
        assert told.startswith(
            "number_of_gpu_to_use_evaluation: the evaluation needs 143.8 GB (target 141.1, draft 2.0"
        )
        assert f"({gpus} GPUs of " in told


def test_what_is_not_known_of_the_gpus_refuses_nothing_and_memory_counts_without_them():
    p = Parameters(compute_evaluation="cpu-pool")
    assert misfit(LLAMA_70B, 5e9, 0.0, p, resolve(MAP, "evaluate", p)) == ""
    assert "pods without GPUs" in misfit(LLAMA_70B, 6e9, 0.0, p, resolve(MAP, "evaluate", p))
    assert misfit(LLAMA_70B, 1e15, 0.0, p, Compute("1", "1Mi", gpus=1)) == ""
    assert misfit({}, 1e9, 0.0, p, Compute("1", "1024Mi")) == ""


def test_import_and_data_set_ask_for_cpus_and_are_not_held_to_them():
    """compute_model_import and instance_type_model_import choose their nodes."""
    p = Parameters(compute_model_import="spot")
    for stage in ("import", "dataset"):
        node = resolve(MAP, stage, p)
        assert (node.gpus, node.limited) == (0, False)
        assert node.node_selector == {"node.kubernetes.io/instance-type": "Standard_ND96isr_H100_v5"}
    typed = resolve(MAP, "dataset", Parameters(instance_type_model_import="standard_D8S_v5"))
    assert typed.node_selector == {"node.kubernetes.io/instance-type": "Standard_D8s_v5"}


def test_a_map_of_ones_own(tmp_path):
    file = tmp_path / "map.json"
    file.write_text('{"computes": {"mine": {"cpus": 2, "memory_gib": 4}}}')
    assert load_map(str(file), lambda name: None).computes["mine"].cpus == 2
    data = {compute.KEY: file.read_text()}
    assert load_map("team-map", {"team-map": data}.get).computes.keys() == {"mine"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"computes": {"mine": {"cpus": -2}}}', "computes.mine.cpus: Input should be greater than 0"),
        ('{"computes": {"mine": {"queu": "q"}}}', "computes.mine.queu: Extra inputs are not permitted"),
        ("{", "Invalid JSON"),
    ],
)
def test_a_map_that_breaks_the_schema_is_refused(tmp_path, text, words):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(DraftModelError, match=words):
        load_map(str(tmp_path / "map.json"), lambda name: None)
    with pytest.raises(DraftModelError, match="no ConfigMap of that name"):
        load_map("absent", lambda name: None)


def test_priority_and_tolerations_come_from_an_administrators_map_alone(tmp_path):
    size = {"cpus": 2, "memory_gib": 4}
    for entry in (
        {"computes": {"mine": {**size, "priority_class": "system-node-critical"}}},
        {"computes": {"mine": {**size, "tolerations": [{"key": "control-plane"}]}}},
        {"instance_types": {"mine": {**size, "tolerations": [{"key": "control-plane"}]}}},
    ):
        (tmp_path / "map.json").write_text(json.dumps(entry))
        with pytest.raises(DraftModelError, match="sets tolerations or a priority_class for mine; only a ConfigMap"):
            load_map(str(tmp_path / "map.json"), lambda name: None)
        assert load_map("admins", {"admins": {compute.KEY: json.dumps(entry)}}.get)


def test_the_documented_schema_is_the_one_that_is_used():
    """After a wanted change: python -c 'import json; from draft_model.jobs.compute import ComputeMap as map;
    print(json.dumps(map.model_json_schema(), indent=2))'."""
    text = (ROOT / "docs/compute_map.schema.json").read_text(encoding="utf-8")
    assert json.loads(text) == ComputeMap.model_json_schema()
