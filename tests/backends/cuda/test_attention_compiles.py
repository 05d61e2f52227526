"""The attention kernels compile for sm_90 without spills, with tensor cores, and with loads that run ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_attention_compiles(tmp_path: Path, root: Path) -> None:
    """QUIRE_COMPILE_ALL=1: every configuration, in some minutes. In a process of its own: kernels are interpreted in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(TESTS / "attention_compiles.py")] + ["all"] * bool(os.environ.get("QUIRE_COMPILE_ALL"))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
