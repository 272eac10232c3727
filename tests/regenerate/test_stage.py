"""Conversations of a tiny target from end to end: the answers are its own, whoever generates them and however often."""

import gzip
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from training.case import import_model
from training.processes import start

from draft_model import dataset, storage, workers
from draft_model.cli import cli
from draft_model.dataset.tokens import Split
from draft_model.engine.generate import Request, Sampling, Settings
from draft_model.errors import DraftModelError
from draft_model.evaluation import stage as evaluation
from draft_model.parameters import Parameters
from draft_model.parameters.rules import problems_with
from draft_model.regenerate import RegenerateConfig, run, stage
from draft_model.regenerate.batched import BatchedGenerator

ROWS = [
    {"id": "greek", "conversations": [
        {"role": "user", "content": "alpha beta"}, {"role": "assistant", "content": "gamma"},
        {"role": "user", "content": "delta"}, {"role": "assistant", "content": "epsilon zeta"}]},
    *(row for row in tiny.conversations(11) if row["id"] != "tiny-0-5"),  # to that one it says nothing
]  # fmt: skip
SERVING = os.environ.get("DRAFT_MODEL_ENGINE_PYTHON", "")
BAR = 93
"""A token that this target often writes; it ends its replies, so that some of them are cut and some are not."""
GREEDY = {"chat_template": "qwen", "max_length": 160, "regenerate_max_new_tokens": 12, "regenerate_temperature": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regenerate")
    source = tiny.write_target(folder / "source", seed=4)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, BAR], "temperature": 0.7, "top_k": 5})
    )
    return import_model(folder, source)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stage, "SHARD_LINES", 4)
    monkeypatch.setattr(stage, "_POLL_SECONDS", 0.01)
    monkeypatch.delenv("DRAFT_MODEL_ENGINE_PYTHON", raising=False)


@pytest.fixture
def configure(model, tmp_path):
    def configure(name, rows=ROWS, *, root="", pod=0, pods=1, **settings):
        data = tmp_path / "train.jsonl"
        if not data.exists():
            tiny.write_jsonl(data, rows)
        p = Parameters(dataset_train_split=str(data), **{"regenerate_answers": "all", **GREEDY, **settings})
        return RegenerateConfig(model, str(tmp_path / name), p, tmp_path / f"work-{name}-{pod}", root, pod, pods)

    return configure


@pytest.fixture
def regenerate(configure):
    return lambda *given, **settings: run(configure(*given, **settings))


def contents(uri):
    return {
        path.relative_to(uri).as_posix(): path.read_bytes() for path in sorted(Path(uri).rglob("*")) if path.is_file()
    }


def lines(uri, split="train"):
    parts = sorted(Path(uri, split).glob("part-*"))
    return [json.loads(line) for part in parts for line in gzip.decompress(part.read_bytes()).splitlines()]


def said_by(model, messages, longest=12):
    """The target's greedy answer to one prompt by itself, and whether it ended."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, target = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))["input_ids"]
    made = []
    for _ in range(longest):
        token = int(target(torch.tensor([ids + made])).logits[0, -1].argmax())
        if token in (1, BAR):
            return tokenizer.decode(made), "stop"
        made.append(token)
    return tokenizer.decode(made).rstrip("\N{REPLACEMENT CHARACTER}"), "length"


def test_each_turn_is_what_the_target_says_to_its_own_earlier_answers(regenerate, model):
    made = lines(regenerate("out").uri)
    assert [row["id"] for row in made] == [row["id"] for row in ROWS]
    for given, row in zip(ROWS[:4], made, strict=False):
        expected, finish = [], []
        for message in given["conversations"]:
            if message["role"] == "assistant":
                text, how = said_by(model, expected)
                expected.append({"role": "assistant", "content": text})
                finish.append(how)
            else:
                expected.append(message)
        assert (row["conversations"], row["finish"]) == (expected, finish)


def test_the_data_set_takes_all_of_it_and_teaches_no_end_after_a_cut_answer(regenerate, model, tmp_path):
    made = regenerate("out")
    p = Parameters(dataset_train_split=made.split_uri("train"), chat_template="qwen", max_length=160)
    built = dataset.run(dataset.DatasetConfig(model, str(tmp_path / "dataset"), p, tmp_path / "work"))
    assert (built.train.rows_kept, built.train.rows_rejected) == (made.splits["train"]["conversations"], 0)
    finish = [how for row in lines(made.uri) for how in row["finish"]]
    split = Split(Path(built.uri) / "train")
    rows = [split[index] for index in range(len(split))]
    ends = sum(int((row.input_ids[row.loss_mask] == 1).sum()) for row in rows)
    assert (ends, made.splits["train"]["cut"]) == (finish.count("stop"), finish.count("length"))
    assert min(finish.count("length"), finish.count("stop")) > 0


def test_a_pod_knows_its_share_by_what_both_operators_set(monkeypatch):
    assert (RegenerateConfig("m", "o", Parameters(), Path()).pods) == 1
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PET_NNODES", "3")
    config = RegenerateConfig("m", "o", Parameters(), Path())
    assert (config.pod, config.pods) == (1, 3)


def test_the_number_of_pods_changes_nothing(regenerate, tmp_path):
    settings = {"regenerate_temperature": 0.9, "regenerate_samples_per_prompt": 2}
    regenerate("alone", **settings)
    others = [
        threading.Thread(target=regenerate, args=("three",), kwargs={"pod": n, "pods": 3, **settings}) for n in (2, 1)
    ]
    for other in others:
        other.start()
    regenerate("three", pod=0, pods=3, **settings)
    for other in others:
        other.join()
    assert contents(tmp_path / "alone") == contents(tmp_path / "three")


def regenerate_all_but_a_shard(model, output, parameters):
    """In a process of its own, which never uploads its third shard."""
    workers._PRELOADED.clear()  # a template needs no torch
    upload, stage.SHARD_LINES = stage._upload, 4
    stage._upload = lambda shard, *rest: signal.pause() if shard.number == 2 else upload(shard, *rest)
    run(RegenerateConfig(model, output, Parameters.model_validate_json(parameters), Path(f"{output}-work")))


def test_a_run_that_was_killed_goes_on_with_the_shards_that_are_missing(regenerate, model, tmp_path):
    regenerate("whole")
    p = Parameters(dataset_train_split=str(tmp_path / "train.jsonl"), regenerate_answers="all", **GREEDY)
    process = start(
        regenerate_all_but_a_shard, model, str(tmp_path / "killed"), p.model_dump_json(), log=tmp_path / "log"
    )
    pieces = tmp_path / "killed/pieces/train"
    while len(list(pieces.glob("part-*.json")) if pieces.exists() else []) < 2:
        assert process.is_alive(), (tmp_path / "log").read_text()
        threading.Event().wait(0.05)
    process.kill()
    process.join()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed/train").glob("part-*")}
    assert len(before) == 2
    regenerate("killed")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_run_that_another_one_of_the_same_inputs_overtakes_takes_its_result(regenerate, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "_PATIENCE_SECONDS", 1)
    make, root, made = stage._make_shards, str(tmp_path / "root"), []

    def make_and_be_overtaken(*given):
        make(*given)
        monkeypatch.setattr(stage, "_make_shards", make)
        made.append(regenerate("other", root=root))

    monkeypatch.setattr(stage, "_make_shards", make_and_be_overtaken)
    found = regenerate("first", root=root)
    assert (found.uri, found.splits) == (made[0].uri, made[0].splits)
    assert [row["id"] for row in lines(found.uri)] == [row["id"] for row in ROWS]


@pytest.mark.parametrize(("pod", "dead", "own"), [(0, 1, 7), (1, 0, 4)])
def test_a_pod_that_never_comes_ends_the_wait_for_it(regenerate, monkeypatch, capsys, pod, dead, own):
    monkeypatch.setattr(stage, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(DraftModelError, match=rf"regenerate_answers: no pod has finished .* waits for pod {dead}:"):
        regenerate("half", pod=pod, pods=2)
    assert f" {own}/{own} [" in capsys.readouterr().err  # the bar has a total


def test_a_shard_that_was_lost_since_is_made_again(regenerate, monkeypatch, tmp_path):
    regenerate("whole")
    monkeypatch.setattr(stage, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(DraftModelError):
        regenerate("half", pod=1, pods=2)
    next(Path(tmp_path, "half/train").glob("part-*")).unlink()
    regenerate("half")
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")


def test_answers_are_found_again_where_data_model_and_settings_are_the_same(regenerate, configure, tmp_path):
    root = str(tmp_path / "root")
    first = regenerate("", root=root)
    again = regenerate("", root=root, build_dataset_num_proc=3, seed=5)  # greedy: the seed plays no part
    assert (first.reused, again.reused, again.uri, again.splits) == (False, True, first.uri, first.splits)
    others = {"regenerate_max_new_tokens": 5, "regenerate_limit": 3, "regenerate_temperature": 1.0, "max_length": 99}
    uris = {stage._read_inputs(configure("", root=root, **{name: of})).output for name, of in others.items()}
    assert len(uris | {first.uri}) == 5
    next(Path(first.uri, "train").glob("part-*")).unlink()
    assert not regenerate("", root=root).reused


def test_sampling_is_the_targets_own_unless_a_temperature_is_given(model):
    assert stage.read_sampling(Path(model), -1.0) == Sampling(temperature=0.7, top_k=5)
    assert stage.read_sampling(Path(model), 1.3) == Sampling(temperature=1.3, top_k=5)
    assert stage.read_sampling(Path(model), 0.0) == Sampling(temperature=0.0)


def test_samples_of_a_conversation_differ_and_are_told_apart(regenerate):
    sampled = {"regenerate_temperature": 1.0, "regenerate_samples_per_prompt": 2}
    made = {row["id"]: row["conversations"] for row in lines(regenerate("two", **sampled).uri)}
    assert list(made) == [name for row in ROWS for sample in (0, 1) if (name := f"{row['id']}-{sample}") in made]
    pairs = [(made.get(f"{row['id']}-0"), made.get(f"{row['id']}-1")) for row in ROWS]
    assert sum(one != two for one, two in pairs if one and two) > 5
    other = {row["id"]: row["conversations"] for row in lines(regenerate("seed", seed=1, **sampled).uri)}
    assert other != made
    (problem,) = problems_with(
        {"regenerate_answers": "train", "regenerate_temperature": 0, "regenerate_samples_per_prompt": 2}, ["regenerate"]
    )
    assert problem.startswith("regenerate_samples_per_prompt: given 2 with regenerate_temperature=0")


def test_draws_follow_the_distribution(model):
    """Two thousand first tokens against the probabilities that the settings leave."""
    import torch

    sampling = Sampling(temperature=1.5, top_k=4)
    generator = BatchedGenerator(Settings(model, 160, sampling, [1, BAR], 0))
    prompt = [5, 6, 7]
    for number in range(2000):
        generator.submit(Request(number, prompt, 1, seed=number))
    drawn = [(generator.next().tokens or [1])[0] for _ in range(2000)]
    logits = generator._model(torch.tensor([prompt])).logits[0, -1] / 1.5
    best = logits.topk(4)
    for token, share in zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True):
        assert abs(drawn.count(token) / 2000 - share) < 0.05
    assert set(drawn) <= set(best.indices.tolist())


def test_too_little_memory_is_one_sentence(model):
    """A real allocation that fails: the mask of a batch with one long prompt takes a gigabyte."""
    import resource

    generator = BatchedGenerator(Settings(model, 9000, Sampling(temperature=0), [1], 0))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for number, length in enumerate([8000] + [9] * 15):
        generator.submit(Request(number, [5] * length, 4, seed=0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), limits[1]))
    try:
        with pytest.raises(DraftModelError, match=r"ran out of memory with 16 .*; lower max_length or regenerate_max"):
            generator.next()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_what_cannot_be_used_is_put_aside_with_its_line(regenerate, tmp_path):
    ask, say = {"role": "user", "content": "alpha " * 200}, {"role": "assistant", "content": "x"}
    long = {"id": "long", "conversations": [ask, say]}
    text = {"text": "<|im_start|>assistant\nhello<|im_end|>"}
    later = {"id": "later", "conversations": [*ROWS[0]["conversations"][:2], *long["conversations"]]}
    rows = [*ROWS, long, text, {"conversations": []}, later]
    with pytest.raises(
        DraftModelError, match=r"3 of 15 conversations cannot be regenerated .*train.jsonl line 12: prompt"
    ):
        regenerate("out", rows)
    made = regenerate("out", max_rejected_fraction=0.5)
    assert [row["id"] for row in lines(made.uri)] == [*(row["id"] for row in ROWS), "later"]
    assert [message["role"] for message in lines(made.uri)[-1]["conversations"]] == ["user", "assistant"]
    counts = made.splits["train"]
    assert counts["put_aside"] == {"prompt too long": 1, "rendered text": 1, "empty": 1}
    assert counts["ended_early"]["prompt too long"] == 1
    aside = [json.loads(line) for line in Path(made.uri, "rejected.jsonl").read_text().splitlines()]
    reasons = ["prompt too long", "rendered text", "empty"]
    assert [(it["line"], it["reason"]) for it in aside] == [*enumerate(reasons, 12)]
    page = Path(made.uri, "report.html").read_text()
    assert "gamma" in page
    assert "prompt too long" in page
    report = json.loads(Path(made.uri, "report.json").read_text())
    assert report["splits"]["train"]["samples"][0][1]["before"] == "gamma"


def test_limit_and_splits(regenerate, tmp_path):
    held = tiny.write_jsonl(tmp_path / "held.jsonl", ROWS[:2])
    given = {"dataset_validation_split": str(held), "regenerate_limit": 5}
    both = regenerate("both", **given)
    assert {split: counts["conversations"] for split, counts in both.splits.items()} == {"train": 5, "validation": 2}
    assert len(lines(both.uri, "validation")) == 2
    assert list(regenerate("train", **given, regenerate_answers="train").splits) == ["train"]


def test_an_engine_that_is_named_and_not_there_is_no_reason_to_be_slow_in_silence(regenerate, monkeypatch):
    monkeypatch.setenv("DRAFT_MODEL_ENGINE_PYTHON", sys.executable)
    with pytest.raises(
        DraftModelError, match=r"DRAFT_MODEL_ENGINE_PYTHON: given .*cannot import vllm; install it there"
    ):
        regenerate("out")


def test_an_engine_that_dies_is_one_sentence_and_the_next_run_goes_on(regenerate, tmp_path, monkeypatch):
    python = tmp_path / "python"
    failure = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    python.write_text(f"#!/bin/sh\ncase $1 in -m) read -r job; echo '{failure}' >&2; exit 1;; esac\n")
    python.chmod(0o755)
    monkeypatch.setenv("DRAFT_MODEL_ENGINE_PYTHON", str(python))
    monkeypatch.setattr(stage, "_gpus", lambda: ["0", "1"])  # two engines: neither waits for the other
    sentence = r"regenerate_answers: vllm ran out of memory \(OutOfMemoryError.*use .* a higher tp_size, or lower max_"
    with pytest.raises(DraftModelError, match=sentence) as refused:
        regenerate("out", number_of_gpu_to_use_draft_model_training=2)
    assert "evaluation" not in str(refused.value)
    monkeypatch.delenv("DRAFT_MODEL_ENGINE_PYTHON")
    assert regenerate("out").splits["train"]["conversations"] == len(ROWS)


def test_the_command_line(model, tmp_path):
    data = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS[:2])
    options = [f"--{name}={value}" for name, value in {**GREEDY, "dataset_train_split": data}.items()]
    words = ["regenerate", f"--model={model}", f"--output={tmp_path / 'out'}", *options]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).stdout.strip() == str(tmp_path / "out")
    assert len(lines(tmp_path / "out")) == 2


def test_the_pipelines_data_set_is_made_of_the_targets_answers(model, tmp_path, monkeypatch):
    from test_steps import DEFAULTS, Artifact

    from draft_model import steps

    monkeypatch.setattr(steps.step.__wrapped__.__globals__["signal"], "signal", lambda *_: None)
    data = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS)
    folder = tmp_path / "root/RUN/step"
    folder.mkdir(parents=True)
    values = {**DEFAULTS, **GREEDY, "pytorch_model_path": str(tmp_path), "dataset_train_split": str(data)}
    artifacts = [Artifact(str(folder / name), str(folder / name)) for name in ("dataset", "report", "metrics")]
    own = values | {"regenerate_answers": "train", "training_backend": "local"}
    (tmp_path / "config.json").write_text("{}")
    _, given, *_ = steps.preflight(own, "RUN", Artifact(str(folder / "summary"), str(folder / "summary")))
    built = steps.build_dataset(given, "RUN", model, *artifacts)
    answers = artifacts[0].metadata["answers"]
    assert answers.startswith(f"{tmp_path}/root/regenerated/")
    assert artifacts[2].metadata["regenerated_train_conversations"] == len(ROWS)
    read = storage.read_manifest(built, stage="dataset").properties["parameters"]["dataset_train_split"]
    assert read == f"{answers}/train"
    shown = evaluation._all_parameters(evaluation.EvaluateConfig(model, built, "", tmp_path, Parameters()), {})
    assert (shown["dataset_train_split"], shown["regenerate_answers"]) == (str(data), "train")


@pytest.mark.skipif(not SERVING, reason="DRAFT_MODEL_ENGINE_PYTHON is not set; `make check-serving` sets it")
def test_vllm_gives_the_answers_of_transformers(tmp_path, monkeypatch):
    """In float32 on a CPU: the same greedy answers, whatever batches they were in."""
    # vLLM's attention on a CPU has no heads smaller than 32.
    model = import_model(tmp_path, tiny.write_target(tmp_path / "source", seed=3, head_dim=32))
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.conversations(11))
    p = Parameters(
        dataset_train_split=str(data), **{**GREEDY, "regenerate_answers": "train", "max_rejected_fraction": 0.5}
    )
    found = []
    for name, python in (("transformers", ""), ("vllm", SERVING)):
        monkeypatch.setenv("DRAFT_MODEL_ENGINE_PYTHON", python)
        found.append(run(RegenerateConfig(model, str(tmp_path / name), p, tmp_path / f"work-{name}")))
    assert found[0].splits == found[1].splits
    assert lines(found[0].uri) == lines(found[1].uri)
    monkeypatch.setenv("DRAFT_MODEL_ENGINE_PYTHON", "")
    assert lines(found[0].uri)
