"""The demo's parameters are valid, and its data is what its README says."""

import gzip
import json
from pathlib import Path

import yaml

from draft_model.parameters.rules import problems_with

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "smollm2"


def conversations(split):
    with gzip.open(DEMO / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["conversations"] for line in file]


def test_the_demo_validates_on_questions_it_does_not_train_on():
    asked = {rows[0]["content"] for rows in conversations("train")}
    assert asked
    assert not asked & {rows[0]["content"] for rows in conversations("validation")}


def test_the_demo_decodes_validation_prompts_and_code_that_it_does_not_train_on():
    lines = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    validation = [line["conversations"] for line in lines if line["category"] == "validation"]
    code = [line["prompt"] for line in lines if line["category"] == "code"]
    assert (len(validation), len(code)) == (40, 12) == (len(validation), len(lines) - 40)
    for prompt, whole in zip(validation, conversations("validation"), strict=False):
        assert [turn["content"] for turn in prompt] == [turn["content"] for turn in whole[:-1]]
    assert not {*code} & {rows[0]["content"] for rows in conversations("train")}


def test_the_demos_data_is_small_and_counted_in_its_readme():
    text = (DEMO / "README.md").read_text(encoding="utf-8")
    for split in ("train", "validation"):
        assert f"| `{split}.jsonl.gz` | {len(conversations(split)):,} |" in text
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 2_000_000


def test_the_demos_parameters_are_valid_and_name_files_that_are_there():
    values = yaml.safe_load((DEMO / "run.yaml").read_text(encoding="utf-8"))
    assert problems_with(values) == []
    for name in ("dataset_train_split", "dataset_validation_split", "draft_model_config", "evaluation_prompts"):
        assert (ROOT / values[name]).exists()
