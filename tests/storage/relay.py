"""A relay before the object store: sees every request, refuses some, cuts connections, or is away."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_KEPT_OUT = {"connection", "transfer-encoding", "content-length", "expect"}


class Relay:
    """Forwards requests to the store, as they were signed.

    Attributes:
        seen: method and key of every request for an object, without the bucket.
        cuts: how often the next answers to a method and the end of a key are cut; sent and answered half.
        refuse: gets a request; gives the status and error code to answer with, or None to forward it.
        lose: how often a forwarded request gets no answer.
        away: requests so many more are cut off at once.
        endpoint: its URL.
    """

    def __init__(self, store: str, tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[tuple[str, str]] = []
        self.cuts: Counter[tuple[str, str]] = Counter()
        self.refuse = lambda request: None
        self.lose = self.away = 0
        self._store, self._lock = urlsplit(store).netloc, threading.Lock()
        relay = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def relay(self):
                if not relay.answer(self):
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(2)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def keys(self, method: str) -> list[str]:
        """The last segments of the keys that a method was used on."""
        return [key.rpartition("/")[2] for used, key in self.seen if used == method]

    def answer(self, request) -> bool:
        """Answers one request; False where the connection is to be cut."""
        key = unquote(urlsplit(request.path).path.lstrip("/").partition("/")[2])
        if key:
            self.seen.append((request.command, key))
        with self._lock:
            self.away, away = max(self.away - 1, 0), self.away > 0
            cut = next((c for c in self.cuts if self.cuts[c] and c[0] == request.command and key.endswith(c[1])), None)
            if cut and not away:
                self.cuts[cut] -= 1
        if away:
            return False
        length = int(request.headers.get("Content-Length") or 0)
        if cut and request.command == "PUT":
            request.rfile.read(length // 2)
            return False
        body = _chunks(request.rfile) if request.headers.get("Transfer-Encoding") else request.rfile.read(length)
        if refused := self.refuse(request):
            return self._refuse(request, *refused)
        with contextlib.closing(http.client.HTTPConnection(self._store)) as connection:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in _KEPT_OUT:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        with self._lock:
            self.lose, lost = max(self.lose - 1, 0), self.lose > 0
        if lost:
            return False
        kept = {
            name: value for name, value in answer.getheaders() if name.lower() not in {*_KEPT_OUT, "date", "server"}
        }
        size = answer.getheader("Content-Length", "0") if request.command == "HEAD" else len(data)
        self._send(request, answer.status, {**kept, "Content-Length": size}, data[: len(data) // 2] if cut else data)
        return not cut

    def _refuse(self, request, status: int, code: str, headers: dict[str, str] | None = None) -> bool:
        body = f"<Error><Code>{code}</Code><Message>invented</Message></Error>" if code else ""  # none: said to be done
        if request.path == "/":  # STS
            body = f"<ErrorResponse>{body}</ErrorResponse>"
        more = {"Content-Type": "application/xml", "Content-Length": len(body), **(headers or {})}
        self._send(request, status, more, b"" if request.command == "HEAD" else body.encode())
        return True

    def _send(self, request, status: int, headers: dict[str, object], data: bytes) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, str(value))
        request.end_headers()
        request.wfile.write(data)


def _chunks(stream) -> bytes:
    """A body whose length was not said beforehand."""
    found = []
    while size := int(stream.readline(), 16):
        found.append(stream.read(size))
        stream.readline()
    stream.readline()
    return b"".join(found)
