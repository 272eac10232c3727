"""A Hub on 127.0.0.1: what huggingface_hub and datasets ask for one repository, answered as huggingface.co does.

Weights are in large-file storage: they are redirected to another host, which knows ranges and must never see a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = hashlib.sha1(b"the commit").hexdigest()
TOKEN = "hf_never_shown"


class Hub:
    """Serves files, by their names or of a folder, as the model `org/name`, or as a data set.

    Attributes:
        requests: method, path, range and whether a token came, of every request.
        cuts: how the answers for large files end, one after the other: `close` and `reset` half way.
        busy: statuses that the next requests are answered with, one after the other.
        sizes: whether it says how large files are.
        leaves_out: a header or field that the answers lack.
        refuses: `gated`, `private` or a status that every API request is answered with.
        ranges: whether the file host knows ranges.
        arrived: whether the client has written some of an answer that is to be reset.
        made: what was asked for of each new repository.
        pushed: the files of the commit that was pushed.
    """

    def __init__(self, given: Path | Mapping[str, bytes], dataset: str = "") -> None:
        found = {path.name: path.read_bytes() for path in given.iterdir()} if isinstance(given, Path) else given
        self.files = dict(found)
        self.name = dataset or "org/name"
        self.api = f"/api/{'datasets' if dataset else 'models'}/{self.name}"
        self.at = f"/datasets/{self.name}" if dataset else f"/{self.name}"
        self.requests: list[tuple[str, str, str, bool]] = []
        self.cuts: list[str] = []
        self.refuses: str | int = ""
        self.busy: list[int] = []
        self.ranges = self.sizes = True
        self.leaves_out = ""
        self.arrived = lambda: True
        self.sent: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.objects: dict[str, bytes] = {}
        self.pushed: dict[str, bytes] = {}
        hub = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def do_POST(self):
                hub.take(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def do_PUT(self):
                hub.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
                hub._send(self, 200, {"ETag": "stored"})

        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Answer) for _ in range(2)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Hub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def connect(self, monkeypatch) -> None:
        """Has huggingface_hub in this process ask it; the library reads its variables when it is imported."""
        from huggingface_hub import constants

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def got(self, name: str) -> list[str]:
        """The ranges of the GET requests for a file's bytes."""
        return [span for method, path, span, _ in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def answer(self, request, body: bool) -> None:
        path = request.path.partition("?")[0]
        token = request.headers.get("Authorization", "") == f"Bearer {TOKEN}"
        self.requests.append((request.command, path, request.headers.get("Range", ""), token))
        at_cdn = request.server is self._servers[1]
        if self.busy and not at_cdn:
            self._send(request, self.busy.pop(0), {"Retry-After": "0"})
        elif at_cdn:
            self._send_range(request, path.removeprefix("/blobs/"), body)
        elif match := re.fullmatch(f"{self.api}(?:/revision/(.+))?", path):
            self._describe(request, match[1])
        elif match := re.fullmatch(f"{self.api}/tree/{COMMIT}(?:/(.+))?", path):
            self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(self._tree(match[1])).encode())
        elif match := re.fullmatch(f"{self.at}/resolve/([^/]+)/(.+)", path):
            self._resolve(request, *match.groups(), body)
        else:
            self._send(request, 401, {"X-Error-Code": "RepoNotFound"})

    def take(self, request, body: bytes) -> None:
        """Answers what an upload posts: a new repository, how each file goes, where large ones go, the commit."""
        path, answer = request.path.partition("?")[0], {}
        if request.headers.get("Authorization", "") != f"Bearer {TOKEN}":
            return self._send(request, 401, {"Content-Type": "application/json"}, b"{}")
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            answer = {"url": f"{self.endpoint}/org/name", "name": "org/name", "id": "1"}
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            answer["files"] = [{"path": name, "uploadMode": "lfs" if self._large(name) else "regular",
                                "shouldIgnore": False} for name in files]  # fmt: skip
        elif path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{"upload": {"href": f"{self.cdn}/objects/{each['oid']}"}} for each in objects]
            pairs = zip(objects, upload, strict=True)
            answer = {"transfer": "basic", "objects": [{**each, "actions": actions} for each, actions in pairs]}
        elif "/commit/" in path:
            for key, value in (json.loads(line).values() for line in body.splitlines()):
                if key == "file":
                    self.pushed[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    self.pushed[value["path"]] = self.objects[value["oid"]]
            answer = {"commitUrl": f"{self.endpoint}/org/name/commit/{COMMIT}", "commitOid": COMMIT}
        return self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send(self, request, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def _describe(self, request, revision: str | None) -> None:
        if self.refuses == "gated":
            return self._send(request, 403, {"X-Error-Code": "GatedRepo"})
        if self.refuses == "private":
            return self._send(request, 401, {"X-Error-Code": "RepoNotFound"})
        if self.refuses:
            return self._send(request, int(self.refuses), {})
        if revision not in (None, "main", "v1", COMMIT):
            return self._send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [self._sibling(name, data) for name, data in sorted(self.files.items())]
        answer = {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": siblings, "tags": []}
        answer.pop(self.leaves_out, None)
        return self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _tree(self, folder: str | None) -> list[dict]:
        """What lies directly in a folder; None is the root."""
        found = {}
        for path, data in sorted(self.files.items()):
            below = f"{folder}/" if folder else ""
            first, _, more = path.removeprefix(below).partition("/")
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if self._large(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            if path.startswith(below):
                found[first] = {**entry, "type": "directory", "path": below + first} if more else entry
        return list(found.values())

    def _sibling(self, name: str, data: bytes) -> dict:
        found = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if not self.sizes:
            return {"rfilename": name}
        if self._large(name):
            found["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
        return found

    def _large(self, name: str) -> bool:
        return not name.endswith((".json", ".jinja", ".md"))

    def _resolve(self, request, revision: str, name: str, body: bool) -> None:
        if revision not in ("main", COMMIT) or name not in self.files:
            return self._send(request, 404, {"X-Error-Code": "EntryNotFound"})
        data = self.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        headers.pop(self.leaves_out, None)
        if not self._large(name):
            return self._send(request, 200, {**headers, "Content-Length": str(len(data))}, data)
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._send(request, 302, {**headers, **linked, "Location": f"{self.cdn}/blobs/{name}"})

    def _send_range(self, request, name: str, body: bool) -> None:
        data = self.sent.get(name, self.files[name])
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")) if self.ranges else None
        first = int(span[1]) if span else 0
        last = min(int(span[2]), len(data) - 1) if span and span[2] else len(data) - 1
        request.send_response(206 if span else 200)
        request.send_header("Content-Length", str(last - first + 1))
        request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if span:
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        request.end_headers()
        if not body:
            return
        whole = not (span and span[2])  # a range with an end is a header's; what has none is a download
        if not (whole and self.cuts):
            request.wfile.write(data[first : last + 1])
            return
        how = self.cuts.pop(0)
        request.wfile.write(data[first : first + (last - first) // 2])
        request.wfile.flush()
        request.close_connection = True
        if how == "reset":
            while not self.arrived():  # a reset takes back what the client has not read yet
                time.sleep(0.01)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close() if how == "reset" else request.connection.shutdown(socket.SHUT_RDWR)
