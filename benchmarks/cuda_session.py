"""Everything that is to be known of the CUDA backend on a GPU, in one run of at most nine minutes.

    python benchmarks/cuda_session.py [--out FOLDER] [--device cuda|torch-cpu] [--only PHASE,...] [--tiny] [--minutes 9]

Probes the device (copy bandwidth, bf16 products); checks operations against float64, or their
reference, with fresh random inputs and poisoned outputs;
sweeps paged attention; times steps of models with random weights, with and without CUDA graphs and overlap; drains 256 requests; does
the same through transformers; looks whether results depend on the batch. Each phase has a process of its own: one
that fails, or hangs, says so, and the others go on. The full
figures are in session.json, the table comes last. --tiny: small sizes, to try the script itself without a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402

import cuda_kernels  # noqa: E402
import cuda_steps  # noqa: E402
from quire.backends.cuda import limits  # noqa: E402
from quire.backends.cuda.device import open_device, operations  # noqa: E402


@dataclass
class Session:
    device: Any
    ops: Any
    tiny: bool
    out: Path
    end: float
    """By time.monotonic()."""
    results: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    """Of the phase that runs: what it has found stays where it fails."""
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(what, measured, reference) of the table."""

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def note(self, what: str, measured: str, reference: str = "") -> None:
        self.rows.append((what, measured, reference))
        print(f"  {what}: {measured}", flush=True)

    def table(self) -> None:
        width = max(len(what) for what, _, _ in self.rows)
        for what, measured, reference in self.rows:
            print(f"{what:{width}}  {measured}" + (f"   [{reference}]" if reference else ""))
        sys.stdout.flush()

    def save(self) -> None:
        (self.out / "session.json").write_text(json.dumps(self.results | {"table": self.rows}, indent=1))


def probe(session: Session) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if session.device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(session.device)
        found |= {"card": properties.name, "multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
        found |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        session.note("card", f"{properties.name}, torch {torch.__version__}, triton {triton.__version__}")
    found["copy_bandwidth"] = limits.copy_bandwidth(session.device)
    found["matmul_peak"] = limits.matmul_peak(session.device, torch.bfloat16)
    session.note("copy bandwidth", f"{found['copy_bandwidth'] / 1e12:.2f} TB/s", "4.3 TB/s (H200)")
    session.note("bf16 products", f"{found['matmul_peak'] / 1e12:.0f} TFLOP/s", "788 TFLOP/s (H200)")
    return found


def give_up(session: Session, name: str) -> None:
    """Something hangs, or takes longer than there is time: what is known is kept."""
    session.note(name, "FAILED: its time is up")
    session.results[name] = session.found | {"error": "time"}
    faulthandler.dump_traceback(all_threads=True)
    session.save()
    os._exit(1)


PHASES: dict[str, Callable[[Session], Any]] = {
    "probe": probe,
    "check": cuda_kernels.check,
    "others": cuda_kernels.others,
    "attention": cuda_kernels.attention,
    "steps-0.6B": lambda session: cuda_steps.steps(session, "Qwen3-0.6B"),
    "steps-8B": lambda session: cuda_steps.steps(session, "Llama-3.1-8B"),
    "steps-1B": lambda session: cuda_steps.steps(session, "Llama-3.2-1B"),
    "deterministic": cuda_steps.deterministic,
    "transformers": cuda_steps.transformers,
}
NEEDS_S = {"attention": 40, "steps-0.6B": 60, "steps-8B": 75, "steps-1B": 60, "deterministic": 60, "transformers": 60}
"""Seconds without which a phase is not begun, generously."""
MOST_S = {
    "check": 120,
    "others": 120,
    "attention": 120,
    "steps-0.6B": 150,
    "steps-8B": 150,
    "steps-1B": 120,
    "deterministic": 90,
    "transformers": 240,
}
"""After which it ends: what hangs should not take the others' time."""


START_S = 12
"""That a process takes to import what it needs: its time begins after that."""


def here(session: Session, name: str) -> int:
    """One phase, in this process."""
    timer = threading.Timer(max(1.0, session.left_s), give_up, [session, name])
    timer.daemon = True
    timer.start()
    try:
        session.results[name] = PHASES[name](session)
        code = 0
    except Exception as error:
        session.results[name] = session.found | {"error": traceback.format_exc()}
        session.note(name, f"FAILED: {type(error).__name__}: {str(error)[:300]}")
        code = 1
    timer.cancel()
    session.save()
    return code


def apart(session: Session, name: str, options: list[str]) -> bool:
    """One phase, in a process of its own: a kernel that reads where it may not leaves a process without its device."""
    limit = min(MOST_S.get(name, 60), session.left_s - 5)
    out = session.out / name
    (out / "session.json").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--here", "--only", name, "--out", str(out), "--minutes", str((limit - START_S) / 60), *options]
    how = "its time is up"
    try:
        done = subprocess.run(command, timeout=limit + 4, check=False)
        how = f"it ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        pass
    try:
        found = json.loads((out / "session.json").read_text())
    except (OSError, ValueError):
        session.note(name, f"FAILED: {how}")
        return False
    session.results[name] = found[name]
    session.rows += map(tuple, found["table"])
    return "error" not in found[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cuda-session"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "torch-cpu"))
    parser.add_argument("--only", default=",".join(PHASES), help=f"phases, of {', '.join(PHASES)}")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--here", action="store_true", help="one phase, in this process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    end = began + 60 * args.minutes
    if args.here:
        device = open_device(args.device)
        return here(Session(device, operations(device), args.tiny, args.out, end), args.only)
    session = Session(None, None, args.tiny, args.out, end)
    failed = []
    for name in args.only.split(","):
        start = time.monotonic()
        if not args.tiny and session.left_s < NEEDS_S.get(name, 0):
            session.note(name, f"left out: {session.left_s:.0f} s are left")
            continue
        print(f"{name} ({session.left_s:.0f} s left)", flush=True)
        if not apart(session, name, ["--device", args.device, *(["--tiny"] if args.tiny else [])]):
            failed.append(name)
        session.results.setdefault("seconds", {})[name] = time.monotonic() - start
        session.save()
    print(f"\n{time.monotonic() - began:.0f} s")
    session.table()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
