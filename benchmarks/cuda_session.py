"""Everything that is to be known of the CUDA backend on a GPU, in one run of at most nine minutes.

    python benchmarks/cuda_session.py [--out FOLDER] [--device cuda|torch-cpu] [--only PHASE,...] [--tiny] [--minutes 9]

Probes the device (copy bandwidth, bf16 products); checks every operation against float64 with fresh random inputs and poisoned outputs;
sweeps paged attention; times steps of models with random weights, with and without CUDA graphs and overlap; drains 256 requests; does
the same through transformers; looks whether results depend on the batch. A phase that fails says why, and the others go on. The full
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

import cuda_phases as phases  # noqa: E402
from quire.backends.cuda import limits  # noqa: E402
from quire.backends.cuda.device import make_deterministic, open_device, operations  # noqa: E402

WORKSPACE = ":16:8"
"""What ``make_deterministic`` gives cuBLAS."""


@dataclass
class Session:
    device: torch.device
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


def deterministic(session: Session) -> dict[str, Any]:
    """In a process of its own: cuBLAS asks for its workspace once."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") == WORKSPACE:
        return phases.deterministic(session)
    out = session.out / "deterministic"
    command = [sys.executable, __file__, "--only", "deterministic", "--out", str(out), "--minutes", str(session.left_s / 60)]
    command += ["--device", "cuda" if session.device.type == "cuda" else "torch-cpu", *(["--tiny"] if session.tiny else [])]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": WORKSPACE}
    done = subprocess.run(command, env=environment, timeout=session.left_s, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-300:])
    found = json.loads((out / "session.json").read_text())
    for row in found["table"]:
        session.note(*row)
    result: dict[str, Any] = found["deterministic"]
    return result


def give_up(session: Session) -> None:
    """Something hangs, or takes longer than there is time: what is known is kept."""
    session.note("time", "is up")
    faulthandler.dump_traceback(all_threads=True)
    session.save()
    session.table()
    os._exit(1)


PHASES: dict[str, Callable[[Session], Any]] = {
    "probe": probe,
    "check": phases.check,
    "attention": phases.attention,
    "steps-0.6B": lambda session: phases.steps(session, "Qwen3-0.6B"),
    "steps-8B": lambda session: phases.steps(session, "Llama-3.1-8B"),
    "steps-1B": lambda session: phases.steps(session, "Llama-3.2-1B"),
    "deterministic": deterministic,
    "transformers": phases.transformers,
}
NEEDS_S = {"attention": 40, "steps-0.6B": 60, "steps-8B": 75, "steps-1B": 60, "deterministic": 50, "transformers": 60}
"""Seconds without which a phase is not begun, generously."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cuda-session"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "torch-cpu"))
    parser.add_argument("--only", default=",".join(PHASES), help=f"phases, of {', '.join(PHASES)}")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") == WORKSPACE:
        make_deterministic()
    device = open_device(args.device)
    session = Session(device, operations(device), args.tiny, args.out, began + 60 * args.minutes)
    timer = threading.Timer(max(0.0, session.left_s - 5), give_up, [session])
    timer.daemon = True
    timer.start()
    failed = []
    for name in args.only.split(","):
        start = time.monotonic()
        if not args.tiny and session.left_s < NEEDS_S.get(name, 0):
            session.note(name, f"left out: {session.left_s:.0f} s are left")
            continue
        session.found = {}
        print(f"{name} ({session.left_s:.0f} s left)", flush=True)
        try:
            session.results[name] = PHASES[name](session)
        except Exception as error:
            failed.append(name)
            session.results[name] = session.found | {"error": traceback.format_exc()}
            session.note(name, f"FAILED: {type(error).__name__}: {str(error)[:300]}")
        phases.free()  # what a failed phase held, its frames among them, is garbage now
        session.results.setdefault("seconds", {})[name] = time.monotonic() - start
        session.save()
    timer.cancel()
    print(f"\n{time.monotonic() - began:.0f} s")
    session.table()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
