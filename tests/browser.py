"""A page in headless Chromium, by its DevTools protocol: what it asks for, what it complains of, how it looks."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import websocket

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-component-update",
    "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-port=0",
]  # fmt: skip


class Browser:
    """Chromium with one page, for as long as the `with` lasts.

    Args:
        folder: of its profile.
    """

    def __init__(self, folder: Path) -> None:
        self._profile = folder / "profile"

    def __enter__(self) -> Browser:
        command = [BROWSER, *_OPTIONS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self._port()
        self._socket = websocket.create_connection(
            f"ws://127.0.0.1:{port[0]}{port[1]}", suppress_origin=True, timeout=120
        )
        self._numbers, self._events, self._session = itertools.count(1), [], ""
        page = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()

    def _port(self) -> list[str]:
        told, deadline = self._profile / "DevToolsActivePort", time.monotonic() + 120
        while not (told.exists() and len(lines := told.read_text().splitlines()) == 2):
            assert self._process.poll() is None, "Chromium ended"
            assert time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.05)
        return lines

    def _ask(self, method: str, **given: Any) -> dict[str, Any]:
        number = next(self._numbers)
        order = {"id": number, "method": method, "params": given}
        self._socket.send(json.dumps(order | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._events.append(answer)

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Loads a file as on a screen of this width, in light or dark."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self._ask("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(json.loads(self._socket.recv()))
        self.find("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def find(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, whose own policy does not apply to it."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._ask("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """The screen as a PNG."""
        return base64.b64decode(self._ask("Page.captureScreenshot")["data"])

    @property
    def complaints(self) -> list[str]:
        """What is in the console since the page was opened: errors and warnings, the page's and the browser's."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events if event.get("method") in kinds]

    @property
    def requests(self) -> list[str]:
        """All that was asked for since the page was opened, the page itself included."""
        asked = [event["params"] for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked]
