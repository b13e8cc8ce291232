"""A small WebDriver client: chromedriver speaks JSON over HTTP on the loopback interface."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: how long chromedriver may take for one answer, in seconds
_PATIENCE = 60
#: no proxy stands before this machine itself
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
              "--hide-scrollbars"]


class Browser:
    """One window of a headless Chromium."""

    def __init__(self, base: str, profile: Path) -> None:
        self._base = f"{base}/session"
        body = self._ask("POST", "", {"capabilities": {"alwaysMatch": {
            "browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}}}})
        self._base += f"/{body['sessionId']}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, method=method,
                                         headers={"Content-Type": "application/json"})
        try:
            with _DIRECT.open(request, timeout=_PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, path: Path) -> None:
        self._ask("POST", "/url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        """What `return ...` of a script in the page gives."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def becomes(self, script: str, wanted: Any, seconds: float = 20.0) -> Any:
        """What the script gives once it gives `wanted`, or at last."""
        end = time.monotonic() + seconds
        while (found := self.run(script)) != wanted and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def type(self, selector: str, text: str) -> None:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{found[_ELEMENT]}/value", {"text": text})

    def click(self, selector: str) -> None:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{found[_ELEMENT]}/click", {})

    def resize(self, width: int, height: int) -> None:
        """The size of the page, for which a window may be narrower than the system allows."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """What the system prefers: "light" or "dark"."""
        self.command("Emulation.setEmulatedMedia",
                     features=[{"name": "prefers-color-scheme", "value": name}])

    def command(self, name: str, **values: Any) -> Any:
        """One of the DevTools commands."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": values})

    def complaints(self) -> list[str]:
        """What the console has said since it was last asked."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", "")


@contextlib.contextmanager
def browser(chromedriver: str, profile: Path) -> Iterator[Browser]:
    """A browser of its own process, which ends with it."""
    process = subprocess.Popen([chromedriver, "--port=0"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        port = next(found[1] for line in process.stdout
                    if (found := re.search(r"successfully on port (\d+)", line)))
        window = Browser(f"http://127.0.0.1:{port}", profile)
        try:
            yield window
        finally:
            window.close()
    finally:
        process.terminate()
        process.wait(20)
