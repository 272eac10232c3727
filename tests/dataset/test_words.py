"""Words that are looked up have the ids that the tokenizer gives them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.dataset import words
from draft_model.dataset.encode import load_tokenizer
from draft_model.dataset.words import WordTokenizer

from .conftest import KINDS

FAMILIES = ["qwen3", "smol-bare", "llama3", "gpt-oss", "deepseek"]
pieces = st.sampled_from(
    [
        *(
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "\x0b",
            "\x1c",
            "a",
            "B",
            "the",
            "Fox",
            "HTTP",
            "1",
            "2345",
            "'s",
            "'LL",
            "'",
            ".",
        ),
        *("!?", "/", "<", "|>", "_", "\x00", "\x7f", "é", "…", "你", "\u2028", "<|im_end|>", "<think>", "<|eot_id|>"),
        *("<｜User｜>", "<|end|>"),
    ]
)


@pytest.fixture(scope="module")
def tokenizers(models):
    return {kind: load_tokenizer(models[kind]).backend_tokenizer for kind in FAMILIES}


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=150)
@given(
    texts=st.lists(
        st.lists(pieces, max_size=12).map("".join) | st.text(st.characters(max_codepoint=127), max_size=20), max_size=5
    )
)
def test_ids_are_the_tokenizers_own(tokenizers, kind, texts):
    tokenizer = tokenizers[kind]
    fast = WordTokenizer(tokenizer)
    assert fast.remembers, "else this test shows nothing"
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert fast.encode(texts) == expected
    assert fast.encode(texts) == expected, "from memory"


def test_what_is_remembered_is_bounded(tokenizers, monkeypatch):
    monkeypatch.setattr(words, "REMEMBERED", 300)
    fast = WordTokenizer(tokenizers["qwen3"])
    texts = [f"word{number} x{number}" for number in range(400)]
    for text in texts:
        assert fast.encode([text]) == [tokenizers["qwen3"].encode(text, add_special_tokens=False).ids]
        assert len(fast._known) <= 300


def test_a_tokenizer_of_another_structure_is_asked_itself(tokenizers):
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    changes = {
        "normalizer": normalizers.Lowercase(),
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }
    gaps = [pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    text = ["The FOX, 42 times!"]
    for name, change in [*changes.items(), ("pre_tokenizer", pre_tokenizers.Sequence(gaps))]:
        other = Tokenizer.from_str(tokenizers["smol-bare"].to_str())
        setattr(other, name, change)
        fast = WordTokenizer(other)
        assert not fast.remembers
        assert fast.encode(text) == [other.encode(text[0], add_special_tokens=False).ids]


def test_every_kind_of_the_four_templates_is_known(models):
    assert all(WordTokenizer(load_tokenizer(models[kind]).backend_tokenizer).remembers for kind in KINDS)
