"""A Hub on 127.0.0.1 that has one data set, answered as huggingface.co does."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = hashlib.sha1(b"the commit").hexdigest()


class DatasetHub:
    """Serves files as a repository of data.

    Attributes:
        requests: method and path of every request.
    """

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name, self.files = name, files
        self.requests: list[str] = []
        hub = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(self.path, asked)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> DatasetHub:
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, asked: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        path = path.partition("?")[0]
        api = f"/api/datasets/{self.name}"
        if re.fullmatch(f"{api}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            return self._json({"id": self.name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        if path.startswith(f"{api}/tree/"):
            below = path.removeprefix(f"{api}/tree/").partition("/")[2]
            return self._json(self._listing(below))
        if path.startswith(f"{api}/paths-info/"):
            wanted = json.loads(asked)["paths"] if asked.startswith(b"{") else []
            return self._json([self._entry(name) for name in self.files if name in wanted])
        name = path.removeprefix(f"/datasets/{self.name}/resolve/").partition("/")[2]
        if name in self.files:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._entry(name)["oid"]}"'}
            return 200, headers, self.files[name]
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _listing(self, folder: str) -> list[dict]:
        """What lies directly in a folder; the root is the empty one."""
        found = {}
        for name in self.files:
            inside = name.removeprefix(f"{folder}/") if folder else name
            if inside != name or not folder:
                first, _, more = inside.partition("/")
                path = f"{folder}/{first}".lstrip("/")
                oid = hashlib.sha1(path.encode()).hexdigest()
                found[path] = {"type": "directory", "path": path, "size": 0, "oid": oid} if more else self._entry(name)
        return list(found.values())

    def _entry(self, name: str) -> dict:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, value) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
