"""A headless Chromium, told what to do by chromedriver's WebDriver protocol, over plain HTTP."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--hide-scrollbars"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE = 60.0  # seconds
# querySelectorAll that goes through shadow roots and frames, of which TensorBoard is made
FIND = """
const found = [];
const look = (root, selector) => {
  found.push(...root.querySelectorAll(selector));
  for (const element of root.querySelectorAll("*")) {
    if (element.shadowRoot) look(element.shadowRoot, selector);
    if (element.tagName === "IFRAME" && element.contentDocument) look(element.contentDocument, selector);
  }
};
const all = selector => { found.length = 0; look(document, selector); return [...found]; };
const words = () => all("*").filter(shown).filter(element => element.tagName !== "STYLE").flatMap(
  element => [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data)).join(" ");
const shown = element => element.checkVisibility() && element.getBoundingClientRect().width > 0;
"""


def is_installed() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Browser:
    """One window."""

    def __init__(self, url: str, session: str) -> None:
        self.session = f"{url}/session/{session}"

    def open(self, url: str) -> None:
        _ask(f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """What a script returns, which may use `all(selector)`, `shown(element)` and `words()`."""
        return _ask(f"{self.session}/execute/sync", {"script": FIND + script, "args": list(arguments)})

    def wait_for(self, script: str, *arguments: object) -> Any:
        """What a script returns once it is neither null, false, 0 nor empty."""
        until = time.monotonic() + PATIENCE
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < until, f"not within {PATIENCE:g} s: {script}"
            time.sleep(0.2)
        return value

    def complaints(self) -> list[str]:
        """Errors in the console since the last call."""
        entries = _ask(f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def resize(self, width: int, height: int) -> None:
        """The page's size, as of a telephone: a window could not be as narrow."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        _ask(f"{self.session}/goog/cdp/execute", command)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(_ask(f"{self.session}/screenshot")))


@contextmanager
def browser(profile: Path, width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """A browser with a new profile in the folder `profile`."""
    port = free_port()
    environment = os.environ | {"HOME": str(profile)}
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    session = None
    try:
        wait_until_served(f"{url}/status", driver)
        flags = [*FLAGS, f"--user-data-dir={profile / 'profile'}", f"--window-size={width},{height}"]
        options = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _ask(f"{url}/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        yield Browser(url, session)
    finally:
        if session:
            _ask(f"{url}/session/{session}", method="DELETE")
        driver.terminate()
        driver.wait()


def wait_until_served(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            assert process.poll() is None, f"{process.args!r} ended"
            assert time.monotonic() < until, f"{url} is not served"
            time.sleep(0.1)


def _ask(url: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None
