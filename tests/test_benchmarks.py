"""The benchmark of the training step, and gpu_check on a CPU: what they print, not how fast anything is."""

import json
import subprocess
import sys
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TRAINER = """
import json, signal, sys
for line in sys.stdin:
    if line.startswith("step"):
        {step}
    print(json.dumps({{"ready": True, "seconds": 0.5, "peak": 1000, "loss": 1.0}}), flush=True)
"""


@pytest.fixture
def program(monkeypatch):
    """Loads a program of benchmarks/ as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(name):
        loader = SourceFileLoader(Path(name).stem, str(BENCHMARKS / name))
        module = module_from_spec(spec_from_loader(loader.name, loader))
        monkeypatch.setitem(sys.modules, loader.name, module)
        loader.exec_module(module)
        return module

    return load


def test_a_trainer_that_hangs_is_ended_and_the_others_have_their_rows(program, tmp_path, monkeypatch, capsys):
    benchmark = program("training_step.py")
    sys.path.append(str(tmp_path))
    (tmp_path / "specforge.py").touch()
    (tmp_path / "step_ours.py").write_text(TRAINER.format(step="pass"))
    (tmp_path / "step_specforge.py").write_text(TRAINER.format(step="signal.pause()"))
    processes, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **named: processes.append(start(*a, **named)) or processes[-1])
    monkeypatch.setattr(benchmark, "STEPS", tmp_path)
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)  # where the peer has no environment
    monkeypatch.setattr(benchmark, "_gemm_rate", lambda _settings: 1e9)
    monkeypatch.setattr(sys, "argv", [
        "training_step.py", "--shape", "small", "--trainer", "ours", "specforge", "--rounds", "2", "--warm-up", "1",
        "--limit", "3", "--json", str(tmp_path / "rows.json"),
    ])  # fmt: skip
    benchmark.main()
    rows = [line.split("|")[2:5] for line in capsys.readouterr().out.splitlines() if line.startswith("| small")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["100%", "ours", "2,048"],
        ["100%", "specforge", "no answer within 3 s"],
        ["50%", "ours", "2,048"],
        ["50%", "specforge", "its process ended; its output is above"],
    ]
    assert [row.get("seconds") for row in json.loads((tmp_path / "rows.json").read_text())] == [[0.5] * 2, None] * 2
    assert [process.wait(10) for process in processes] == [0, -9]


def test_specforge_is_timed_without_emptying_the_cache_too_on_a_gpu(program, monkeypatch):
    benchmark = program("training_step.py")
    for device, cached in (("cuda", True), ("cpu", False)):
        monkeypatch.setattr(sys, "argv", ["training_step.py", "--device", device])
        assert ("specforge-cached" in benchmark.arguments().trainer) is cached


BARE = """
import importlib.metadata, sys
absent = "boto3 botocore datasets kfp kubernetes matplotlib mlflow pandas pyarrow"
sys.modules.update(dict.fromkeys(absent.split()))
metadata = importlib.metadata.Distribution
found = metadata.from_name
metadata.from_name = classmethod(lambda _, name: found("absent" if name == "pipeline-draft-model" else name))
"""


def test_gpu_check_goes_through_all_its_parts_on_a_bare_machine(program, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = program("gpu_check")
    tried = "import importlib.metadata as m; m.version('torch'); m.version('pipeline-draft-model')"
    assert "PackageNotFoundError" in check.run(["-c", tried], 60)["output"][-1]
    assert "boto3" in check.run(["-c", "import boto3"], 60)["output"][-1]
    monkeypatch.setitem(check.FILES, "cpu", [*check.FILES["cuda"], "-m", "gpu"])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--output", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit) as end:
        check.main()
    assert end.value.code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tests"]["counts"].keys() == {"skipped"}
    (row,) = report["benchmark"]
    assert (row["trainer"], row["tokens"], len(row["seconds"])) == ("ours", 128, 1)
    assert "addmm" in " ".join(kernel["kernel"] for kernel in report["profile"])
    assert report["profile"][0]["ms"] >= report["profile"][-1]["ms"] > 0


def test_gpu_check_ends_a_part_that_takes_too_long_with_all_that_it_started(program, monkeypatch):
    check = program("gpu_check")
    child = "import signal; signal.pause()"
    script = f"import subprocess as s, sys; print(s.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); {child}"
    result = check.run(["-c", script], 2)
    assert result["code"] == 124
    assert result["output"][-1] == "stopped after 2 s"
    with suppress(psutil.NoSuchProcess):
        orphan = psutil.Process(int(result["output"][0]))
        with suppress(psutil.TimeoutExpired):
            orphan.wait(10)
        assert orphan.status() == psutil.STATUS_ZOMBIE
    monkeypatch.setattr(check, "STARTED", check.STARTED - 1000)
    assert check.run(["-c", child], 60)["output"][-1] == "stopped after 0 s"
