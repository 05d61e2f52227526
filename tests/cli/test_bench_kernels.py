"""quire bench kernels, as a process, on the smallest shapes: the table, the JSON, the filters, errors. Never how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--model", "llama-160m", "--rows", "1", "--rounds", "1")


def bench(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "quire.cli.main", "bench", "kernels", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, timeout=300)


def results(*args: str, **environ: str) -> dict[str, Any]:
    done = bench(*args, "--json", "-", **environ)
    assert (done.returncode, done.stderr) == (0, "")
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_the_table_and_the_json_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    done = bench(*SMALL, "--kernel", "norm,rotary", "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    run = json.loads(path.read_text())
    assert [(r["kernel"], r["name"], r["rows"]) for r in run["results"]] == [
        ("norm", "RMS 768", 1),
        ("rotary", "16 heads of 64", 1),
    ]
    for r in run["results"]:
        assert any(line.startswith(r["kernel"]) and r["name"] in line and r["bound"] in line for line in done.stdout.splitlines())
        assert 0 < r["seconds"] <= r["seconds_median"]
        assert r["fraction"] > 0
    assert run["limits"]["threads"] <= len(os.sched_getaffinity(0))
    assert f"{run['limits']['isa']}, " in done.stdout


def test_linears_read_their_weights_from_memory() -> None:
    run = results(*SMALL, "--kernel", "linear", "--dtype", "float32,bfloat16")
    found = {(r["name"].split()[0], r["dtype"]): r for r in run["results"]}
    assert set(found) == {(name, dtype) for name in ("qkv", "o", "gate+up", "down", "lm_head") for dtype in ("float32", "bfloat16")}
    qkv = found["qkv", "float32"]
    assert qkv["name"] == "qkv 1280x768"
    assert qkv["gb_per_s"] * qkv["seconds"] * 1e9 == pytest.approx(4 * 1280 * 768)
    assert qkv["g_operations_per_s"] * qkv["seconds"] * 1e9 == pytest.approx(2 * 1280 * 768)
    assert found["qkv", "bfloat16"]["gb_per_s"] * found["qkv", "bfloat16"]["seconds"] * 1e9 == pytest.approx(2 * 1280 * 768)


def test_every_kernel_runs_in_every_width_that_there_is() -> None:
    """Widths that this build lacks are named, and left out."""
    run = results("--model", "llama-160m", "--rows", "2", "--rounds", "1", QUIRE_ISA="")
    kernels = {r["kernel"] for r in run["results"]}
    assert kernels == {"linear", "attention", "norm", "rotary", "write_kv", "sampling"}
    for kernel in ("linear", "attention", "write_kv"):
        widths = {r["dtype"] for r in run["results"] if r["kernel"] == kernel}
        assert widths >= {"float32", "float16", "bfloat16"}
        for width in ("int8", *(["int4", "int4+offsets", "mxfp4"] if kernel == "linear" else [])):
            assert (width in widths) != any(line.startswith(f"{kernel} {width}: this build's") for line in run["skipped"])
    decode = next(r for r in run["results"] if r["name"] == "decode at 512" and r["dtype"] == "float16")
    assert decode["gb_per_s"] * decode["seconds"] * 1e9 == pytest.approx(2 * 512 * 2 * 4 * 64 * 2)


def test_another_instruction_set_and_prefill() -> None:
    small = ("--model", "llama-160m", "--rows", "512", "--rounds", "1", "--kernel", "attention", "--dtype", "float16")
    run = results(*small, "--threads", "1", QUIRE_ISA="portable")
    assert (run["limits"]["isa"], run["limits"]["threads"]) == ("portable", 1)
    assert [(r["name"], r["rows"]) for r in run["results"]] == [("prefill", 512)]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "llama-7b"], "--model 'llama-7b' is unknown; choose from: llama-160m, llama-0.5b, Llama-3.2-1B, Qwen3-0.6B"),
        (["--dtype", "float32,float8"], "--dtype 'float8' is unknown; choose from: float32"),
        (["--kernel", "conv"], "--kernel 'conv' is unknown; choose from: linear"),
        (["--rows", "1,x"], "--rows must be numbers from 1 to 4096 with commas between them"),
        (["--rows", "0"], "--rows must be numbers from 1 to 4096 with commas between them"),
        (["--rounds", "0"], "--rounds must be from 1 to 1000, got 0"),
        (["--group-size", "48"], "--group-size 48 is not supported"),
        (["--group-size", "0", "--dtype", "int4"], "--group-size 0 is for int8"),
        (["--threads", "256"], "--threads 256 is more than the"),
        (["--json", "no/such/folder/x.json"], "can't write no/such/folder/x.json"),
    ],
)
def test_wrong_use(args: list[str], says: str) -> None:
    done = bench(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("quire: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
