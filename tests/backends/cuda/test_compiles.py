"""What the kernels become on an H100 or H200: the scripts beside this file say what must be so. pytest -s shows their tables.

In processes of their own, at the same time: in this one kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

GROUPS = ("attention", "experts", "launches", "layers", "sampling", "small")


@pytest.fixture(scope="module")
def processes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """QUIRE_COMPILE_ALL=1: every configuration of attention, in some minutes."""
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    del environment["TRITON_INTERPRET"]
    started = {}
    for group in GROUPS:
        command = [sys.executable, str(Path(__file__).with_name(f"compile_{group}.py"))]
        if group == "attention" and os.environ.get("QUIRE_COMPILE_ALL"):
            command.append("all")
        started[group] = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("group", GROUPS)
def test_compiles(group: str, processes: dict[str, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]) -> None:
    out, err = processes[group].communicate()
    with capsys.disabled():
        print("", out, sep="\n")
    assert processes[group].returncode == 0, out + err
