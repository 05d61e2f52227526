"""Everything that is to be known of the CUDA backend on a GPU, in one run of at most nine minutes.

    python benchmarks/cuda_session.py [--out FOLDER] [--device cuda|torch-cpu] [--only PHASE,...] [--tiny] [--minutes 9]

Probes the device (copy bandwidth, bf16 products); checks every operation against float64 with fresh random inputs and poisoned outputs;
sweeps paged attention; times steps of models with random weights, with and without CUDA graphs and overlap; drains 256 requests; does
the same through transformers; looks whether results depend on the batch. A phase that fails says why, and the others go on. The full
figures are in session.json, the table comes last. --tiny: small sizes, to try the script itself without a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
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
from quire.backends.cuda.device import open_device, operations  # noqa: E402


@dataclass
class Session:
    device: torch.device
    ops: Any
    tiny: bool
    out: Path
    end: float
    """By time.monotonic()."""
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(what, measured, reference) of the table."""

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def note(self, what: str, measured: str, reference: str = "") -> None:
        self.rows.append((what, measured, reference))
        print(f"  {what}: {measured}", flush=True)

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


PHASES: dict[str, Callable[[Session], Any]] = {
    "probe": probe,
    "check": phases.check,
    "attention": phases.attention,
    "steps-0.6B": lambda session: phases.steps(session, "Qwen3-0.6B"),
    "steps-8B": lambda session: phases.steps(session, "Llama-3.1-8B"),
    "steps-1B": lambda session: phases.steps(session, "Llama-3.2-1B"),
    "transformers": phases.transformers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cuda-session"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "torch-cpu"))
    parser.add_argument("--only", default=",".join(PHASES), help=f"phases, of {', '.join(PHASES)}")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = open_device(args.device)
    began = time.monotonic()
    session = Session(device, operations(device), args.tiny, args.out, began + 60 * args.minutes)
    failed = []
    for name in args.only.split(","):
        start = time.monotonic()
        print(f"{name} ({session.left_s:.0f} s left)", flush=True)
        try:
            session.results[name] = PHASES[name](session)
        except Exception as error:
            failed.append(name)
            session.results[name] = {"error": traceback.format_exc()}
            session.note(name, f"FAILED: {type(error).__name__}: {str(error)[:300]}")
        session.results.setdefault("seconds", {})[name] = time.monotonic() - start
        session.save()
    width = max(len(what) for what, _, _ in session.rows)
    print(f"\n{time.monotonic() - began:.0f} s")
    for what, measured, reference in session.rows:
        print(f"{what:{width}}  {measured}" + (f"   [{reference}]" if reference else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
