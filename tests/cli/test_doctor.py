"""quire doctor, as a process: what it prints, the shape of its JSON, and what wrong use gets. Never how fast the machine is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CPUS = len(os.sched_getaffinity(0))


def quire(*args: str, cpus: set[int] | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "quire.cli.main", *args]
    bind = None if cpus is None else lambda: os.sched_setaffinity(0, cpus)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, timeout=120, preexec_fn=bind)


def test_the_report_says_what_the_machine_can_do(tmp_path: Path) -> None:
    done = quire("doctor", "--json", str(tmp_path / "report.json"))
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("cpu ", "threads ", "caches ", "reading memory, GB/s", "arithmetic", "parallel region, µs"):
        assert part in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]["cpus_affinity"] == CPUS
    threads = report["threads"]
    assert threads == report["machine"]["default_threads"] <= CPUS
    assert report["bandwidth"][0]["threads"] == 1
    assert report["bandwidth"][-1]["threads"] == threads
    assert report["bandwidth_buffer"] > 2 * max(c["bytes"] for c in report["machine"]["caches"])
    peaks = {p["isa"]: p for p in report["peaks"]}
    assert set(report["machine"]["isas"]) <= set(peaks)
    for figures in (*peaks.values(), *report["bandwidth"], report["regions_us"]):
        assert all(figure > 0 for figure in figures.values() if not isinstance(figure, str))


def test_json_goes_to_standard_output_too() -> None:
    done = quire("doctor", "--threads", "1", "--json", "-", cpus={min(os.sched_getaffinity(0))})
    report = json.loads(done.stdout)
    assert report["threads"] == report["machine"]["cpus_affinity"] == 1
    assert [b["threads"] for b in report["bandwidth"]] == [1]
    assert report["peaks"][0]["float32"] == report["peaks"][0]["float32_one_thread"]
    if report["machine"]["cpus_online"] > 1:
        assert any(f"1 of {report['machine']['cpus_online']} CPUs" in note for note in report["notes"])


def test_a_lesser_instruction_set_is_noted() -> None:
    done = quire("doctor", "--json", "-", QUIRE_ISA="portable")
    report = json.loads(done.stdout)
    assert report["machine"]["isa"] == "portable"
    best = report["machine"]["isas"][0]
    noted = [note for note in report["notes"] if f"without it, {best} would be used" in note]
    assert bool(noted) == (best != "portable")


@pytest.mark.parametrize("command", ["doctor", "run -p x", "serve --port 0", "bench throughput --requests 1"])
def test_an_instruction_set_that_is_not_there_gets_one_line(command: str) -> None:
    done = quire(*command.split(), QUIRE_ISA="mmx")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("quire: QUIRE_ISA: instruction set 'mmx' is not available on this machine: choose one of ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["doctor", "run -p x", "serve --port 0", "bench throughput --requests 1"])
def test_more_threads_than_cores_gets_one_line_with_both_numbers(command: str) -> None:
    done = quire(*command.split(), "--threads", "2", cpus={min(os.sched_getaffinity(0))})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("quire: --threads 2 is more than the 1 core that this process may use")
    assert "lower it to at most 1, or leave it out" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--threads", "0"], "--threads must be from 1 to 256, got 0"),
        (["--threads", "many"], "invalid int value: 'many'"),
        (["--json", "no/such/folder/x.json"], "can't write no/such/folder/x.json"),
    ],
)
def test_wrong_use(args: list[str], says: str) -> None:
    done = quire("doctor", *args)
    assert done.returncode == 2
    assert done.stderr.startswith("quire: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
