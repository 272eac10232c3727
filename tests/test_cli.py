"""The command line as a user meets it: help, refusals, exit codes; tests/tracking/test_stages.py runs the stages."""

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
import tiny
from command import draft_model
from contract import CONTRACT

from draft_model.cli import cli, parameter_table
from draft_model.parameters import PARAMETERS, STAGES, parameters_of

PROGRAM = Path(sysconfig.get_path("scripts")) / "draft-model"


def refused(*arguments):
    """Standard error of a command that a user's mistake ended."""
    done = draft_model(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def shown(*arguments):
    done = draft_model(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("name", cli.commands)
def test_the_help_of_a_command_has_an_example(name):
    (purpose, *rest) = shown(name, "--help").partition("Options:")[0].strip().splitlines()[2:]
    assert purpose.strip()
    assert any(f"draft-model {name} " in f"{line} " for line in rest)


def test_help_and_version_name_the_commands():
    for flag in ("--help", "-h"):
        assert all(f"\n  {name} " in shown(flag) for name in (*STAGES, "run", "compile", "parameters"))
    done = subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True)
    assert "0.0.1" in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_has_every_parameter_with_default_and_what_is_allowed(stage):
    help = " ".join(shown(stage, "--help").split())
    for parameter in parameters_of(stage):
        assert f"--{parameter.name} " in help
        assert parameter.default == "" or f"[default: {parameter.default}]" in help
        assert all(word in help for word in parameter.choices)
    assert "--output" in help or stage == "evaluate"


def test_dashes_and_underscores_are_the_same(tmp_path):
    target = ["--output", tmp_path / "out"]
    for option in ("--huggingface-id", "--huggingface_id"):
        assert refused("import", option, "gpt2", *target) == (
            "error: huggingface_id: given 'gpt2'; allowed: `org/name` or `org/name@revision`\n"
        )
    error = refused("run", "--set", "num-epochs=0")
    assert "num_epochs: given '0'; allowed: an integer >= 1" in error


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["import", "--hugingface_id", "a/b"], "--huggingface_id"),
        (["dataset", "--max-lenght", "512"], "--max_length"),
        (["evaluate", "--drft", "d"], "--draft"),
        (["run", "--prams", "run.yaml"], "--params"),
        (["submit", "--hots", "h"], "--host"),
        (["watch", "--token_fil", "f", "r"], "--token-file"),
        (["--hlep"], "--help"),
        (["trian"], "train"),
    ],
)
def test_a_mistyped_option_or_command_gets_the_nearest(arguments, near):
    error = refused(*arguments)
    suggested = error.partition("No such ")[2].partition("Did you mean")[2]
    assert f"'{near}'" in suggested.replace("_", "-") or f"'{near}'" in suggested
    assert "--help" in error


MISTAKES = [
    (["import"], ["Missing option '--output'"]),
    (["dataset", "--part", "1/8"], ["No such option '--part'"]),
    (["evaluate", "--evaluation_tree", "4,2,1"], ["--evaluation_tree: no longer a parameter: the evaluation decodes"]),
    (["run", "--set", "dataset_pods=2", "--set", "evaluation-tree=4"], ["dataset_pods: no longer", "_tree: no longer"]),
    (["watch"], ["Missing argument 'RUN'"]),
    (["terminate", "a", "b"], ["unexpected extra argument (b)"]),
    (["import", "--output"], ["'--output' requires an argument"]),
    (["parameters", "num_epochs"], ["unexpected extra argument"]),
    (["compile", "--image", "a/{kind}:1"], ["--image: given without --output or --manifest"]),
    (
        ["run", "--set", "=1", "--set", "num_epochs=x"],
        ["--set: given '=1'", "num_epochs: given 'x'", "exactly one must be given", "dataset_train_split: not given"],
    ),
    (
        ["run", "--params", "/none.yaml", "--set", "a=1"],
        ["--params: /none.yaml cannot be read", "a: no such parameter"],
    ),
    (["plan", "--config", "/none.json", "--num_epochs", "0", "--seed", "x"], ["num_epochs: given", "seed: given"]),
    (["train", "--modle", "m", "--num_epochs", "0", "--output", "o", "--seed=x"],
     ["No such option '--modle'", "option '--model'", "option '--dataset'", "seed: given 'x'", "num_epochs: given"]),
    (["export", "--format", "vlm", "--drft", "a"], ["--drft", "'vlm' is not", "option '--draft'", "'--output'"]),
    (["plan", "--memory", "a", "--peak", "b", "--seed", "x"], ["--memory", "--peak", "--config", "seed: given"]),
    (["terminate", "run", "--nme", "n"], ["No such option '--nme'"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_told_and_all_that_is_wrong_with_parameters(arguments, told):
    error = refused(*arguments)
    assert [words for words in told if words not in error] == []
    assert f"{len(told)} problems:" in error or len(told) == 1 or arguments[0] == "run"


def test_a_stage_whose_input_is_not_whole_says_so(tmp_path):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.conversations(2))
    error = refused("dataset", "--model", tmp_path, "--output", tmp_path / "out", "--dataset_train_split", data)
    assert error.startswith(f"error: model: {tmp_path} has no manifest.json")


def test_parameters_come_from_a_file_and_settings_win_over_it(tmp_path):
    params = tmp_path / "run.yaml"
    params.write_text("resume: true\nlearning_rate: 1e-3\nnum_epochs: 0\nmax_length: 3\ndataset_train_split: /none\n")
    error = refused("run", "--params", params, "--set", "num_epochs=1", "--folder", tmp_path / "run")
    named = {line.removeprefix("  - ").partition(":")[0] for line in error.splitlines()[1:]}
    # A YAML truth value is the contract's word; 1e-3, which YAML takes for text, is a number here.
    assert named == {
        "max_length",
        "dataset_train_split",
        "huggingface_id, pytorch_model_path, mlflow_model_path",
    }
    assert not (tmp_path / "run").exists()


def test_json_is_a_params_file_too_and_unknown_names_are_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"num_epoch": 1, "resume": False}))
    error = refused("run", "--params", tmp_path / "run.json")
    assert "num_epoch: no such parameter; did you mean num_epochs?" in error
    assert "resume" not in error


@pytest.mark.parametrize("content", [None, b"- a\n- b\n", b"", b"a: [\n", b"\xff\xfe\x00"])
def test_a_params_file_that_holds_no_parameters(tmp_path, content):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    assert refused("run", "--params", file).startswith(f"error: --params: {file} ")


def test_a_setting_may_hold_an_equals_sign():
    error = refused("run", "--set", "dataset_train_split=/none/a=b", "--set", "huggingface_id=a/b")
    assert "'/none/a=b'" in error


def test_the_table_has_all_parameters_in_order_and_marks_the_additions():
    table = shown("parameters")
    assert table == parameter_table() + "\n"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0].removesuffix(" (addition)") for row in rows] == [p.name for p in PARAMETERS]
    assert [row[0].endswith("(addition)") for row in rows] == [False] * 35 + [True] * (len(PARAMETERS) - 35)
    defaults = ["-" if default == "" or name == "total_steps" else f"`{default}`" for name, _, default, _ in CONTRACT]
    assert [row[2] for row in rows[:35]] == defaults


def test_the_readme_has_the_same_table():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert parameter_table() in readme, "run `draft-model parameters` and put its output into README.md"
