"""Each input of the contract, and its output, does something: here is the test that shows what.

Such a test fails when the parameter is ignored. That the list is whole and its tests exist is checked here; what a job
on a cluster is told is shown below.
"""

import ast
from pathlib import Path

import pytest
from contract import CONTRACT
from jobs.requests import request

from draft_model.jobs.spec import pytorchjob, trainjob

TESTS = Path(__file__).parent
EFFECTS = {
    "test_effects.py": {
        "num_nodes_draft_model_training": "test_nodes_are_pods_and_gpus_are_processes",
        "number_of_gpu_to_use_draft_model_training": "test_nodes_are_pods_and_gpus_are_processes",
    },
    "test_parameters.py": {"dp_size": "test_data_parallelism_that_was_set_and_does_not_fit_is_refused"},
    "jobs/test_compute.py": {
        "instance_type_model_import": "test_import_and_data_set_ask_for_cpus_and_are_not_held_to_them",
        "compute_model_import": "test_import_and_data_set_ask_for_cpus_and_are_not_held_to_them",
        "instance_type_draft_model_training": "test_a_node_of_any_cloud_in_any_case_gives_its_gpus_share",
        "compute_draft_model_training": "test_a_named_compute_wins_and_says_so",
    },
    "model_import/test_hub.py": {"huggingface_id": "test_a_repository_is_resolved_to_a_commit_and_recorded"},
    "model_import/test_import.py": {"pytorch_model_path": "test_a_transformers_folder"},
    "model_import/test_mlflow.py": {"mlflow_model_path": "test_the_layouts_of_mlflow"},
    "dataset/test_build.py": {
        "dataset_train_split": "test_counts_of_result_report_manifest_and_shards_agree",
        "dataset_validation_split": "test_counts_of_result_report_manifest_and_shards_agree",
        "draft_model_config": "test_the_draft_vocabulary_is_that_of_the_training_answers",
        "build_dataset_num_proc": "test_what_is_built_on_as_many_processes_as_there_are_cores_is_not_built_again",
    },
    "dataset/test_encode.py": {
        "max_length": "test_long_conversations_are_cut_at_the_end_and_counted",
        "chat_template": "test_a_template_name_that_does_not_fit_the_tokenizer_is_refused_by_name",
    },
    "training/test_run.py": {
        "num_epochs": "test_intervals_count_epochs_and_the_last_one_always_counts",
        "eval_interval": "test_intervals_count_epochs_and_the_last_one_always_counts",
        "save_interval": "test_intervals_count_epochs_and_the_last_one_always_counts",
        "training_batch_size": "test_the_targets_batch_changes_nothing",
        "draft_micro_batch_size": "test_accumulation_changes_nothing",
        "log_steps": "test_a_log_line_is_the_mean_over_the_tokens_of_its_steps",
        "seed": "test_another_seed_gives_another_training",
        "total_steps": "test_total_steps_ends_the_training_and_the_schedule",
    },
    "training/test_effects.py": {
        "learning_rate": "test_learning_rate_is_the_peak",
        "warmup_ratio": "test_warmup_ratio_is_the_share_of_the_steps_before_the_peak",
        "ttt_length": "test_ttt_length_is_the_number_of_unrolled_steps",
        "draft_global_batch_size": "test_draft_global_batch_size_is_the_conversations_of_a_step",
        "draft_accumulation_steps": "test_draft_accumulation_steps_is_what_the_batches_come_to_or_refused",
        "dist_timeout": "test_dist_timeout_is_how_long_processes_wait_for_one_another",
        "attention_backend": "test_attention_backend_says_how_the_draft_attends",
    },
    "training/test_loop.py": {
        "max_grad_norm": "test_a_training_is_adamw_on_the_clipped_mean_gradient_of_each_global_batch",
    },
    "training/test_parallel.py": {"tp_size": "test_every_layout_gives_the_losses_and_weights_of_one_process"},
    "training/test_resume.py": {"resume": "test_an_empty_output_goes_on_from_the_checkpoint_that_is_named"},
    "training/test_start.py": {
        "resume_from_checkpoint": "test_weights_are_taken_and_optimizer_and_schedule_are_new",
    },
    "kfp_pipeline/test_local_run.py": {"output_model_path": "test_everything_went_through_the_store"},
}


def test_the_list_is_whole():
    listed = [name for tests in EFFECTS.values() for name in tests]
    assert sorted(listed) == sorted([*(name for name, *_ in CONTRACT), "output_model_path"])


@pytest.mark.parametrize("file", EFFECTS)
def test_the_tests_are_there(file):
    text = (TESTS / file).read_text(encoding="utf-8")
    functions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert set(EFFECTS[file].values()) <= functions
    assert [name for name in EFFECTS[file] if name not in text] == []


def test_nodes_are_pods_and_gpus_are_processes():
    world = {"num_nodes_draft_model_training": 3, "number_of_gpu_to_use_draft_model_training": 4}
    wanted = request(**world, draft_global_batch_size=12, instance_type_draft_model_training="Standard_ND96isr_H100_v5")
    (job,) = pytorchjob(wanted)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] + replicas["Worker"]["replicas"] == 3
    assert job["spec"]["nprocPerNode"] == "4"
    pod = replicas["Worker"]["template"]["spec"]["containers"][0]["resources"]
    assert pod["limits"]["nvidia.com/gpu"] == "4"
    trainer = trainjob(wanted)[-1]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 4)
