"""The stage: what evaluation.json says, of which prompts, and where a reply ends."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow
import pytest
import tiny
from mlflow import MlflowClient
from model_import.hub_server import Hub
from pyarrow import parquet

from draft_model import tracking
from draft_model.dataset.encode import load_tokenizer
from draft_model.errors import DraftModelError
from draft_model.evaluation import greedy, prompts
from draft_model.evaluation.measure import end_tokens
from draft_model.parameters import Parameters


@pytest.fixture(scope="module")
def everything(trained, tmp_path_factory):
    """Result, folder and evaluation.json of a run over the whole validation split."""
    result, final = trained.evaluate(tmp_path_factory.mktemp("everything"), evaluation_conversations=0)
    return result, final, json.loads((final / "evaluation.json").read_text())


def test_the_output_is_the_targets_own_over_the_whole_set(everything, trained):
    result, _, found = everything
    lossless = found["lossless"]
    assert lossless["identical"]
    assert result.metrics["compared_tokens"] == lossless["compared_tokens"]
    rows = json.loads(Path(trained.inputs.dataset, "report.json").read_text())["splits"]["validation"]["rows_kept"]
    assert lossless["prompts"] == found["prompts"] == len(found["prompt_tokens"]) == rows
    # Trained and untrained draft, each beside the target alone; only a tie ends a comparison early.
    every = 2 * found["trained"]["tokens"]
    assert lossless["compared_tokens"] == every or (lossless["ties"] and lossless["compared_tokens"] < every)


def test_a_token_that_is_not_the_targets_own_fails_the_stage(trained, tmp_path, monkeypatch):
    own = greedy.reference

    def wrong(*given):
        return [
            (greedy.Reply([(token + 1) % 60 for token in reply.tokens]), [9.0] * len(margins))
            for reply, margins in own(*given)
        ]

    monkeypatch.setattr(greedy, "reference", wrong)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(tracking, "FAILED_SECONDS", 120.0)  # the store has to be made
    with pytest.raises(DraftModelError, match=r"speculative decoding changed the output of \d+ replies .* must not be"):
        trained.evaluate(tmp_path, register_model_name="never")
    found = json.loads((tmp_path / "final/evaluation.json").read_text())
    assert not found["lossless"]["identical"]
    assert "do not serve this draft" in (tmp_path / "final/report.html").read_text()
    assert "**The replies differ" in (tmp_path / "final/README.md").read_text()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_registered_models() == []
    (run,) = client.search_runs([client.get_experiment_by_name("draft-model").experiment_id])
    assert (run.info.status, run.data.metrics["lossless"]) == ("FAILED", 0.0)


def test_the_report_as_json_has_what_the_page_shows(everything):
    _, final, found = everything
    report = json.loads((final / "report.json").read_text(encoding="utf-8"))
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    assert report["evaluation"] == found
    assert report["dataset"] == training.pop("dataset")
    assert report["training"]["log"] == training["log"]
    page = (final / "report.html").read_text(encoding="utf-8")
    assert [it["of"] for it in report["hashes"]] == ["target", "dataset", "draft"]
    assert report["hashes"][2]["sha256"] == hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest()
    assert all(len(it["sha256"]) in (32, 64) and it["sha256"] in page for it in report["hashes"])


def test_categories_add_up_and_speed_is_told_with_its_hardware(everything):
    _, final, found = everything
    assert sum(record["rounds"] for record in found["by_category"]) == found["trained"]["rounds"]
    assert {record["category"] for record in found["by_category"]} <= {"first reply", "later reply"}
    (speed,) = found["speed"]
    assert speed["speed_up"] == pytest.approx(speed["tokens_per_second"] / speed["target_alone_tokens_per_second"])
    assert (found["engine"], found["dtype"]) == ("this project's own decoder", "float32")
    last = json.loads((final / "training.json").read_text(encoding="utf-8"))["validation"][-1]
    assert found["predicted_acceptance_length"] == last["acceptance_length_by_proposals"][1]  # of two proposals


def test_end_tokens_are_those_of_engines(trained, tmp_path):
    tokenizer = load_tokenizer(Path(trained.inputs.model))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert end_tokens(tmp_path, tokenizer, "qwen") == sorted({3, end, tokenizer.eos_token_id})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert end_tokens(tmp_path, tokenizer, "llama3") == sorted({5, 7, tokenizer.eos_token_id}), "no <|eot_id|> here"


ASK, SAY = {"role": "user", "content": "amber?"}, {"role": "assistant", "content": "birch"}
CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"a": 1}}}],
}  # fmt: skip
ASKED = "<|im_start|>user\namber?<|im_end|>\n"
PROMPT_LINES = {
    "prompt": ({"prompt": "amber?"}, ASKED),
    "messages": ({"messages": [ASK, SAY]}, ASKED),
    "two turns": ({"conversations": [ASK, SAY, ASK, SAY]}, ASKED + "<|im_start|>assistant\nbirch<|im_end|>\n" + ASKED),
    "system column": (
        {"system": "be brief", "messages": [ASK, SAY]}, "<|im_start|>system\nbe brief<|im_end|>\n" + ASKED,
    ),
    "a call": (
        {"messages": [ASK, CALL, {"role": "tool", "content": "3"}, SAY]},
        ASKED + "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n",
    ),
    "rendered text": ({"text": ASKED + "<|im_start|>assistant\nbirch<|im_end|>\n"}, ASKED),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPT_LINES)
def test_a_line_is_read_as_the_data_sets_reader_reads_it(trained, tmp_path, name):
    row, expected = PROMPT_LINES[name]
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{**row, "category": "own"}])
    prompts.check(Parameters(evaluation_prompts=str(file)))
    tokenizer = load_tokenizer(Path(trained.inputs.model))
    (tokens,) = prompts.choose_prompts(str(file), None, tokenizer, "qwen", 0, 400).groups["own"]
    assert tokenizer.decode(tokens) == expected + "<|im_start|>assistant\n"


BAD_LINES = {
    "{": "not JSON", '{"prompt": ""}': "empty", '{"prompts": "a"}': "wrong shape",
    f'{{"prompt": "a", "tools": [{"[" * 600}{"]" * 600}]}}': "recursion",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_prompt_is_named_before_the_run(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "alpha"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(
        DraftModelError, match=rf"evaluation_prompts: line 2 of .* is not a conversation: .*{BAD_LINES[line]}"
    ):
        prompts.check(Parameters(evaluation_prompts=str(file)))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a<|im_end|>\n<|im_start|>assistant\nb"}, "contains <|im_start|>|contains <|im_end|>"),
        ({"messages": [ASK, SAY], "tools": [{"name": "find"}]}, "`tools`, which this chat template does not write"),
        ({"text": "amber"}, "`text` has no"),
        ({"messages": [SAY]}, "there is nothing to reply to"),
    ],
)
def test_what_the_chat_template_would_change_is_refused(trained, tmp_path, row, why):
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", [row])
    tokenizer = load_tokenizer(Path(trained.inputs.model))
    with pytest.raises(
        DraftModelError,
        match="evaluation_prompts: conversation 1 of .*" + why.replace("|im", r"\|im").replace("|>", r"\|>"),
    ):
        prompts.choose_prompts(str(file), None, tokenizer, "qwen", 0, 400)


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
    assert (benchmark.text.format_map(row).strip(), benchmark.category.format_map(row)) == (text, category)


def test_a_benchmark_comes_from_the_hub_once_and_from_the_cache_after_that(inputs, tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    rows = pyarrow.table({"question": ["How many?", "alpha beta"], "answer": ["2", "gamma"]})
    parquet.write_table(rows, written := io.BytesIO())
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test-*\n---\n"
    files = {"README.md": card.encode(), "main/test-0.parquet": written.getvalue()}
    tokenizer = load_tokenizer(Path(inputs.model))

    def choose():
        return prompts.choose_prompts("gsm8k", None, tokenizer, "qwen", 4, 400).groups

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with Hub(files, dataset="openai/gsm8k") as hub:
        hub.connect(monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        fetched = choose()
        assert hub.got("test-0.parquet")
        hub.requests.clear()
        for of in (constants, datasets.config):
            monkeypatch.setattr(of, "HF_HUB_OFFLINE", True)
        assert choose() == fetched
        assert not hub.requests
    assert {category: len(found) for category, found in fetched.items()} == {"gsm8k": 2}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert prompts.to_fetch("gsm8k,mt-bench") == ["HuggingFaceH4/mt_bench_prompts"]


def test_a_benchmark_that_cannot_be_fetched_is_told_clearly(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DraftModelError, match=r"openai/gsm8k is not in the cache .* give a file of prompts"):
        prompts.choose_prompts("gsm8k", None, None, "qwen", 4, 100)
