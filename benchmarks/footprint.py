"""How light an installation is: its size, the time of imports and of --help, and the cold start of the server.

    python benchmarks/footprint.py --venv .venv [--json FILE] [--rounds 5]

The environment must hold Quire and what it needs, nothing else (``make serve`` makes such a one). The cold start is from the
start of the ``quire serve`` process to the first streamed token of the embedded model. Medians of the rounds; each round
starts fresh processes; files are in the page cache, as they are on the second start of a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def import_seconds(python: str) -> float:
    """Time of ``import quire`` inside a running interpreter."""
    code = "import time; t = time.perf_counter(); import quire; print(time.perf_counter() - t)"
    return float(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout)


def installed_bytes(venv: Path) -> tuple[int, dict[str, int]]:
    """Bytes of all files below site-packages without pip's own (pip is the installer), and of the largest packages."""
    site = next(venv.glob("lib/python*/site-packages"))
    sizes: dict[str, int] = {}
    for path in site.rglob("*"):
        if path.is_file() and not path.is_symlink():
            top = path.relative_to(site).parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    sizes = {name: size for name, size in sizes.items() if not re.match(r"(pip|setuptools)\b", name)}
    return sum(sizes.values()), dict(sorted(sizes.items(), key=lambda item: -item[1])[:8])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def cold_start_seconds(quire: str) -> float:
    """From the start of the process to the first streamed token."""
    port = free_port()
    body = json.dumps({"model": "embedded", "prompt": "def fibonacci(n):", "max_tokens": 8, "stream": True}).encode()
    start = time.perf_counter()
    server = subprocess.Popen([quire, "serve", "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=30) as response:
                    for line in response:
                        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                            return time.perf_counter() - start
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with exit code {server.returncode}") from None
                if time.perf_counter() - start > 60:
                    raise SystemExit("no token within 60 s") from None
                time.sleep(0.01)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    python, quire = (os.fspath(args.venv.resolve() / "bin" / name) for name in ("python", "quire"))
    total, largest = installed_bytes(args.venv)

    def median(measure: object) -> float:
        assert callable(measure)
        return statistics.median(measure() for _ in range(args.rounds))

    figures = {
        "installed_mb": total / 1e6,
        "largest_mb": {name: size / 1e6 for name, size in largest.items()},
        "import_quire_ms": 1e3 * median(lambda: import_seconds(python)),
        "python_startup_s": median(lambda: seconds([python, "-c", "pass"])),
        "help_s": median(lambda: seconds([quire, "--help"])),
        "cold_start_to_first_token_s": median(lambda: cold_start_seconds(quire)),
    }
    for name, value in figures.items():
        print(f"{name:28} {value if isinstance(value, dict) else round(value, 3)}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
