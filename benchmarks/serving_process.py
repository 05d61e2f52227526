"""A ``quire serve`` process to try things on: started, watched from outside, and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import quire

PACKAGE = Path(quire.__file__).resolve().parents[1]
PATIENCE_S = 120.0


class ServeProcess:
    """Listens on a free port of this machine; ready when made."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        path = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quire.cli.main", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path} | (environment or {}),
        )  # fmt: skip
        assert self.process.stdout is not None
        banner = ""
        for line in self.process.stdout:
            banner += line
            if "Ctrl-C" in line:
                break
        match = re.search(r"http://[\w.\[\]:]+:(\d+)", banner)
        if match is None:
            raise SystemExit(f"the server did not start: exit code {self.process.wait()}")
        self.port = int(match[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def engine_pid(self) -> int | None:
        """None while there is none."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for pid in map(int, (task / "children").read_text().split()):
                    if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes() and not _is_zombie(pid):
                        return pid
        return None

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    def health(self) -> dict[str, Any]:
        return self.get("/health")[1]

    def wait(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
        """Until ``condition``; False where it did not come true in time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def wait_clean(self) -> bool:
        """Until nothing runs or waits, and every block is free."""

        def clean() -> bool:
            now = self.health()
            return (now.get("running"), now.get("waiting"), now.get("kv_blocks_used")) == (0, 0, 0)

        return self.wait(clean)

    def memory(self) -> dict[str, float]:
        """MiB of both processes: resident, and what of it is theirs alone or their part of what is shared (PSS)."""
        made = {}
        for name, pid in (("front", self.process.pid), ("engine", self.engine_pid())):
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
            made[f"{name} RSS"], made[f"{name} PSS"] = (int(fields[key].split()[0]) / 1024 for key in ("Rss", "Pss"))
        return made

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.communicate()


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@contextlib.contextmanager
def serving(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[ServeProcess]:
    server = ServeProcess(*arguments, environment=environment)
    try:
        yield server
    finally:
        server.stop()
