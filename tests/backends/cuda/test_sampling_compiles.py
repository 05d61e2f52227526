"""The sampler's kernels compile for sm_90, in registers alone, and read a row in loads of 128 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "compile_sampling.py"
MAX_REGISTERS = {"scan": 64, "_draw": 128, "_list_wanted": 128, "_draw_truncated": 128, "_pick": 128, "_place": 128, "_restrict": 80}
WIDE = {"scan", "_draw", "_list_wanted", "_draw_truncated", "_count_greater"}
"""Where rows are aligned: the vocabulary is a multiple of 16."""


def test_compiles_for_sm_90(capsys):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[3]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    with capsys.disabled():
        print("\nkernel                 warps  registers  shared  128-bit loads  seconds")
        for name, k in found.items():
            print(f"{name:22} {k['warps']:5} {k['registers']:10} {k['shared']:7} {k['wide_loads']:14} {k['seconds']:8}")
    for name, k in found.items():
        kernel = name.split()[0]
        assert k["stack"] == 0, name
        assert k["registers"] <= MAX_REGISTERS.get(kernel, 48), name
        assert k["shared"] <= 32 * 1024, name
        assert k["wide_loads"] or kernel not in WIDE, name
