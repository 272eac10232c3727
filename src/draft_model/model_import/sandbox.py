"""Runs what reads a stranger's files (structure check, tokenizer, chat templates, pickles) in a limited child process.

One server process is started without any keys in its environment; it loads torch and transformers once and forks a
child for each task. The child has limits on memory, CPU time and wall time, and cannot reach the Hub. What breaks
there, be it an expanded tensor, ten million layers or an endless chat template, comes back as a sentence.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any, NoReturn, cast

from draft_model.errors import DraftModelError
from draft_model.processes import set_death_signal

GIB = 2**30
MEMORY, CPU_SECONDS, WALL_SECONDS = 6 * GIB, 300, 1200
"""Default limits of a task: tokenizers of 260,000 tokens and 100 layers of 256 experts need a tenth of them."""

_SECRET = re.compile(r"^(AWS_|HF_|MLFLOW_|KFP_)|TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY")
_lock = threading.Lock()
_server: subprocess.Popen[bytes] | None = None


def run(task: str, *, memory: int = MEMORY, cpu: int = CPU_SECONDS, wall: int = WALL_SECONDS, **arguments: Any) -> Any:
    """Runs `inspect` or `convert` in a child process with limits in bytes and seconds; arguments are JSON values.

    Raises:
        DraftModelError: what the task refuses, or which limit it exceeded.
    """
    global _server
    request = {"task": task, "arguments": arguments, "memory": memory, "cpu": cpu, "wall": wall}
    with _lock:
        if _server is None or _server.poll() is not None:
            environment = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
            _server = subprocess.Popen(
                [sys.executable, "-m", "draft_model.model_import.sandbox"],
                env=environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            atexit.register(_server.kill)
        stdin, stdout = cast(IO[bytes], _server.stdin), cast(IO[bytes], _server.stdout)
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            answer = json.loads(stdout.readline() or b'{"failure": "the checking process was killed"}')
        except BaseException:  # an interrupt in between leaves an answer unread
            _server.kill()
            raise
    if "result" in answer:
        return answer["result"]
    if "problems" in answer:
        raise DraftModelError(answer["problems"])
    if "failure" in answer:
        raise RuntimeError(f"{task} failed: {answer['failure']}")
    # Native code aborts where it gets no memory; the kernel kills where the machine has none.
    exceeded = {signal.SIGXCPU: f"{cpu} s of CPU time", signal.SIGALRM: f"{wall} s"}
    limit = exceeded.get(answer["signal"], f"{memory / GIB:.0f} GiB of memory or crashed (signal {answer['signal']})")
    raise DraftModelError(
        f"reading its files took more than {limit} and was stopped: a file of it is damaged or made to do harm, or the "
        "machine is too small; check where the model comes from, or save it again with save_pretrained"
    )


def _serve() -> None:
    """Reads requests, one a line; forks a child for each and passes its answer on. Ends when the caller is gone."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (loaded once, for all children)

    from draft_model.model_import.check import inspect
    from draft_model.model_import.convert import convert

    tasks: dict[str, Callable[..., Any]] = {"inspect": inspect, "convert": convert}
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            _work(tasks[request["task"]], request, writing)
        os.close(writing)
        answer = b""
        while True:
            ready, _, _ = select.select([reading, sys.stdin], [], [])
            if sys.stdin in ready:  # no request comes before this one's answer, so the caller is gone
                os.kill(child, signal.SIGKILL)
                return
            if not (data := os.read(reading, 65536)):
                break
            answer += data
        os.close(reading)
        _, status = os.waitpid(child, 0)
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps({"signal": ended}) if ended else answer.decode(), flush=True)


def _work(task: Callable[..., Any], request: dict[str, Any], writing: int) -> NoReturn:
    set_death_signal()
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    resource.setrlimit(resource.RLIMIT_DATA, (request["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"] + 5))
    signal.setitimer(signal.ITIMER_REAL, request["wall"])
    try:
        answer = {"result": task(**request["arguments"])}
    except DraftModelError as error:
        answer = {"problems": error.problems}
    except BaseException as error:
        full = isinstance(error, MemoryError) or "allocate memory" in str(error)
        answer = {"signal": signal.SIGABRT} if full else {"failure": traceback.format_exc()}
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    _serve()
