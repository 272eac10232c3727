"""From JSONL to a published folder: counts add up, faults are told, same inputs give the same bytes."""

import gzip
import json
import os
import random
import re
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from draft_model import drafts, storage, workers
from draft_model.dataset import DatasetConfig, Split, load_vocabulary, run
from draft_model.dataset import build as stage
from draft_model.dataset.encode import load_tokenizer
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters


def row(question, *answers, **more):
    messages = [{"role": "user", "content": question}]
    for answer in answers:
        messages += [
            {"role": "assistant", "content": answer, **more},
            {"role": "user", "content": "and then?"},
        ]
    return {"conversations": messages[:-1]}


def some_rows(count, seed=0):
    draw = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "what", "is", "it", "answer"]

    def text():
        return " ".join(draw.choices(words, k=draw.randint(1, 30)))

    return [row(text(), *(text() for _ in range(draw.randint(1, 3)))) for _ in range(count)]


def write(path, rows):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.fixture
def build(tmp_path, models):
    """Runs the stage; parameters by name, `model` by kind, `out` for another output."""

    def build(model="qwen2", out="out", **parameters):
        values = {"chat_template": "qwen", "build_dataset_num_proc": 1, **parameters}
        output = str(tmp_path / out)
        return run(DatasetConfig(str(models[model]), output, Parameters(**values), tmp_path / f"work-{out}"))

    return build


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def report(tmp_path, out="out"):
    return json.loads((tmp_path / out / "report.json").read_text())


def test_counts_of_result_report_manifest_and_shards_agree(tmp_path, build, models):
    train = [*some_rows(120), b"not json", {"messages": []}, row("?", "the answer " * 200), b"", b"\xff"]
    validation = some_rows(30, seed=1)
    result = build(
        dataset_train_split=write(tmp_path / "train.jsonl", train),
        dataset_validation_split=write(tmp_path / "validation.jsonl.gz", validation),
        max_length=128, max_rejected_fraction=0.05,
    )  # fmt: skip
    folder = tmp_path / "out"
    assert (result.train.rows_in, result.train.rows_kept, result.train.rows_rejected) == (124, 121, 3)
    assert (result.validation.rows_in, result.validation.rows_rejected) == (30, 0)
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [tuple(record[name] for name in ("split", "file", "line", "reason")) for record in rejected] == [
        ("train", "train.jsonl", 121, "not JSON"),
        ("train", "train.jsonl", 122, "empty"),
        ("train", "train.jsonl", 125, "not UTF-8"),
    ]
    manifest = storage.read_manifest(str(folder), stage="dataset")
    told = report(tmp_path)
    counts = Counter()
    for name, summary in (("train", result.train), ("validation", result.validation)):
        split = Split(folder / name)
        rows = [split[index] for index in range(len(split))]
        assert summary.rows_kept == len(rows)
        assert summary.tokens == sum(len(row.input_ids) for row in rows) == split.lengths.sum()
        assert summary.supervised_tokens == sum(row.loss_mask.sum() for row in rows)
        assert summary.rows_truncated == told["splits"][name]["rows_truncated"]
        assert sum(bin["rows"] for bin in told["splits"][name]["length_histogram"]) == len(rows)
        assert sum(told["splits"][name]["assistant_turns"].values()) == len(rows)
        assert told["splits"][name]["length_quantiles"]["p100"] == split.lengths.max() <= 128
        assert manifest.properties["splits"][name]["tokens"] == summary.tokens
        if name == "train":
            assert summary.rows_truncated >= 1
            for row_ in rows:
                counts.update(row_.input_ids[row_.loss_mask].tolist())
    assert told["splits"]["train"]["rejected_reasons"] == {"empty": 1, "not JSON": 1, "not UTF-8": 1}
    assert told["splits"]["train"]["distinct_supervised_tokens"] == len(counts)
    tokenizer = load_tokenizer(models["qwen2"])
    first = Split(folder / "train")[0]
    assert len(told["samples"]) == 3
    assert "".join(text for text, _ in told["samples"][0]) == tokenizer.decode(first.input_ids)
    shown = "".join(text for text, supervised in told["samples"][0] if supervised)
    assert shown == tokenizer.decode(first.input_ids[first.loss_mask])


def test_the_draft_vocabulary_is_that_of_the_training_answers(tmp_path, build, models):
    config = tmp_path / "draft.json"
    train = write(tmp_path / "train.jsonl", some_rows(60))
    validation = write(tmp_path / "validation.jsonl", [row("?", "the zebra! 你好")])
    vocab_size = json.loads((models["qwen2"] / "config.json").read_text())["vocab_size"]
    config.write_text('{"draft_vocab_size": 40}')
    result = build(dataset_train_split=train, dataset_validation_split=validation, draft_model_config=str(config))
    t2d, d2t = load_vocabulary(tmp_path / "out")
    split = Split(tmp_path / "out" / "train")
    supervised = np.concatenate([split[i].input_ids[split[i].loss_mask] for i in range(len(split))])
    counts = Counter(supervised.tolist())
    ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))[:40]
    assert [index + offset for index, offset in enumerate(d2t.tolist())] == sorted(ranked)
    assert (t2d.shape, t2d.nonzero().flatten().tolist()) == ((vocab_size,), sorted(ranked))
    assert result.draft_vocab_size == 40
    covered = sum(counts[token] for token in ranked) / len(supervised)
    assert result.train.coverage == pytest.approx(covered, abs=1e-6)
    assert result.validation.coverage < 1


def test_the_same_inputs_give_the_same_bytes_on_any_number_of_processes(tmp_path, build, monkeypatch):
    monkeypatch.setattr(stage, "BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(stage, "PIECE_BYTES", 30_000)
    data = write(tmp_path / "train.jsonl", [*some_rows(400), b"no"])
    for out, processes in (("one", 1), ("again", 1), ("two", 2)):
        given = {"build_dataset_num_proc": processes, "max_length": 150, "max_rejected_fraction": 0.1}
        assert not build(out=out, dataset_train_split=data, **given).reused
    one = files(tmp_path / "one")
    shards = {name for name in one if name.endswith(".parquet")}
    assert len(shards) > 2
    assert one.keys() - shards == {"manifest.json", "rejected.jsonl", "report.json", "report.html",
                                   "vocabulary.safetensors", "train/shards.json"}  # fmt: skip
    assert one == files(tmp_path / "again") == files(tmp_path / "two")


def test_what_is_built_on_as_many_processes_as_there_are_cores_is_not_built_again(tmp_path, build, monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    caplog.set_level("INFO")
    given = {"dataset_train_split": write(tmp_path / "train.jsonl", some_rows(20))}
    first = build(**given, build_dataset_num_proc=96)
    (said,) = [text for record in caplog.records if "build_dataset_num_proc" in (text := record.getMessage())]
    assert "96 lowered to 1 (1 cores" in said
    assert first.draft_vocab_size == first.vocab_size < 32_000  # where no size is given
    assert first.validation is None
    assert not (tmp_path / "out" / "validation").exists()
    assert list(report(tmp_path)["splits"]) == ["train"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(stage, "Workers", None)  # nothing is tokenised
    again = build(**given, learning_rate=0.5, build_dataset_num_proc=2)
    assert again == replace(first, reused=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == written


def edit(name, old, new):
    def change(tmp_path, monkeypatch):
        path = tmp_path / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def change_a_library(tmp_path, monkeypatch):
    versions = stage.version
    monkeypatch.setattr(stage, "version", lambda name: versions(name) + (".1" if name == "transformers" else ""))


@pytest.mark.parametrize(
    ("change", "parameters"),
    [
        (lambda tmp_path, _: write(tmp_path / "train.jsonl", some_rows(19) + some_rows(1, seed=9)), {}),
        (edit("model/tokenizer_config.json", "<|im_end|>", "<|endoftext|>"), {}),  # another eos_token
        (edit("model/chat_template.jinja", "a helpful assistant", "an assistant"), {}),
        (edit("draft.json", "30", "31"), {}),
        (lambda _, monkeypatch: monkeypatch.setattr(stage, "FORMAT", stage.FORMAT + 1), {}),
        (change_a_library, {}),
        (None, {"max_length": 500}),
        (None, {"max_rejected_fraction": 0.5}),
        (None, {"dataset_validation_split": "train.jsonl"}),
        (None, {"learning_rate": 0.5}),
    ],
)
def test_a_change_of_anything_that_shapes_it_gives_another_fingerprint(
    tmp_path, models, monkeypatch, change, parameters
):
    model = tmp_path / "model"
    shutil.copytree(models["qwen2"], model)
    (tmp_path / "draft.json").write_text('{"draft_vocab_size": 30}')
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", some_rows(20))

    def fingerprint(**parameters):
        storage.publish(model, str(model), stage="import", properties={})
        of = {"dataset_train_split": "train.jsonl", "draft_model_config": "draft.json", "chat_template": "qwen"}
        given = Parameters(**of, build_dataset_num_proc=1, **parameters)
        return stage._read_inputs(DatasetConfig(str(model), "", given, tmp_path / "work")).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    if change:
        change(tmp_path, monkeypatch)
    assert (fingerprint(**parameters) == first) == ("learning_rate" in parameters)


def test_below_a_root_the_content_and_the_settings_say_where(tmp_path, models, monkeypatch):
    root, train = str(tmp_path / "root"), write(tmp_path / "train.jsonl", some_rows(20))

    def build(work="work", **parameters):
        given = Parameters(dataset_train_split=train, chat_template="qwen", build_dataset_num_proc=1, **parameters)
        return run(DatasetConfig(str(models["qwen2"]), "", given, tmp_path / work, root))

    first = build()
    assert first.uri == f"{root}/datasets/{first.fingerprint[:24]}"
    monkeypatch.setattr(stage, "Workers", None)
    assert build(learning_rate=0.5) == replace(first, reused=True)
    monkeypatch.undo()
    # What is half there is made again.
    storage.remove_manifest(first.uri)
    assert build() == first
    shard = next(file for file in storage.read_manifest(first.uri).files if file.path.endswith(".parquet"))
    whole = storage.read_bytes(f"{first.uri}/{shard.path}")
    storage.write_bytes(f"{first.uri}/{shard.path}", bytes([whole[0] ^ 1]) + whole[1:])
    assert build() == first
    assert storage.read_bytes(f"{first.uri}/{shard.path}") == whole
    storage.remove(first.uri)
    assert build() == first


@pytest.mark.parametrize("together", [True, False])
def test_two_runs_that_build_one_data_set_at_once_leave_it_whole(tmp_path, models, monkeypatch, together):
    train = write(tmp_path / "train.jsonl", some_rows(20))
    given = Parameters(dataset_train_split=train, chat_template="qwen", build_dataset_num_proc=1)
    describe, both, ended = stage._describe, threading.Barrier(2), threading.Event()

    def build(name):
        result = run(DatasetConfig(str(models["qwen2"]), "", given, tmp_path / name, str(tmp_path / "root")))
        ended.set()
        return result

    def wait(*arguments):  # until both have encoded, or until the other one has ended
        if both.wait(60) == 0 and not together:
            ended.wait(60)
        return describe(*arguments)

    monkeypatch.setattr(stage, "_describe", wait)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(build, ("one", "two")))
    assert replace(results[0], reused=False) == replace(results[1], reused=False)
    if not together:
        assert sorted(result.reused for result in results) == [False, True]
    folder = storage.fetch(results[0].uri, tmp_path / "fetched")
    assert len(Split(folder / "train")) == 20
    assert not (folder / "pieces").exists()


def test_a_family_that_knows_the_whole_vocabulary_gets_all_of_it(tmp_path, build, monkeypatch):
    whole = SimpleNamespace(default_shape=lambda config: SimpleNamespace(draft_vocab_size=config["vocab_size"]))
    monkeypatch.setattr(drafts, "family", lambda name: whole)
    result = build(dataset_train_split=write(tmp_path / "train.jsonl", some_rows(3)))
    assert result.draft_vocab_size == result.vocab_size
    assert result.train.coverage == 1
    assert load_vocabulary(tmp_path / "out")[1].abs().sum() == 0


def test_too_many_faulty_lines_stop_the_stage_with_the_first_ten_of_both_splits(tmp_path, build):
    bad = [b"bad"] * 12
    train = write(tmp_path / "train.jsonl", some_rows(88) + bad)
    validation = write(tmp_path / "validation.jsonl", [{"messages": [{"role": "user", "content": "a"}]}, *some_rows(9)])
    with pytest.raises(DraftModelError) as caught:
        build(dataset_train_split=train, dataset_validation_split=validation, max_rejected_fraction=0.05)
    first, second = caught.value.problems
    assert first.startswith(f"dataset_train_split: {train}: 12 of 100 lines cannot be used (12.0%")
    assert "max_rejected_fraction allows 5.0%" in first
    assert "line 89: not JSON" in first
    assert "line 98:" in first
    assert "line 99:" not in first
    assert second.startswith(f"dataset_validation_split: {validation}: 1 of 10 lines")
    assert "line 1: no assistant turn" in second
    assert not storage.exists(str(tmp_path / "out"))
    result = build(dataset_train_split=train, dataset_validation_split=validation, max_rejected_fraction=0.12)
    assert result.train.rows_rejected == 12


def test_the_mask_of_real_conversations_is_their_answers(tmp_path, build, models):
    examples = Path(__file__).parents[2] / "examples" / "smollm2" / "validation.jsonl.gz"
    result = build(model="smol-bare", dataset_train_split=str(examples), max_length=20_000)
    with gzip.open(examples, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert result.train.rows_kept == len(rows) > 50
    tokenizer = load_tokenizer(models["smol-bare"])
    split = Split(tmp_path / "out" / "train")
    for index, row_ in enumerate(rows):
        tokens = split[index]
        answers = [turn for turn in row_["conversations"] if turn["role"] == "assistant"]
        ends = ["" if turn.get("finish") == "length" else "<|im_end|>" for turn in answers]
        supervised = tokenizer.decode(tokens.input_ids[tokens.loss_mask])
        assert supervised == "".join(turn["content"] + end for turn, end in zip(answers, ends, strict=True))
    assert any(turn.get("finish") == "length" for row_ in rows for turn in row_["conversations"])


@pytest.mark.parametrize(
    ("rows", "parameters", "said"),
    [
        ([b""], {}, r"dataset_train_split: .*train\.jsonl: has no rows"),
        ([b"\xef\xbb\xbf  ", b"\r"], {}, r"dataset_train_split: .*train\.jsonl: has no rows"),
        ([b"a", b"b"], {"max_rejected_fraction": 1}, r"dataset_train_split: .* 2 of 2 lines .* one row must be left"),
        ([b"bad"], {"chat_template": "llama3"}, r"chat_template: given 'llama3'.*use qwen"),  # before any row is read
        *[([], {"draft_model_config": json.dumps({"draft_vocab_size": size})},
           r"draft_model_config: .* allowed: a whole number >= 1") for size in (0, -1, "many", True, 1.5)],
    ],
)  # fmt: skip
def test_what_cannot_be_built_of_is_refused_by_name(tmp_path, build, rows, parameters, said):
    if config := parameters.get("draft_model_config"):
        (tmp_path / "draft.json").write_text(config)
        parameters = {"draft_model_config": str(tmp_path / "draft.json")}
    with pytest.raises(DraftModelError, match=said):
        build(dataset_train_split=write(tmp_path / "train.jsonl", rows), **parameters)


def test_all_unusable_inputs_are_told_at_once(tmp_path, build):
    config = tmp_path / "draft.json"
    config.write_text('{"draft_vocab_size": 1000000}')
    absent, none = str(tmp_path / "absent.jsonl"), str(tmp_path / "*.jsonl")
    with pytest.raises(DraftModelError) as caught:
        build(dataset_train_split=absent, dataset_validation_split=none, draft_model_config=str(config))
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for said in ("dataset_train_split", "absent.jsonl", "dataset_validation_split",
                 "draft_model_config: `draft_vocab_size` is 1000000; allowed: a whole number >= 1"):  # fmt: skip
        assert said in told


def test_a_model_folder_of_another_stage_or_without_a_tokenizer_is_refused(tmp_path, models):
    model, train = tmp_path / "model", write(tmp_path / "train.jsonl", some_rows(2))
    model.mkdir()
    shutil.copy(models["qwen2"] / "config.json", model)
    config = DatasetConfig(str(model), str(tmp_path / "out"), Parameters(dataset_train_split=train), tmp_path / "w")
    for written_by, said in (("train", "output of the train stage"), ("import", "model: its tokenizer")):
        storage.publish(model, str(model), stage=written_by, properties={})
        with pytest.raises(DraftModelError, match=said):
            run(config)


@pytest.mark.parametrize("hostile", ["{{ 9 ** (messages[1].content | length * 10 ** 9) }}", "{{ 'x' * 10 ** 12 }}"])
def test_a_chat_template_that_never_ends_or_takes_all_memory_is_stopped_with_a_sentence(
    tmp_path, models, monkeypatch, hostile
):
    monkeypatch.setattr(workers, "LIMITS", workers.Limits(cpu=1))
    model = tmp_path / "model"
    shutil.copytree(models["qwen2"], model)
    with (model / "chat_template.jinja").open("a") as template:
        template.write(f"{{% if messages[-1].content == 'evil' %}}{hostile}{{% endif %}}")
    storage.publish(model, str(model), stage="import", properties={})
    given = Parameters(dataset_train_split=write(tmp_path / "a.jsonl", [row("?", "evil")]), chat_template="qwen")
    with pytest.raises(DraftModelError, match=r"chat template or tokenizer does not end: .* more than 1 s"):
        run(DatasetConfig(str(model), str(tmp_path / "out"), given, tmp_path / "work"))
    assert not storage.exists(str(tmp_path / "out"))


def test_a_process_that_is_killed_is_told_and_what_to_do():
    with workers.Workers(2) as pool, pytest.raises(DraftModelError, match=r"one of 2 processes .* memory is short: lo"):
        list(pool.map(os._exit, [(None, (9,))] * 4))


def test_everything_may_lie_in_an_object_store(tmp_path, models, object_store):
    root = f"s3://{object_store.bucket}/dataset-test"
    storage.publish(models["llama3"], f"{root}/model", stage="import", properties={})
    for split, rows in (("train", some_rows(40)), ("validation", some_rows(9, seed=1))):
        storage.write_bytes(f"{root}/{split}.jsonl", (tmp_path / write(tmp_path / split, rows)).read_bytes())
    storage.write_bytes(f"{root}/draft.json", b'{"draft_vocab_size": 64}')
    alias = root.replace("s3://", "minio://")
    parameters = Parameters(
        dataset_train_split=f"{root}/train.jsonl", dataset_validation_split=f"{alias}/validation.jsonl",
        draft_model_config=f"{root}/draft.json", chat_template="llama3", build_dataset_num_proc=1,
    )  # fmt: skip
    config = DatasetConfig(f"{alias}/model", f"{root}/out", parameters, tmp_path / "work")
    results = [run(config), run(config)]
    assert [result.reused for result in results] == [False, True]
    assert results[0].train == results[1].train
    folder = storage.fetch(f"{root}/out", tmp_path / "fetched")
    assert len(Split(folder / "train")) == results[0].train.rows_kept == 40
    assert len(Split(folder / "validation")) == 9
    assert load_vocabulary(folder)[1].shape == (64,)


HOSTILE = "<script>alert(1)</script> &amp; \"quote\" '</mark>' <img src=x onerror=y>"


def test_the_report_shows_three_conversations_coloured_and_runs_no_markup_of_the_data(tmp_path, build):
    rows = [row(f"{HOSTILE} {n}", f"answer {n} {HOSTILE}") for n in range(5)]
    name = "<b>x</b>.jsonl"
    bad = json.dumps({"messages": [{"role": HOSTILE, "content": "a"}]}).encode()
    build(dataset_train_split=write(tmp_path / name.replace("/", ""), [*rows, bad]), max_rejected_fraction=0.5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"<(script|img|b)\b|</mark>' <", page)
    shown = re.findall("<pre>(.*?)</pre>", page, re.DOTALL)
    assert len(shown) == 3
    for number, conversation in enumerate(shown):
        marked = "".join(re.findall("<mark>(.*?)</mark>", conversation, re.DOTALL))
        assert unescape(marked) == f"answer {number} {HOSTILE}<|im_end|>"
        assert f"{HOSTILE} {number}<|im_end|>" in unescape(conversation)
    text = " ".join(unescape(re.sub("<[^>]*>", " ", page)).split())
    for told in (
        "rows in 6", "kept 5", "rejected 1", "unknown role", "1 5", "100.00%", "<b>x<b>.jsonl", "Lengths in tokens",
        "Assistant turns", "cut to the longest length 0", "Draft vocabulary by size",
    ):  # fmt: skip
        assert told in text


def test_a_line_of_20_megabytes_is_cut_without_tokenising_it_all(tmp_path, build, models, monkeypatch):
    monkeypatch.setattr(workers, "LIMITS", workers.Limits(cpu=4))  # of CPU time; to tokenise all of it takes 12
    answer = "the quick brown fox " * 1_000_000  # 20 MB
    data = write(tmp_path / "train.jsonl", [row("?", answer), row("a", "b")])
    result = build(dataset_train_split=data, max_length=64)
    assert (result.train.rows_kept, result.train.rows_truncated) == (2, 1)
    tokenizer = load_tokenizer(models["qwen2"])
    prompt = "<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
    text = f"{prompt}<|im_start|>assistant\n{answer[:4000]}"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert Split(tmp_path / "out" / "train")[0].input_ids.tolist() == whole[:64]


def test_where_tokens_are_long_more_of_the_text_is_looked_at(tmp_path, build):
    answer = " ".join(["quick brown"] * 3000)
    lengths = set()
    for limit, cut in ((2000, 1), (20_000, 0)):
        data = write(tmp_path / "a.jsonl", [row("?", answer)])
        result = build(dataset_train_split=data, max_length=limit, out=str(limit))
        assert result.train.rows_truncated == cut
        lengths.add(result.train.tokens)
    assert 2000 in lengths
    assert max(lengths) > 2000
