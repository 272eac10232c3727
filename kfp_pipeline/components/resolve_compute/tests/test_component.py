"""Computes become what Kubernetes asks for, and the run stops where the preflight found problems."""

from .. import resolve_compute


def test_what_the_import_gets_and_what_is_shown(call):
    done = call(
        resolve_compute, problems=[], training_backend="pytorchjob", instance_type_model_import="standard_D12_V2"
    )
    cpus, memory, selector, tolerations = done.output
    assert cpus.endswith("m")
    assert memory.endswith("Mi")
    assert selector == {"node.kubernetes.io/instance-type": "Standard_D12_v2"}
    assert isinstance(tolerations, list)
    shown = done.text("summary").splitlines()
    assert shown[0] == "|  | CPUs | memory | GPUs | node labels | queue |"
    assert [line.split(" | ")[0] for line in shown[2:]] == ["| import", "| train"]
    assert " | 1 nvidia.com/gpu | " in shown[3]


def test_a_named_compute_wins_over_the_instance_type(call):
    done = call(resolve_compute, problems=[], compute_model_import="cpu-pool", training_backend="local")
    assert "node.kubernetes.io/instance-type" not in done.output[2]


def test_problems_of_the_preflight_stop_the_run(refusal):
    assert refusal(resolve_compute, problems=["num_epochs: given 0", "b: c"]) == ["num_epochs: given 0", "b: c"]


def test_what_the_map_does_not_have_stops_it_too(refusal):
    (problem,) = refusal(resolve_compute, problems=[], compute_model_import="nowhere", training_backend="local")
    assert problem.startswith("compute_model_import: given 'nowhere'")
