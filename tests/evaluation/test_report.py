"""The report and the card: nothing from outside, nothing unescaped, and the numbers that went in."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser

import pytest
from report_inputs import POSITIONS, log_entry, make_dataset, make_report

from draft_model.evaluation.report import findings, write_report
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
        if tag not in {"meta", "link", "br", "img"}:
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


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report of the inputs as they are."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_report())
    return path.read_text(encoding="utf-8")


def _nothing_unknown(page: str) -> None:
    assert not re.search(r"\b(nan|none|null|inf)\b", Page(page).text.replace("default-src 'none'", ""), re.IGNORECASE)


def test_the_report_is_one_small_file_that_asks_nothing_of_the_network(page):
    html = page
    assert len(html.encode()) < 1_000_000
    page = Page(html)
    assert not page.open, "every element is closed"
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form", "video", "audio"}
    outward = {"src", "href", "xlink:href", "srcset", "data", "action"}
    references = {value for _, attributes in page.elements for name, value in attributes.items() if name in outward}
    assert {value for value in references if not value.startswith("data:")} == {"#findings"}
    assert sum(value.startswith("data:image/svg+xml") for value in references) == 5
    assert not re.search(r"@import|url\((?!#)", html)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_report_says_what_is_usual_and_what_the_best_checkpoint_would_have_given(
    page, report, training, evaluation, dataset
):
    text = Page(page).text
    assert re.search(r"Usual acceptance length: 1\.\d to 2\.\d with 3 proposals after 1\.\d M supervised tokens", text)
    told = "best at step 594, epoch 3, with a simulated acceptance length of 1.950 against 1.910"
    assert told in text
    training["best"] = {"step": 792, "epoch": 4, "acceptance_length": 1.91}
    assert "would have served" not in Page(report(training, evaluation, dataset)).text


def test_the_first_screen_says_what_the_draft_saves(page):
    text = Page(page).text
    first = text[: text.index("Measurement")]
    for expected in (
        "HuggingFaceTB/SmolLM2-135M-Instruct", "1,577 conversations", "1.91 acceptance length; 1.03 before training",
        "Yes, lossless 9,631 tokens compared with the target's own over 40 prompts; 1 ties",
        "1.36× at 1 1.18× at 4 vLLM 0.32.0, float32", "num_speculative_tokens = 3 is the fastest",
        "2 26.1% 0.1% 48.3%", "first reply 30 1,900 1.931",
    ):  # fmt: skip
        assert expected in first


def test_every_measured_number_is_shown(report, training, evaluation, dataset):
    evaluation["sampled"] = {**evaluation["trained"], "acceptance_length": 1.777, "temperature": 0.7}
    hashes = [{"of": "draft", "uri": "s3://b/final", "sha256": "ab" * 32}, {"of": "target", "uri": "x", "sha256": ""}]
    text = Page(report(training, evaluation, dataset, hashes)).text
    assert f"draft s3://b/final {'ab' * 32} SHA-256 of the target x not recorded" in text
    for side in ("trained", "untrained"):
        assert f"{evaluation[side]['acceptance_length']:.3f}" in text
        assert all(f"{evaluation[side][key]:,}" in text for key in ("rounds", "drafted", "accepted"))
    assert "sampled at temperature 0.7 1.777" in text
    for counts in dataset["splits"].values():
        assert f"{100 * counts['coverage']:.2f}%" in text
        assert f"{counts['supervised_tokens']:,}" in text
    for parameter in PARAMETERS:
        assert f"{parameter.name} {'addition ' if parameter.addition else ''}" in text
    assert all(version in text for version in training["versions"].values())


def test_supervised_and_drafted_tokens_are_the_coloured_ones(page, evaluation, dataset):
    marked = "".join(Page(page).marked).replace("coloured", "")
    drafted = "".join(text for text, mark in evaluation["sample"]["reply"] if mark)
    assert marked == drafted + "".join(text for text, mark in dataset["samples"][0] if mark)


def test_markup_in_the_data_is_shown_and_not_run(page, report, card, training, evaluation, dataset):
    plain = {tag for tag, _ in Page(page).elements}
    training["target"]["source"] = training["hardware"] = training["draft"]["model_type"] = HOSTILE
    training["parameters"] |= {"huggingface_id": "", "pytorch_model_path": HOSTILE}
    training["versions"][HOSTILE] = evaluation["engine"] = evaluation["by_category"][0]["category"] = HOSTILE
    evaluation["sample"] = {"prompt": HOSTILE, "reply": [[HOSTILE, True], [HOSTILE, False]]}
    dataset["samples"][0] = [[HOSTILE, True], [HOSTILE, False]]
    html = report(training, evaluation, dataset)
    assert {tag for tag, _ in Page(html).elements} == plain
    assert Page(html).text.count(HOSTILE) >= 9
    assert 'src="http' not in html
    markdown = card(training, evaluation, dataset, name=f"{HOSTILE}\n# heading")
    assert not re.search(r"(?<!\\)<(script|img)", markdown)
    assert markdown.count("\n# ") == 1


def test_same_inputs_give_the_same_bytes(page, report, card, training, evaluation, dataset):
    again = copy.deepcopy((training, evaluation, dataset))
    # The fixture's page has an empty reason, which is shown only where nothing was measured.
    assert report(training, evaluation, dataset) == page
    assert card(training, evaluation, dataset) == card(*again)
    assert (training, evaluation, dataset) == again, "the inputs are left as they were"


@pytest.mark.parametrize("entries", [0, 1, 79])
def test_without_a_measurement_nothing_is_claimed(report, card, training, entries):
    training["validation"] = []
    training["log"] = training["log"][:entries]
    dataset = make_dataset(validation=False)
    html = report(training, None, dataset)
    text = Page(html).text
    assert "not measured no prompts" in text
    assert ("simulated in training" in text) == (entries > 0)
    assert ("wrote no log line" in text) == (entries == 0)
    assert "lossless" not in text
    _nothing_unknown(html)
    assert "Not measured" in card(training, None, dataset)


def test_what_is_not_a_number_is_a_dash_and_a_finding(report, training, evaluation, dataset):
    for entry in training["log"][-5:]:
        entry |= {"loss": [math.nan] * POSITIONS, "acceptance_length": None}
    training["validation"][-1] |= {"loss": [math.nan] * POSITIONS, "agreement": [None] * POSITIONS}
    evaluation["predicted_acceptance_length"] = evaluation["untrained"] = None
    html = report(training, evaluation, dataset)
    _nothing_unknown(html)
    assert "not a finite number in 5 of 79 log lines" in html


def test_a_sound_run_has_nothing_to_check(report, training, evaluation, dataset):
    for counts in dataset["splits"].values():
        counts |= {"rows_rejected": 0, "rows_truncated": 0, "coverage": 0.99}
    evaluation["predicted_acceptance_length"] = 1.95
    assert list(findings(training, evaluation, dataset)) == []
    assert "To check Nothing" in Page(report(training, evaluation, dataset)).text
    evaluation |= {"predicted_acceptance_length": 2.2, "prompts_source": "prompts.jsonl"}  # of another kind
    assert list(findings(training, evaluation, dataset)) == []


def test_findings_name_what_is_out_of_bounds(training, evaluation, dataset):
    dataset["splits"]["validation"]["coverage"] = 0.9312
    dataset["splits"]["train"] |= {"rows_kept": 1000, "rows_truncated": 51, "rows_rejected": 3, "rows_in": 1003}
    training["parameters"]["num_speculative_tokens"] = 9
    evaluation["predicted_acceptance_length"] = 2.2
    evaluation["lossless"]["identical"] = False
    evaluation["trained"]["acceptance_length"] = 1.02
    titles = [title for title, _ in findings(training, evaluation, dataset)]
    assert titles[0].startswith("Replies with the draft differ")
    for expected in (
        "Training did not help", "covers 93.1% of the validation split", "5.1% of the train split's conversations were",
        "3 of 1,003 lines of the train split", "9 tokens are proposed at a time, but training unrolled 7",
        "predicts an acceptance length of 2.20, measured: 1.02",
    ):  # fmt: skip
        assert any(expected in title for title in titles), expected


def test_long_runs_and_long_samples_stay_small(report, training, evaluation, dataset):
    training["log"] = [
        log_entry(step, 0.05 * math.sin(step)) | training["log"][0] | {"step": step} for step in range(5000)
    ]
    dataset["samples"][0] = [[" word", True], [" other", False]] * 50_000
    evaluation["sample"]["reply"] = [[" word", i % 2 == 0] for i in range(50_000)]
    evaluation["lossless"]["ties"] *= 500
    html = report(training, evaluation, dataset)
    assert len(html.encode()) < 1_000_000
    assert "the first 10 of 500" in html
