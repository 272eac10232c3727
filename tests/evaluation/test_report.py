"""The report and the card: nothing from outside, nothing unescaped, and the numbers that went in."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from report_inputs import POSITIONS, Json, log_entry, make_dataset, make_training

from draft_model.evaluation import plots
from draft_model.evaluation.report import findings
from draft_model.parameters import PARAMETERS

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x.png">&"\'|`'


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.marked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if "mark" in self.open:
            self.marked.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _nothing_unknown(page: str) -> None:
    assert not re.search(r"\b(nan|none|null|inf)\b", Page(page).text.replace("default-src 'none'", ""), re.IGNORECASE)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_the_report_is_one_small_file_that_asks_nothing_of_the_network(report, training, evaluation, dataset):
    html = report(training, evaluation, dataset)
    assert len(html.encode()) < 1_000_000
    page = Page(html)
    assert not page.open, "every element is closed"
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
    outward = {"src", "href", "xlink:href", "srcset", "data", "action"}
    references = [value for _, attributes in page.elements for name, value in attributes.items() if name in outward]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "no id is there twice"
    assert {value for value in references if value != "data:,"} <= {f"#{name}" for name in ids}
    assert not re.search(r"@import|url\((?!#)", html)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_first_screen_says_what_the_draft_saves(report, training, evaluation, dataset):
    text = Page(report(training, evaluation, dataset)).text
    first = text[: text.index("To check The") if "To check The" in text else 2500]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in first
    assert "1,577 conversations" in first
    assert "Conversations trained on 1,577" in first
    assert f"{dataset['splits']['train']['tokens']:,} tokens" in first
    assert "1.91" in first
    assert "1.03 before training" in first
    assert "52.3" in first, "passes for 100 tokens: 100 / 1.9137"
    assert "48 % fewer" in first
    assert "Yes, lossless 9,631 tokens compared with the target's own over 40 prompts; 1 tie" in first
    assert "claims no speed-up" in first


def test_every_measured_number_is_shown(report, training, evaluation, dataset):
    text = Page(report(training, evaluation, dataset)).text
    for side in ("trained", "untrained"):
        counts = evaluation[side]
        assert f"{counts['acceptance_length']:.3f}" in text
        for key in ("rounds", "drafted", "accepted", "tokens"):
            assert f"{counts[key]:,}" in text
    for share in [*evaluation["trained"]["acceptance_by_position"], *training["validation"][-1]["alpha"]]:
        assert f"{100 * share:.1f} %" in text
    for loss in training["validation"][-1]["loss"]:
        assert f"{loss:.3f}" in text
    for counts in dataset["splits"].values():
        whole = {key: value for key, value in counts.items() if isinstance(value, int)}
        assert len(whole) == 7
        for number in [*whole.values(), *_numbers(counts["length_quantiles"])]:
            assert f"{number:,}" in text
        assert f"{100 * counts['coverage']:.2f} %" in text
    for reason, rows in dataset["splits"]["train"]["rejected_reasons"].items():
        assert f"{reason} {rows}" in text
    assert all(version in text for version in training["versions"].values())


def test_categories_depths_other_ways_and_times_are_shown(report, training, evaluation, dataset):
    text = Page(report(training, evaluation, dataset)).text
    assert "first reply (30 prompts) 1,900 1.931" in text
    assert "0 to 15 320 2.104" in text
    assert "128 or more 2,206 1.886" in text
    assert "tree 3,2, greedy 9 2.235 75.0 %, 48.4 %" in text
    hardware = evaluation["hardware"]
    assert f"Time, on {hardware} Target alone: 101.3 tokens per second; with the draft: 137.8, 1.36 times" in text
    assert "1 at a time is the fastest for one request on this hardware" in text
    assert "1 1.910 1.960 1.04 1.41" in text
    evaluation["prediction"]["recommended"] = 0
    assert "None : on this hardware no number" in Page(report(training, evaluation, dataset)).text


def test_every_parameter_is_listed_and_additions_are_marked(report, training, evaluation, dataset):
    del training["parameters"]["storage_uri"]
    text = Page(report(training, evaluation, dataset)).text.replace(" .", ".").replace(" ,", ",").replace(" ;", ";")
    for parameter in PARAMETERS:
        help_text = parameter.help.replace("`", "")
        assert f"{parameter.name} {'addition ' if parameter.addition else ''}{help_text}" in text
        value = training["parameters"].get(parameter.name)
        unit = parameter.unit if value != 1 else parameter.unit.removesuffix("s")
        expected = "not recorded" if value is None else f"{value} {unit}".strip() if value else "not given"
        if value != 0:
            assert f"{help_text} {expected}" in text


def test_hashes_are_shown_and_a_missing_one_is_said(report, training, evaluation, dataset):
    hashes = [{"of": "draft", "uri": "s3://b/final", "sha256": "ab" * 32}, {"of": "target", "uri": "x", "sha256": ""}]
    text = Page(report(training, evaluation, dataset, hashes)).text
    assert f"draft s3://b/final {'ab' * 32} target x not recorded" in text
    assert "Hashes" not in Page(report(training, evaluation, dataset)).text


def test_the_charts_name_the_numbers_that_were_drawn(training, evaluation):
    charts = plots.training_charts(training["log"], training["validation"], clip=0.5, measured=1.9)
    labels = {chart.title.split(" (")[0]: Page(str(chart.svg)).text for chart in charts}
    assert "0.0005" in labels["Learning rate"]
    assert "40 %" in labels["Conditional acceptance by draft position"]
    assert "%" not in labels["Acceptance length"]
    assert "2.0" in labels["Acceptance length"]
    speed = plots.speed_chart(evaluation["prediction"]["by_proposals"], "a CPU")
    assert "on a CPU" in speed.note
    assert "0.0 0.5 1.0" in Page(str(speed.svg)).text
    assert labels["Tokens per second"].endswith("optimizer step 0 200 400")
    bars = plots.acceptance_charts(evaluation["trained"], evaluation["untrained"], None)[0]
    assert all(f"{100 * share:.0f} %" in Page(str(bars.svg)).text for share in (0.5412, 0.2613, 0.1112, 0.0264))


def test_supervised_and_drafted_tokens_are_the_coloured_ones(report, training, evaluation, dataset):
    marked = "".join(Page(report(training, evaluation, dataset)).marked)
    drafted = "".join(text for text, mark in evaluation["sample"]["reply"] if mark)
    supervised = "".join(text for text, mark in dataset["samples"][0] if mark)
    assert marked == drafted + supervised


def test_markup_in_the_data_is_shown_and_not_run(report, card, training, evaluation, dataset):
    plain = {tag for tag, _ in Page(report(training, evaluation, dataset)).elements} - {"wbr"}
    training["target"]["source"] = training["hardware"] = training["draft"]["model_type"] = HOSTILE
    training["parameters"] |= {"huggingface_id": "", "pytorch_model_path": HOSTILE}
    training["versions"][HOSTILE] = HOSTILE
    evaluation["sample"] = {"prompt": HOSTILE, "reply": [[HOSTILE, True], [HOSTILE, False]]}
    dataset["samples"][0] = [[HOSTILE, True], [HOSTILE, False]]
    dataset["splits"]["train"]["rejected_reasons"] = {HOSTILE: 3}
    html = report(training, evaluation, dataset)
    assert {tag for tag, _ in Page(html).elements} == plain
    assert Page(html).text.count(HOSTILE) >= 9
    markdown = card(training, evaluation, dataset, name=f"{HOSTILE}\n# heading")
    assert not re.search(r"(?<!\\)<(script|img)", markdown)
    assert markdown.count("\n# ") == 1


def test_same_inputs_give_the_same_bytes(report, card, training, evaluation, dataset):
    again = copy.deepcopy((training, evaluation, dataset))
    assert report(training, evaluation, dataset) == report(*again)
    assert card(training, evaluation, dataset) == card(*again)
    assert (training, evaluation, dataset) == again, "the inputs are left as they were"


def test_without_validation_data_nothing_is_claimed(report, card, training):
    training["validation"] = []
    training["parameters"]["dataset_validation_split"] = ""
    dataset = make_dataset(validation=False)
    html = report(training, None, dataset)
    text = Page(html).text
    assert "not measured" in text
    assert "No validation data" in text
    assert "Simulated on the training conversations" in text
    assert "lossless" not in text
    _nothing_unknown(html)
    assert "Not measured" in card(training, None, dataset)


def test_validation_without_decoding_is_simulated_only(report, training, dataset):
    text = Page(report(training, None, dataset)).text
    assert f"Simulated on the validation conversations: {training['validation'][-1]['acceptance_length']:.2f}" in text
    assert "The draft was not decoded with" in text


def test_a_run_too_short_for_a_log_line_has_a_report(report, training, evaluation, dataset):
    training["log"], training["validation"] = [], []
    html = report(training, evaluation, dataset)
    assert "no log line" in html
    _nothing_unknown(html)
    training["log"] = make_training()["log"][:1]
    report(training, None, dataset)


def test_what_is_not_a_number_is_a_dash_and_a_finding(report, card, training, evaluation, dataset):
    for entry in training["log"][-5:]:
        entry["loss"] = [math.nan] * POSITIONS
        entry["grad_norm"] = math.inf
        entry["acceptance_length"] = None
    training["validation"][-1] |= {"loss": [math.nan] * POSITIONS, "agreement": [None] * POSITIONS}
    html = report(training, evaluation, dataset)
    _nothing_unknown(html)
    assert "not a finite number in 5 of 79 log lines" in html
    assert not re.search(r"\bnan\b", html)
    assert not re.search(r"\b(nan|None)\b", card(training, evaluation, dataset))


def _titles(training: Json, evaluation: Json | None, dataset: Json) -> str:
    return "\n".join(finding.title for finding in findings(training, evaluation, dataset))


def test_a_sound_run_has_nothing_to_check(report, training, evaluation):
    dataset = make_dataset()
    for counts in dataset["splits"].values():
        counts |= {"rows_rejected": 0, "rows_truncated": 0, "coverage": 0.99}
    assert findings(training, evaluation, dataset) == []
    assert "To check Nothing" in Page(report(training, evaluation, dataset)).text


def test_findings_name_what_is_out_of_bounds(training, evaluation, dataset):
    dataset["splits"]["validation"]["coverage"] = 0.9312
    dataset["splits"]["train"] |= {
        "rows_kept": 1000,
        "rows_truncated": 51,
        "rows_rejected": 3,
        "rows_in": 1003,
    }
    training["parameters"]["num_speculative_tokens"] = 9
    evaluation["predicted_acceptance_length"] = 2.2
    evaluation["lossless"]["identical"] = False
    titles = _titles(training, evaluation, dataset)
    assert titles.startswith("Replies with the draft differ")
    assert "has 93.1 % of the validation replies' tokens" in titles
    assert "5.1 % of the training conversations were cut at 512 tokens" in titles
    assert "3 of 1,003 training lines were rejected" in titles
    assert "9 tokens are drafted at a time, but training went through 7" in titles
    assert "predicts an acceptance length of 2.20, measured: 1.91" in titles
    evaluation["trained"]["acceptance_length"] = 1.02
    assert "Training did not help" in _titles(training, evaluation, dataset)


def test_long_runs_and_long_samples_stay_small(report, training, evaluation, dataset):
    training["log"] = [
        log_entry(step, 0.05 * math.sin(step)) | training["log"][0] | {"step": step} for step in range(5000)
    ]
    dataset["samples"][0] = [[" word", True], [" other", False]] * 50_000
    evaluation["sample"]["reply"] = [[" word", i % 2 == 0] for i in range(50_000)]
    evaluation["lossless"]["ties"] *= 500
    html = report(training, evaluation, dataset)
    assert len(html.encode()) < 1_000_000
    assert "Each point is the mean of 25 log lines" in html
    assert "The first 10 of 500" in html


def test_many_draft_positions_are_drawn(report, training, evaluation, dataset):
    for side in ("trained", "untrained"):
        shares = [0.9**i for i in range(1, 17)]
        evaluation[side] |= {"acceptance_by_position": shares, "conditional_acceptance_by_position": shares}
    text = Page(report(training, evaluation, dataset)).text
    assert f"16 {90 * 0.9**15:.1f} % " in text
