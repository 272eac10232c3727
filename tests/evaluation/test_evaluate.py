"""The stage: what evaluation.json says, of which prompts, and what it predicts."""

import hashlib
import io
import json
import os
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import tiny
from dataset_hub import DatasetHub
from markupsafe import escape
from mlflow import MlflowClient
from pyarrow import parquet
from transformers import AutoTokenizer

from draft_model.errors import DraftModelError
from draft_model.evaluation import accept, prompts, speculative
from draft_model.evaluation.prediction import expected_length, predict
from draft_model.evaluation.schema import SCHEMAS, Evaluation, Report, json_schema

PROGRAM = Path(sysconfig.get_path("scripts")) / "draft-model"


@pytest.fixture(scope="module")
def everything(trained, tmp_path_factory):
    """evaluation.json of a run with a tree and with sampling."""
    settings = {"evaluation_tree": "3,2", "evaluation_temperature": 0.7, "evaluation_conversations": 0}
    result, final = trained.evaluate(tmp_path_factory.mktemp("everything"), **settings)
    return result, final, json.loads((final / "evaluation.json").read_text())


def test_the_output_is_the_targets_own_over_the_whole_set_in_every_greedy_way(everything, trained):
    result, _, found = everything
    lossless = found["lossless"]
    assert lossless["identical"]
    assert result.measured
    rows = json.loads(Path(trained.inputs.dataset, "report.json").read_text())["splits"]["validation"]["rows_kept"]
    assert lossless["prompts"] == found["prompts"] == len(found["prompt_tokens"]) == rows
    # Chain, untrained chain and tree, each against the target alone; only a tie ends a comparison early.
    every = 3 * found["trained"]["tokens"]
    assert lossless["compared_tokens"] == every or (lossless["ties"] and lossless["compared_tokens"] < every)


def test_a_token_that_is_not_the_targets_own_fails_the_stage(trained, tmp_path, monkeypatch):
    follow = accept.walk_greedy

    def wrong(tree, tokens, chosen):
        walk = follow(tree, tokens, chosen)
        return replace(walk, last=(walk.last + 1) % 60)

    monkeypatch.setattr(speculative, "walk_greedy", wrong)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(DraftModelError, match=r"speculative decoding changed the output of \d+ replies .* must not be"):
        trained.evaluate(tmp_path, register_model_name="never")
    found = json.loads((tmp_path / "final/evaluation.json").read_text())
    assert not found["lossless"]["identical"]
    first = found["lossless"]["differences"][0]
    assert first["margin"] > 1e-4
    assert "do not serve this draft" in (tmp_path / "final/report.html").read_text()
    assert "**The replies differ" in (tmp_path / "final/README.md").read_text()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_registered_models() == []
    (run,) = client.search_runs([client.get_experiment_by_name("draft-model").experiment_id])
    assert (run.info.status, run.data.metrics["lossless"]) == ("FAILED", 0.0)


def test_the_files_are_as_their_schemas_say(everything):
    _, final, found = everything
    assert Evaluation.model_validate(found).model_dump(by_alias=True, mode="json") == found
    report = json.loads((final / "report.json").read_text(encoding="utf-8"))
    assert Report.model_validate(report).model_dump(by_alias=True, mode="json") == report
    for name, record in SCHEMAS.items():
        committed = Path(__file__).parents[2] / "docs" / name
        assert json.loads(committed.read_text(encoding="utf-8")) == json_schema(record), f"write {name} anew"


def test_the_report_as_json_has_what_the_page_shows(everything, trained):
    _, final, found = everything
    report = json.loads((final / "report.json").read_text(encoding="utf-8"))
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    assert report["evaluation"] == found
    assert report["dataset"] == training.pop("dataset")
    assert report["training"].keys() == training.keys()
    assert report["training"]["log"] == training["log"]
    page = (final / "report.html").read_text(encoding="utf-8")
    assert [it["of"] for it in report["hashes"]] == ["target", "dataset", "draft"]
    weights = hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest()
    assert report["hashes"][2]["sha256"] == weights
    assert all(len(it["sha256"]) == 64 and it["sha256"] in page for it in report["hashes"])
    assert all(escape(finding["title"]) in page for finding in report["findings"])


def test_other_ways_of_decoding_are_measured_beside_the_chain(everything):
    _, _, found = everything
    tree, sampled = found["more"]
    assert (tree["name"], tree["proposals"]) == ("tree 3,2, greedy", 9)
    assert sampled["name"] == "tree 3,2, sampled at temperature 0.7"
    assert tree["acceptance_length"] >= found["trained"]["acceptance_length"]
    assert sampled["rounds"] > 0


def test_categories_and_depths_add_up_to_all_rounds(everything):
    _, _, found = everything
    for split in ("by_category", "by_depth"):
        assert sum(record["rounds"] for record in found[split]) == found["trained"]["rounds"]
    assert {record["category"] for record in found["by_category"]} <= {"first reply", "later reply"}


def test_speed_is_told_with_its_hardware_and_beside_the_target_alone(everything):
    _, _, found = everything
    clock = found["wall_clock"]
    assert clock["hardware"] == found["hardware"] != ""
    assert clock["speed_up"] == pytest.approx(clock["tokens_per_second"] / clock["target_alone_tokens_per_second"])
    costs = found["prediction"]["costs"]
    assert costs["hardware"] == found["hardware"]
    assert min(costs["draft_cost"], *costs["verify_cost"]) > 0
    assert [record["proposals"] for record in found["prediction"]["by_proposals"]] == list(range(1, 11))


def test_the_prediction_is_the_formulas():
    costs = {"verify_cost": [1.0] * 10, "draft_cost": 0.05}
    found = predict([0.8] * 10, [1.5, 1.9], costs)
    for record in found["by_proposals"]:
        k = record["proposals"]
        length = (1 - 0.8 ** (k + 1)) / (1 - 0.8)  # Leviathan et al., equation 1
        assert record["acceptance_length"] == pytest.approx(length)
        assert record["speed_up"] == pytest.approx(length / (1 + 0.05 * k))
        assert record["predicted_acceptance_length"] == {1: 1.5, 2: 1.9}.get(k)
    best = max(range(1, 11), key=lambda k: (1 - 0.8 ** (k + 1)) / (1 + 0.05 * k))
    assert found["recommended"] == best == 8
    assert predict([0.1] * 10, None, {"verify_cost": [1.5] * 10, "draft_cost": 0.2})["recommended"] == 0
    assert expected_length([0.5, None, 0.9], 3) == 1.5


def test_prompts_come_from_a_file(trained, tmp_path):
    rows = [
        {"prompt": "alpha beta", "category": "short"},
        {"messages": [{"role": "user", "content": "gamma"}, {"role": "assistant", "content": "left out"}]},
        {"conversations": [{"role": "user", "content": "delta epsilon zeta"}], "category": "long"},
    ]
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    _, final = trained.evaluate(tmp_path, evaluation_prompts=str(file))
    found = json.loads((final / "evaluation.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(trained.inputs.model)
    assert [tokenizer.decode(tokens) for tokens in found["prompt_tokens"]] == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        for text in ("alpha beta", "gamma", "delta epsilon zeta")
    ]
    assert [record["category"] for record in found["by_category"]] == ["short", "prompts", "long"]


@pytest.mark.parametrize("line", ["[]", '{"prompt": ""}', '{"messages": []}', "{", '{"prompts": "a"}'])
def test_a_line_that_is_no_prompt_is_named(trained, tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "alpha"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DraftModelError, match=r"evaluation_prompts: line 2 of prompts.jsonl is no prompt"):
        trained.evaluate(tmp_path, evaluation_prompts=str(file))


PUBLISHED = {  # the columns of each data set's first row, as its card shows them
    "mt-bench": ({"prompt": ["Compose.", "Rewrite it."], "category": "writing"}, "Compose.", "mt-bench writing"),
    "gsm8k": ({"question": "How many?", "answer": "#### 2"}, "How many?", "gsm8k"),
    "humaneval": ({"prompt": "def f():\n"}, "Complete this Python function:\n\n```python\ndef f():\n```", "humaneval"),
    "alpaca": ({"instruction": "Sum.", "input": "1 2", "output": "3"}, "Sum.\n\n1 2", "alpaca"),
    "cnn-dm": ({"article": "(CNN) News.", "highlights": "N."}, "Summarize this article:\n\n(CNN) News.", "cnn-dm"),
}  # fmt: skip


@pytest.mark.parametrize("name", prompts.BENCHMARKS)
def test_a_benchmarks_rows_become_prompts(name):
    row, text, category = PUBLISHED[name]
    benchmark = prompts.BENCHMARKS[name]
    assert (benchmark.text(row), benchmark.category(row)) == (text, category)


def test_a_benchmark_comes_from_the_hub_once_and_from_the_cache_after_that(trained, tmp_path):
    rows = pyarrow.table({"question": ["How many?", "alpha beta"], "answer": ["2", "gamma"]})
    parquet.write_table(rows, written := io.BytesIO())
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test-*\n---\n"
    files = {"README.md": card.encode(), "main/test-0.parquet": written.getvalue()}
    command = [
        PROGRAM, "compare", "--model", trained.inputs.model, "--chat_template", "qwen",
        "--evaluation_prompts", "gsm8k", "--evaluation_max_new_tokens", "4", str(trained.final),
    ]  # fmt: skip

    def compare(name, **settings):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "COLUMNS": "300", **settings}
        file = tmp_path / f"{name}.json"
        subprocess.run([*command, "--json", str(file)], env=environment, check=True, capture_output=True)
        return [record["by_category"] for record in json.loads(file.read_text(encoding="utf-8"))]

    with DatasetHub("openai/gsm8k", files) as hub:
        (fetched,) = compare("fetched", HF_ENDPOINT=hub.endpoint)
        assert [request for request in hub.requests if request.startswith("GET") and ".parquet" in request]
        asked = len(hub.requests)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache/datasets"))
            assert prompts.to_fetch("gsm8k,mt-bench") == ["HuggingFaceH4/mt_bench_prompts"]
        assert [(record["category"], record["prompts"]) for record in fetched] == [("gsm8k", 2)]
        assert compare("cached", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1") == [fetched]
        assert len(hub.requests) == asked


def test_a_benchmark_that_cannot_be_fetched_is_told_clearly(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DraftModelError, match=r"openai/gsm8k is not in the cache .* give a file of prompts"):
        prompts.choose_prompts("gsm8k", None, None, "qwen", 4, 100)


def test_what_training_predicts_stands_beside_what_was_measured(everything):
    _, final, found = everything
    last = json.loads((final / "training.json").read_text(encoding="utf-8"))["validation"][-1]
    predicted = [record["predicted_acceptance_length"] for record in found["prediction"]["by_proposals"]]
    assert predicted[:3] == last["acceptance_length_by_proposals"]
    assert predicted[3:] == [None] * 7
    assert found["predicted_acceptance_length"] == predicted[2]  # the training's own num_speculative_tokens is 3
