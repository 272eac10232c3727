"""The contract's names, types, defaults and limits; a refusal names everything at once and is never a traceback."""

import json
import pickle

import pytest
from contract import CONTRACT, KINDS
from hypothesis import given
from hypothesis import strategies as st

from draft_model.errors import DraftModelError, Problem, named_parameters
from draft_model.parameters import PARAMETERS, REMOVED, STAGES, Parameters
from draft_model.parameters.rules import problems_with

GIVEN = {"huggingface_id": "org/name", "dataset_train_split": "train.jsonl"}
NAMES = [name for name, *_ in CONTRACT]
LIMITS = {name: allowed for name, _, _, allowed in CONTRACT if isinstance(allowed, str)}
REFUSED = {">= 1": (0, 1), ">= 16": (15, 16), "> 0": (0.0, 1e-9), "0..1": (1.0001, 1.0)}
"""For each limit a value that is just outside, and one that is just inside."""


def problems(**values):
    return problems_with({**GIVEN, **values})


def only(**values):
    found = problems(**values)
    assert len(found) == 1, found
    return found[0]


def test_the_contract_comes_first_in_its_order_with_its_types_and_defaults():
    found = [(p.name, p.type, p.default) for p in PARAMETERS[:35]]
    assert found == [(name, kind, default) for name, kind, default, _ in CONTRACT]
    assert [type(p.default) for p in PARAMETERS[:35]] == [kind for _, kind, _, _ in CONTRACT]
    plain = {str: "string", int: "integer", float: "number"}
    words = {name: allowed for name, _, _, allowed in CONTRACT if isinstance(allowed, tuple)}
    assert {p.name: p.choices for p in PARAMETERS[:35] if p.choices} == words
    assert [p.kind for p in PARAMETERS[:35]] == [KINDS.get(name, plain[kind]) for name, kind, *_ in CONTRACT]


def test_each_parameter_has_a_sentence_and_is_read_by_a_stage():
    assert all(p.help.strip() for p in PARAMETERS)
    assert all(p.stages for p in PARAMETERS if p.name != "storage_uri")  # every step's
    assert len(PARAMETERS) - 35 < 42


def test_defaults_and_what_must_be_given_are_enough():
    parameters = Parameters(**GIVEN)
    assert {name: getattr(parameters, name) for name in NAMES if name not in GIVEN} == {
        name: default for name, _, default, _ in CONTRACT if name not in GIVEN
    }


@pytest.mark.parametrize(("name", "limit"), [(n, limit) for n, limit in LIMITS.items() if limit in REFUSED])
def test_limits(name, limit):
    outside, inside = REFUSED[limit]
    if name == "total_steps":
        outside = -1  # 0: not given
    sentence = next(problem for problem in problems(**{name: outside}) if problem.startswith(f"{name}:"))
    assert repr(outside) in sentence
    assert limit in sentence
    # Whether it fits the other parameters is another question.
    assert not any(f"{name}: given {inside!r}; allowed" in problem for problem in problems(**{name: inside}))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name, kind, *_ in CONTRACT if kind is not str])
def test_what_is_no_finite_number_is_refused(name, value):
    assert only(**{name: value}).startswith(f"{name}: given {value!r}; allowed: ")


@pytest.mark.parametrize("name", [name for name, limit in LIMITS.items() if limit == "quoting"])
@pytest.mark.parametrize("value", ["C:\\models", "it's", "a\\b'c"])
def test_backslash_and_quotation_mark_are_refused_by_name(name, value):
    values = GIVEN if name.startswith("compute") else {"dataset_train_split": "train.jsonl"}
    (found,) = problems_with({**values, name: value})
    assert found.startswith(f"{name}: given {value!r}; it has the character ")
    assert all(character in found for character in set(value) & {"\\", "'"})


@pytest.mark.parametrize(("name", "allowed"), [(n, a) for n, _, _, a in CONTRACT if isinstance(a, tuple)])
def test_another_word_is_refused_with_those_allowed(name, allowed):
    for wrong in ("", "TRUE", "other", 5, None):
        assert only(**{name: wrong}) == f"{name}: given {wrong!r}; allowed: {', '.join(allowed)}"
    for word in allowed:
        assert getattr(Parameters(**{**GIVEN, name: word}), name) == word


def test_a_login_in_a_uri_is_refused_and_not_shown():
    for stage in STAGES:
        (problem,) = problems_with({"mlflow_tracking_uri": "https://me:secret@host/mlflow"}, [stage])[:1]
        assert problem.startswith("mlflow_tracking_uri: given 'https://...@host/mlflow'; it has a name or password")
    assert problems_with({"mlflow_tracking_uri": "sqlite:////runs/mlflow.db"}, ["train"]) == []


@pytest.mark.parametrize("seed", [-1, 2**53, 2**64])
def test_a_seed_that_the_random_generators_do_not_take_is_refused(seed):
    assert only(seed=seed) == f"seed: given {seed}; allowed: an integer 0..9007199254740991"
    assert Parameters(**{**GIVEN, "seed": 2**53 - 1}).seed == 2**53 - 1


@pytest.mark.parametrize("name", ["dataset_train_split", "huggingface_id", "storage_uri", "mlflow_tracking_uri"])
@pytest.mark.parametrize("inside", ["\n", "\r", "\x00", "\x1b[2J", "\x7f", "\u2028"])
def test_a_line_break_at_the_end_is_cut_and_one_inside_is_refused(name, inside):
    plain = {"huggingface_id": "a/b"}.get(name, "http://host/a")
    assert getattr(Parameters(**{**GIVEN, name: f" {plain}\n"}), name) == plain
    assert "it has a line break or control character inside" in only(**{name: plain + inside + "c"})


@pytest.mark.parametrize("name", [p.name for p in PARAMETERS if p.type is str])
def test_no_text_may_have_several_lines(name):
    assert any(problem.startswith(f"{name}: ") for problem in problems(**{name: "a\nb"}))


@pytest.mark.parametrize("uri", ["mlflow:5000", "mlflow.example.com/path", "mlruns"])
def test_a_tracking_server_has_a_scheme(uri):
    assert only(mlflow_tracking_uri=uri).startswith(
        f"mlflow_tracking_uri: given '{uri}'; it has no scheme: put http:// or https:// before it"
    )
    for taken in ("", "http://mlflow:5000", "databricks", "sqlite:////runs/mlflow.db", "./mlruns", "/mlruns"):
        assert problems(mlflow_tracking_uri=taken) == []


@pytest.mark.parametrize("name", ["", " ", "Mine", "a_b", "-a"])
def test_a_secret_has_a_name_since_kfp_refuses_an_empty_one(name):
    found = only(object_store_secret=name)
    assert found.startswith(f"object_store_secret: given '{name.strip()}'; it must be the name of a Secret")
    assert found.endswith("name one that does not exist, such as `none`")


@pytest.mark.parametrize("name", REMOVED)
def test_a_parameter_that_was_taken_away_is_refused_with_the_reason(name):
    assert only(**{name: "1"}) == f"{name}: no longer a parameter: {REMOVED[name]}; leave it out"


def test_a_problem_knows_its_parameter_and_reads_as_a_sentence():
    error = DraftModelError([Problem("a", "given 1"), "elsewhere: bad"])
    assert str(error) == "2 problems:\n  - a: given 1\n  - elsewhere: bad"
    assert named_parameters(error.problems) == {"a"}
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problems, named_parameters(copy.problems)) == (error.problems, {"a"})
    assert json.loads(json.dumps(error.problems)) == error.problems
    assert Problem.of("a", "a: given 1") == Problem.of("a", "given 1") == "a: given 1"


def test_all_problems_come_at_once_each_with_parameter_value_and_what_is_allowed():
    wrong = {
        "num_epochs": 0, "learning_rate": "fast", "max_length": 15, "warmup_ratio": 2, "chat_template": "chatml",
        "resume": "maybe", "seed": "x", "compute_model_import": "a'b", "draft_global_batch_size": 3,
        "draft_micro_batch_size": 2, "dp_size": 5, "num_epoch": 1,
    }  # fmt: skip
    found = problems_with(wrong)
    named = {problem.partition(":")[0] for problem in found}
    assert named == (wrong.keys() - {"draft_micro_batch_size"}) | {
        "dataset_train_split",
        "huggingface_id, pytorch_model_path, mlflow_model_path",
    }
    assert len(found) == len(named)
    for name in wrong.keys() - {"draft_micro_batch_size", "num_epoch"}:
        assert any(problem.startswith(f"{name}: given {wrong[name]!r}") for problem in found), name
    assert str(DraftModelError(found)).startswith(f"{len(found)} problems:\n  - ")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("3", "num_epochs", 3),
        (" 3 ", "num_epochs", 3),
        ("3.0", "num_epochs", 3),
        (3.0, "num_epochs", 3),  # as KFP hands integers over
        ("7", "seed", 7),
        ("5e-5", "learning_rate", 5e-5),
        ("1", "learning_rate", 1.0),
        (1, "warmup_ratio", 1.0),
        ("0", "total_steps", 0),
    ],
)
def test_numbers_are_read_from_text(text, name, value):
    found = getattr(Parameters(**{**GIVEN, name: text}), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["", "three", "3.5", "3,0", "0x3", "1e400", "9" * 5000, None, [], {}])
def test_what_is_no_whole_number_is_refused(text):
    assert only(num_epochs=text).startswith("num_epochs: given ")


EMPTY = {"huggingface_id": "", "pytorch_model_path": "", "mlflow_model_path": ""}


@pytest.mark.parametrize("count", [0, 2, 3])
def test_exactly_one_model_source(count):
    sources = {name: f"a/{name}" for name in list(EMPTY)[:count]}
    (found,) = problems_with({"dataset_train_split": "t", **sources})
    assert "huggingface_id, pytorch_model_path, mlflow_model_path: exactly one must be given" in found
    assert all(f"{name}={value!r}" in found for name, value in sources.items())
    assert count or "none of them" in found
    for source in EMPTY:
        assert problems_with({**EMPTY, source: "a/b", "dataset_train_split": "t"}) == []


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "/b", "a/", "a b/c", "@main", "gpt2@main"])
def test_a_hub_id_has_an_organisation(name):
    assert only(huggingface_id=name) == f"huggingface_id: given {name!r}; allowed: `org/name` or `org/name@revision`"
    assert problems(huggingface_id="org/name@refs/pr/1") == []


@pytest.mark.parametrize(
    ("world", "micro", "given_batch", "nearest"),
    [(1, 3, 8, "6 or 9"), (4, 3, 8, "12"), (2, 2, 7, "4 or 8"), (8, 1, 9, "8 or 16")],
)
def test_a_global_batch_that_cannot_be_split_names_the_nearest_that_can(world, micro, given_batch, nearest):
    found = only(
        number_of_gpu_to_use_draft_model_training=world,
        draft_micro_batch_size=micro,
        draft_global_batch_size=given_batch,
    )
    assert found.startswith(f"draft_global_batch_size: given {given_batch}; ")
    assert found.endswith(f"the nearest is {nearest}")


def test_accumulation_that_contradicts_the_batches_names_both_ways_out():
    found = only(draft_global_batch_size=8, draft_micro_batch_size=2, draft_accumulation_steps=3)
    assert found.startswith("draft_accumulation_steps: given 3; ")
    assert "use 4, leave it at 1 to derive it, or set draft_global_batch_size to 6" in found
    assert problems(draft_global_batch_size=6, draft_micro_batch_size=2, draft_accumulation_steps=3) == []


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_what_a_refusal_of_the_batches_proposes_is_accepted(batch, accumulation, micro, gpus):
    values = {
        "draft_global_batch_size": batch, "draft_accumulation_steps": accumulation, "draft_micro_batch_size": micro,
        "number_of_gpu_to_use_draft_model_training": gpus,
    }  # fmt: skip
    found = problems(**values)
    if not found:
        assert batch == micro * gpus * Parameters(**GIVEN, **values).accumulation_steps
        return
    proposed = int(found[0].rpartition(" ")[2])  # the last number is a global batch that fits
    if found[0].startswith("draft_global_batch_size"):
        assert proposed % (micro * gpus) == 0
        assert abs(proposed - batch) < micro * gpus
        values["draft_accumulation_steps"] = 1
    assert problems(**{**values, "draft_global_batch_size": proposed}) == []


@pytest.mark.parametrize("dp_size", [2, 4, 9, 16])
def test_data_parallelism_that_was_set_and_does_not_fit_is_refused(dp_size):
    parallel = {"num_nodes_draft_model_training": 2, "number_of_gpu_to_use_draft_model_training": 4}
    assert problems(**parallel) == problems(**parallel, dp_size=8) == []
    found = only(**parallel, dp_size=dp_size)
    assert found.startswith(f"dp_size: given {dp_size}; ")
    assert "= 8 must equal" in found
    assert "use 8" in found


def test_tensor_parallelism_that_the_processes_do_not_fill_is_refused_with_what_does():
    found = only(tp_size=3, number_of_gpu_to_use_draft_model_training=4, draft_global_batch_size=8)
    assert found.startswith("tp_size: given 3; it must divide")
    assert found.endswith("= 4: allowed: 1, 2, 4")


@pytest.mark.parametrize(("wrong", "near"), [("num_epoch", "num_epochs"), ("lerning_rate", "learning_rate")])
def test_an_unknown_name_gets_the_nearest(wrong, near):
    assert only(**{wrong: 1}) == f"{wrong}: no such parameter; did you mean {near}?"
    assert only(zzzz=1) == "zzzz: no such parameter"


def test_rules_of_stages_that_do_not_run_are_left_out():
    assert problems_with({}, ["train"]) == []
    assert [p.partition(":")[0] for p in problems_with({}, ["dataset"])] == ["dataset_train_split"]
    assert problems_with({"draft_global_batch_size": 3, "draft_micro_batch_size": 2}, ["evaluate"]) == []


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.binary(max_size=4),
    st.lists(st.integers(), max_size=2), st.sampled_from(["1", "2", "1e-3", "true", "qwen", "a/b", "s3://b/k"]),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2),
)  # fmt: skip
names = st.one_of(st.sampled_from([*REMOVED, *(p.name for p in PARAMETERS)]), st.text(max_size=12))


@given(st.dictionaries(names, values, max_size=6), st.booleans())
def test_any_values_are_either_accepted_or_told_to_be_wrong(drawn, complete):
    values = {**GIVEN, **drawn} if complete else drawn
    found = problems_with(values)
    if found:
        assert all(": " in problem for problem in found)
        assert len(set(found)) == len(found)
    else:
        parameters = Parameters(**values)
        assert Parameters(**parameters.model_dump()) == parameters
