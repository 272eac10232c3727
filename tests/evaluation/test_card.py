"""The model card: a header that the Hub reads, the measured numbers, and commands that engines take."""

from __future__ import annotations

import json
import re
import subprocess

import yaml
from huggingface_hub import ModelCard
from report_inputs import Json


def _header(markdown: str) -> Json:
    _, header, _ = markdown.split("---\n", 2)
    loaded: Json = yaml.safe_load(header)
    return loaded


def commands_of(markdown: str) -> list[list[str]]:
    """The words of each command as a shell reads them."""
    blocks = re.findall(r"```bash\n(.*?)```", markdown, re.DOTALL)
    shell = [
        subprocess.run(["sh", "-c", f"printf '%s\\n' {block}"], capture_output=True, text=True, check=True)
        for block in blocks
    ]
    return [done.stdout.splitlines() for done in shell]


def test_the_card_has_a_header_for_the_hub(card, training, evaluation, dataset):
    assert _header(card(training, evaluation, dataset)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["eagle3", "speculative-decoding"],
    }
    training["target"]["licence"] = "apache-2.0"
    assert _header(card(training, evaluation, dataset))["license"] == "apache-2.0"


def test_the_hubs_own_code_reads_the_card(card, training, evaluation, dataset):
    training["target"]["licence"] = "apache-2.0"
    data = ModelCard(card(training, evaluation, dataset)).data
    assert (data.base_model, data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")


def test_the_card_says_the_measured_numbers(card, training, evaluation, dataset):
    markdown = card(training, evaluation, dataset)
    assert "| Tokens per target pass (mean acceptance length) | 1.91 | 1.03 | 1.00 |" in markdown
    assert "| Target passes per token | 0.52 | 0.97 | 1.00 |" in markdown
    assert "9,631 tokens over 40 prompts were compared, with 1 place" in markdown
    assert "No speed-up is claimed" in markdown
    evaluation["lossless"]["identical"] = False
    assert "**The replies differ" in card(training, evaluation, dataset)


def test_the_card_serves_with_both_engines(card, training, evaluation, dataset):
    vllm, sglang = commands_of(card(training, evaluation, dataset))
    assert vllm[:3] == ["vllm", "serve", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert vllm[3:5] == ["--revision", "12fd25f"]
    assert json.loads(vllm[vllm.index("--speculative-config") + 1]) == {
        "method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": 3,
    }  # fmt: skip
    options = dict(zip(sglang[3::2], sglang[4::2], strict=True))
    assert options == {
        "--model-path": "HuggingFaceTB/SmolLM2-135M-Instruct", "--revision": "12fd25f",
        "--speculative-algorithm": "EAGLE3", "--speculative-draft-model-path": "THIS_FOLDER",
        "--speculative-num-steps": "3", "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "4",
    }  # fmt: skip


def test_a_target_that_is_no_hub_model_is_left_to_the_reader(card, training, evaluation, dataset):
    training["parameters"] |= {"huggingface_id": "", "pytorch_model_path": "s3://models/my target"}
    training["target"]["source"] = "s3://models/my target"
    markdown = card(training, evaluation, dataset)
    assert "base_model" not in _header(markdown)
    assert "`TARGET` is the path of the target model, which was imported from s3://models/my target." in markdown
    vllm, _ = commands_of(markdown)
    assert vllm[:4] == ["vllm", "serve", "TARGET", "--speculative-config"]
