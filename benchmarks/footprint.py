"""How light an installation is: its size, the time of imports and of --help, and the cold start of the server.

    python benchmarks/footprint.py --venv .venv [--json FILE] [--rounds 5] [--model FOLDER]

The environment must hold Quire and what it needs, nothing else (``make serve`` makes such a one). The cold start is from the
start of the ``quire serve`` process to the first streamed token of the embedded model. Medians of the rounds; each round
starts fresh processes; files are in the page cache, as they are on the second start of a machine.

--model: how long that model takes from the start of a Python process until it is ready to run (LLM made), with its files in
the page cache and without, beside the time of reading them from the disk; and the memory that is resident then, and at most.
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
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


READY = """
import sys
from quire import LLM
llm = LLM(sys.argv[1])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("ready", int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024, llm.backend.weight_bytes(), flush=True)
sys.stdin.read()
"""


def ready_seconds(python: str, model: Path) -> tuple[float, int, int, int]:
    """From the start of the process until the model is ready; bytes resident then, at most, and of packed weights."""
    start = time.perf_counter()
    with subprocess.Popen([python, "-c", READY, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        seconds = time.perf_counter() - start
    if not line:
        raise SystemExit(f"{model} could not be loaded")
    return seconds, int(line[1]), int(line[2]), int(line[3])


def forget(files: list[Path]) -> None:
    """Out of the page cache with them; a file that was just written has to reach the disk first."""
    for file in files:
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(files: list[Path]) -> float:
    start, buffer = time.perf_counter(), bytearray(4 << 20)
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - start


def model_figures(python: str, model: Path, rounds: int) -> dict[str, float]:
    """Reading cold, ready cold and ready warm take turns; memory is that of the last round."""
    files = sorted(model.glob("*.safetensors"))
    reading, cold, warm = [], [], []
    for _ in range(rounds):
        forget(files)
        reading.append(read_seconds(files))
        forget(files)
        cold.append(ready_seconds(python, model)[0])
        seconds, resident, most, weights = ready_seconds(python, model)
        warm.append(seconds)
    times = {"model_read_s": reading, "model_ready_cold_s": cold, "model_ready_warm_s": warm}
    memory = {"model_packed_gb": weights / 1e9, "model_resident_gb": resident / 1e9, "model_most_resident_gb": most / 1e9}
    return {name: statistics.median(values) for name, values in times.items()} | memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, help="a model folder, to measure its start too")
    args = parser.parse_args()
    python, quire = (os.fspath(args.venv.resolve() / "bin" / name) for name in ("python", "quire"))
    total, largest = installed_bytes(args.venv)

    def median(measure: Callable[[], float]) -> float:
        return statistics.median(measure() for _ in range(args.rounds))

    figures: dict[str, Any] = {
        "installed_mb": total / 1e6,
        "largest_mb": {name: size / 1e6 for name, size in largest.items()},
        "import_quire_ms": 1e3 * median(lambda: import_seconds(python)),
        "python_startup_s": median(lambda: seconds([python, "-c", "pass"])),
        "help_s": median(lambda: seconds([quire, "--help"])),
        "cold_start_to_first_token_s": median(lambda: cold_start_seconds(quire)),
    }
    if args.model:
        figures |= model_figures(python, args.model, args.rounds)
    for name, value in figures.items():
        print(f"{name:28} {value if isinstance(value, dict) else round(value, 3)}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
