"""quire plan and quire simulate from the command line, and the file that quire bench steps makes for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.cli.main import main
from quire.machine import Machine
from sample_models import LLAMA

QUICK = ["--requests", "12", "--prompt-mean", "20", "--output-mean", "10", "--cap", "40"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model of which there is only config.json."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def test_plan_of_a_gpu_needs_config_json_only(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--machine", "h100", "--price", "2.5", "--sequences", "20"]) == 0
    shown = capsys.readouterr().out
    for expected in ("machine      H100", "KV pool", "capacity", "cost", "needed", "other widths", "other GPUs", "rtx4090", "fp8, KV fp8"):
        assert expected in shown, expected


def test_plan_of_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    file = tmp_path / "plan.json"
    assert main(["plan", "--kv-memory", "32MiB", "--json", str(file)]) == 0
    assert "this machine" in capsys.readouterr().out
    made = json.loads(file.read_text())
    assert made["plan"]["pool"] <= 32 << 20
    assert made["plan"]["requests_per_s"] > 0
    assert set(made["widths"]) >= {"int8, KV int8", "int4, KV float16"}
    assert made["machine"]["bytes_per_s"] > 1e8


def test_plan_says_what_does_not_fit(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    assert main(["plan", folder, "--kv-memory", "64KiB"]) == 1
    assert "does not fit --kv-memory 64KiB holds" in capsys.readouterr().out
    assert main(["plan", folder, "--memory", "1KiB"]) == 1
    assert "take a smaller model" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--machine", "h999"], "nor a device that is known by name"),
        (["--machine", "h100", "--device", "cpu"], "--machine h100 is for --device cuda, not cpu"),
        (["--device", "cuda"], "say which GPU with --machine"),
        (["--machine", "h100", "--quantize", "int4"], "--quantize int4 is not there with --device cuda"),
        (["--machine", "h100", "--tensor-parallel", "4"], "--tensor-parallel 4 does not divide the model's 6 attention heads: choose 2"),
        (["--machine", "h100", "--memory", "lots"], "'lots' is not a size"),
        (["--machine", "h100", "--max-model-len", "99999"], "> the model's context of 4,096 tokens"),
    ],
)
def test_wrong_use_of_both(command: str, options: list[str], says: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, folder, *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_simulate(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    options = ["--machine", "l4", "--rate", "50", "--goodput", "ttft:100", "tpot:50", "--json", str(file)]
    assert main(["simulate", folder, *QUICK, *options]) == 0
    shown = capsys.readouterr().out
    for expected in ("requests     12 of 12", "ttft", "itl", "goodput      100.0%", "preemptions", "if steps take 20% less", "25% more"):
        assert expected in shown, expected
    made = json.loads(file.read_text())
    assert made["simulated"]["completed"] == 12
    assert made["simulated"]["goodput"] == 1.0
    assert made["measured"] is None


def test_simulate_finds_the_highest_rate(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--machine", "L4", "--requests", "200", "--max-num-seqs", "2", "--find-rate", "--goodput", "e2el:30"]
    assert main(["simulate", folder, *QUICK, *options, "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert 0 < made["steps take"]["25% more"]["rate"] < made["rate"] < made["steps take"]["20% less"]["rate"]
    assert main(["simulate", folder, *QUICK, *options]) == 0
    assert f"rate         {made['rate']:.3g} requests a second at most" in capsys.readouterr().out


def test_swapping_is_said_to_be_left_out(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", folder, *QUICK, "--machine", "l4", "--swap-memory", "1MiB"]) == 0
    assert "--swap-memory is not simulated" in capsys.readouterr().out


def test_the_first_of_a_trace_are_those_that_come_first(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("t_s,prompt,output\n9,50,5\n1,60,6\n2,70,7\n")
    assert main(["simulate", folder, "--machine", "l4", "--trace", str(trace), "--requests", "2", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated"]["prompt_tokens"] == 130


def test_simulate_a_trace(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("t_s,prompt,output\n100,50,5\n101,60,6\n104,70,7\n")
    assert main(["simulate", folder, "--machine", "l4", "--trace", str(trace), "--speedup", "2", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["simulated"]
    assert (found["completed"], found["prompt_tokens"], found["output_tokens"]) == (3, 180, 18)
    assert 2.0 < found["seconds"] < 2.2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "0"], "--rate must be above 0"),
        (["--rate", "1", "--concurrency", "2"], "--rate and --concurrency both say when requests come"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--find-rate"], "--find-rate needs to know what is good enough"),
        (["--find-rate", "--goodput", "ttft:5", "--check"], "--check runs one load"),
        (["--speedup", "2"], "--speedup is for a --trace"),
        (["--goodput", "fast"], "write a latency and milliseconds"),
        (["--dist", "nothing"], "no built-in workload"),
        (["--json", "/nonexistent/x.json"], "can't write /nonexistent/x.json"),
    ],
)
def test_wrong_use_of_simulate(options: list[str], says: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", folder, "--machine", "l4", *options]) == 2
    assert says in capsys.readouterr().err


def test_steps_make_a_machine_that_plan_and_simulate_take(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    file = str(tmp_path / "machine.json")
    small = ["--kv-memory", "48MiB", "--max-num-seqs", "4", "--max-num-batched-tokens", "128"]
    assert main(["bench", "steps", *small, "--rounds", "2", "--json", file]) == 0
    shown = capsys.readouterr().out
    assert "of limit" in shown
    machine = Machine.load(file)
    assert (machine.device, machine.weights) == ("cpu", load_width())
    assert len(machine.reached) >= 4
    cases = json.loads(Path(file).read_text())["cases"]
    assert {(case["sequences"], case["positions"]) for case in cases} >= {(1, 1), (2, 2), (4, 4), (1, 64), (1, 128)}
    assert main(["plan", "--machine", file, *small]) == 0
    assert "measured with embedded" in capsys.readouterr().out
    assert main(["simulate", "--machine", file, *small, *QUICK, "--check"]) == 0
    assert "simulated    measured" in capsys.readouterr().out
    assert main(["plan", "--machine", file, "--quantize", "int8"]) == 2
    assert "was measured with weights in" in capsys.readouterr().err


def test_steps_of_small_chunks_and_machines_of_any_width(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    file = tmp_path / "machine.json"
    small = ["--kv-memory", "16MiB", "--max-num-batched-tokens", "16", "--max-model-len", "64"]
    assert main(["bench", "steps", *small, "--rounds", "1", "--json", str(file)]) == 0
    made = json.loads(file.read_text())
    file.write_text(json.dumps({"machine": made["machine"] | {"weights": ""}}))
    capsys.readouterr()
    assert main(["plan", "--machine", str(file)]) == 0
    assert "int4, KV int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rounds", "0"], "--rounds must be from 1 to 1000"),
        (["--rounds", "1001"], "--rounds must be from 1 to 1000"),
        (["--max-num-batched-tokens", "8"], "steps can be told apart from"),
        (["--max-model-len", "20"], "steps can be told apart from"),
    ],
)
def test_wrong_use_of_steps(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    assert main(["bench", "steps", "--kv-memory", "16MiB", *options]) == 2
    assert says in capsys.readouterr().err


def load_width() -> str:
    from quire.models.weights import load_spec, resolve_model

    return load_spec(resolve_model("embedded")).dtype
