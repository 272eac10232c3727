"""torchrun's end says what its processes' ends said, and no more."""

import signal

import pytest

from draft_model.jobs import torchrun


@pytest.fixture
def end_of(monkeypatch, tmp_path):
    """Runs two processes of a script, each with its rank; gives torchrun's exit code."""

    def end_of(body):
        script = tmp_path / "script.py"
        script.write_text(f"import os, signal, sys\nfirst = os.environ['RANK'] == '0'\n{body}\n")
        monkeypatch.setattr("sys.argv", ["torchrun", "--standalone", "--nproc-per-node=2", str(script)])
        return torchrun.main()

    return end_of


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", 0),
        ("sys.exit(2)", 2),
        ("os.kill(os.getpid(), signal.SIGKILL) if first else signal.pause()", 128 + signal.SIGKILL),
        ("os.kill(os.getppid(), signal.SIGTERM) if first else None\nsignal.pause()", 128 + signal.SIGTERM),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed_first(end_of, capfd, body, code):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert end_of(body) == code
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "Traceback" not in capfd.readouterr().err
