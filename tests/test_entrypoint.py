"""How a process ends: a sentence and 2 for a user's mistake, a traceback and 1 for ours, nothing left behind."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from draft_model.entrypoint import ERROR_FILE, WORK_FOLDER, user_error

DOOR = "import os, signal, sys\nfrom draft_model.entrypoint import *\nfrom draft_model.errors import Problem\n"


@pytest.fixture
def run(tmp_path):
    """Runs Python code in a process of its own that keeps its scratch folders below tmp_path/work."""
    (tmp_path / "work").mkdir()

    def run(code, **environment):
        environment = {**os.environ, WORK_FOLDER: str(tmp_path / "work"), **environment}
        return subprocess.run([sys.executable, "-c", DOOR + code], env=environment, capture_output=True, text=True)

    return run


def through_exit_code(body):
    return f"def work():\n    {body}\nsys.exit(exit_code(work))"


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("raise DraftModelError(['one: bad', 'two: worse'])", 2, "error: 2 problems:\n  - one: bad\n  - two: worse\n"),
        ("try: int('x')\n    except ValueError as error: raise DraftModelError('one: bad') from error", 2,
         "error: one: bad\n"),
        (r"raise DraftModelError('a: \x1b[2J\x07 b')", 2, "error: a: \\x1b[2J\\x07 b\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted\n"),
    ],
    ids=["several", "caused by another error", "escape sequences", "Ctrl-C"],
)  # fmt: skip
def test_a_users_mistake_is_told_without_a_traceback(run, body, code, told):
    done = run(through_exit_code(body))
    assert (done.returncode, done.stderr) == (code, told)


@pytest.mark.parametrize("through", [through_exit_code, "with step('import'):\n    {}".format])
def test_a_variable_of_a_secret_that_ends_with_a_line_break_is_stripped(run, through):
    names = ["HF_TOKEN", "HF_ENDPOINT", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"]
    done = run(through(f"print([os.environ[name] for name in {names}])"), **dict.fromkeys(names, "http://a\n"))
    assert done.stdout == f"{['http://a'] * 4}\n"


def test_a_fault_of_ours_keeps_its_traceback(run):
    done = run(through_exit_code("1 / 0"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES", "EPERM", "EDQUOT", "EIO", "EMFILE"])
def test_what_the_machine_refuses_is_told_with_the_file_and_what_to_do(code):
    number = getattr(errno, code)
    told = str(user_error(OSError(number, os.strerror(number), "/data/file")))
    assert told.startswith(f"/data/file: {os.strerror(number)}; ")


@pytest.mark.parametrize("through", [through_exit_code, "with step('train'):\n    {}".format])
def test_such_a_refusal_has_no_traceback(run, through):
    done = run(through("import errno; raise OSError(errno.ENOSPC, 'full', '/data/file')"))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert done.stderr.startswith("error: /data/file: full; make room")


def test_a_write_that_safetensors_cannot_do_is_told_too(run, tmp_path):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    body = f"import resource; {limit}; from safetensors.numpy import save_file; import numpy"
    done = run(through_exit_code(f"{body}; save_file({{'a': numpy.ones(1024)}}, '{tmp_path}/file')"))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "(os error 27); make room" in done.stderr


def test_a_role_without_its_token_file_has_no_traceback_of_botocore(run, tmp_path):
    keys = "os.environ.pop('AWS_ACCESS_KEY_ID', 0); os.environ.pop('AWS_SECRET_ACCESS_KEY', 0)"  # of other tests' store
    body = f"{keys}; import draft_model.storage as s; s.read_file('s3://bucket/key')"
    role = {"AWS_ROLE_ARN": "arn:aws:iam::1:role/a", "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "none")}
    done = run(through_exit_code(body), AWS_EC2_METADATA_DISABLED="true", **role)
    assert done.returncode == 2
    assert done.stderr.startswith("error: AWS_WEB_IDENTITY_TOKEN_FILE: given ")


def test_a_machine_without_a_usable_scratch_folder_is_told(run):
    full = "tempfile.gettempdir = lambda: tempfile._get_default_tempdir(); tempfile._candidate_tempdir_list = list"
    body = f"import tempfile; {full}; tempfile.TemporaryDirectory()"
    done = run(through_exit_code(body))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert done.stderr.startswith("error: No usable temporary directory found")
    assert "TMPDIR" in done.stderr


def test_a_path_that_the_locale_cannot_write_is_printed_all_the_same(run):
    body = r"print('/data/\udce9t\xe9')"
    done = run(through_exit_code(body), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stdout) == (0, "/data/\\udce9t\\xe9\n")


def test_our_log_lines_are_seen_and_other_libraries_only_warn(run):
    done = run(
        through_exit_code(
            "import logging; logging.getLogger('draft_model.x').info('ours');"
            "logging.getLogger('other').info('theirs'); logging.getLogger('other').warning('a warning')"
        )
    )
    assert [line.partition(" ")[2] for line in done.stderr.splitlines()] == ["ours", "a warning"]


def test_no_line_shows_a_password_or_an_escape_sequence(run):
    text = "'http://u:SECRET@host/ \\x1b[2J'"
    done = run(
        through_exit_code(f"import logging; logging.getLogger('other').warning('%s', {text}); raise OSError({text})")
    )
    assert done.stderr.count("http://host/ \\x1b[2J") == 2
    assert "SECRET@" not in done.stderr.replace(text, "")
    done = run(through_exit_code(f"raise DraftModelError([{text}, Problem('a', {text})])"))
    assert done.stderr.count("http://host/ \\x1b[2J") == 2
    assert "SECRET" not in done.stderr


def test_the_process_that_asked_for_it_gets_the_problems_as_a_list(run, tmp_path):
    file = tmp_path / "error.json"
    done = run(through_exit_code("raise DraftModelError(['one: ü', 'two'])"), **{ERROR_FILE: str(file)})
    assert (done.returncode, done.stderr) == (2, "")
    assert json.loads(file.read_text()) == ["one: ü", "two"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("raise DraftModelError('one: bad')", 2),
        ("1 / 0", 1),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM),
    ],
)
def test_a_component_ends_as_its_body_does_and_leaves_no_scratch_folder(run, tmp_path, body, code):
    done = run(f"with step('train') as folder:\n    (folder / 'large').touch(); print(folder)\n    {body}")
    assert done.returncode == code
    assert done.stdout.startswith(f"{tmp_path}/work/draft-model-train-")
    assert ("Traceback" in done.stderr) == (code == 1)
    assert ("error: one: bad" in done.stderr) == (code == 2)
    assert list((tmp_path / "work").iterdir()) == []


def test_after_a_step_has_failed_no_other_is_started_but_the_clean_up(run, tmp_path):
    told = tmp_path / "error.json"
    told.write_text('["one: bad"]')
    body = "    print('begun')\n    raise DraftModelError('two: bad')"
    done = run(f"with step('import'):\n{body}", **{ERROR_FILE: str(told)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "not started, since another step of this run has failed\n"
    assert json.loads(told.read_text()) == ["one: bad"]
    assert run("with step('clean-up'):\n    print('begun')", **{ERROR_FILE: str(told)}).stdout == "begun\n"
