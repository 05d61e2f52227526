"""Headless Chromium, driven through chromedriver's HTTP protocol (W3C WebDriver, and Chromium's own commands beside it)."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from server.harness import DEADLINE_S, http, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The protocol's key of an element's id."""
TAB, ENTER, ESCAPE, RIGHT, DOWN, CONTROL = "\ue004", "\ue007", "\ue00c", "\ue014", "\ue015", "\ue009"


class Browser:
    """One window. Closes with ``stop``."""

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        assert CHROMIUM is not None
        assert DRIVER is not None
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._driver.stdout is not None
        said = ""
        for line in self._driver.stdout:
            said += line
            if match := re.search(r"started successfully on port (\d+)", line):
                break
        else:
            raise AssertionError(f"chromedriver did not start: {said}")
        self._base = f"http://127.0.0.1:{match[1]}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": [*arguments, f"--window-size={width},{height}"]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._driver.kill()
            raise
        self._base += f"/session/{made['sessionId']}"
        self.size(width, height)

    def stop(self) -> None:
        try:
            self._call("DELETE", "", None)
        finally:
            self._driver.kill()
            self._driver.communicate()

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of ``return ...`` in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        value: str = self.run("return document.querySelector(arguments[0]).innerText", selector)
        return value

    def wait(self, script: str, what: str) -> None:
        """Until ``script``, an expression, is true."""
        wait_until(lambda: bool(self.run(f"return {script}")), what)

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replace what is in a field."""
        element = self._find(selector)
        self._call("POST", f"/element/{element}/clear", {})
        self._call("POST", f"/element/{element}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys one after the other, to whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def move(self, selector: str, x: int, y: int) -> None:
        """The pointer, to a place from the element's upper left corner."""
        box = self.run("const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.left, b.top]", selector)
        move = {"type": "pointerMove", "duration": 0, "origin": "viewport", "x": int(box[0]) + x, "y": int(box[1]) + y}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def tap(self, selector: str, x: int, y: int) -> None:
        """With a finger, at a place from the element's upper left corner."""
        box = self.run("const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.left, b.top]", selector)
        move = {"type": "pointerMove", "duration": 0, "origin": "viewport", "x": int(box[0]) + x, "y": int(box[1]) + y}
        actions = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        finger = {"type": "pointer", "id": "finger", "parameters": {"pointerType": "touch"}, "actions": actions}
        self._call("POST", "/actions", {"actions": [finger]})

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def media(self, **features: str) -> None:
        """For example prefers_color_scheme="dark"."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.command("Emulation.setEmulatedMedia", features=told)

    def command(self, name: str, **parameters: Any) -> Any:
        """One of the Chrome DevTools Protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot", None)))

    def complaints(self) -> list[str]:
        """What was written to the console since the last call, warnings and errors."""
        return [entry["message"] for entry in self._log("browser") if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """URLs that were asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._call("POST", "/se/log", {"type": kind})
        return entries

    def _find(self, selector: str) -> str:
        found: str = self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        return found

    def _call(self, method: str, path: str, body: object) -> Any:
        answer = http.request(method, self._base + path, json=body, timeout=DEADLINE_S)
        value = answer.json()["value"]
        assert answer.status_code == 200, f"{method} {path}: {value}"
        return value
