"""quire bench throughput, end to end on the embedded model, and what it gets for bad options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.cli.main import main

SMALL = ["--requests", "5", "--prompt-mean", "12", "--output-mean", "6", "--cap", "20", "--kv-memory", "32MiB"]


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    file = tmp_path / "result.json"
    assert main(["bench", "throughput", *SMALL, "--seed", "3", "--max-num-seqs", "2", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    result = json.loads(file.read_text())
    tokens = result["prompt_tokens"] + result["output_tokens"]
    assert result["requests"] == 5
    assert result["total_tokens_per_s"] == pytest.approx(tokens / result["elapsed_s"])
    assert result["output_tokens_per_s"] == pytest.approx(result["output_tokens"] / result["elapsed_s"])
    assert 1 <= result["mean_batch"] <= 2
    assert 0 < result["kv"]["used_of_allocated"] <= 1
    assert 0 < result["kv"]["used_of_pool"] <= result["kv"]["peak_used_of_pool"] <= 1
    assert 0 < result["backend_s"] <= result["elapsed_s"]
    assert result["reached_fraction"] > 0
    assert (result["workload"]["seed"], result["engine"]["max_num_seqs"]) == (3, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--prompt-mean", "600"], "from 1 to the longest length 512, got 600"),
        (["--output-mean", "nan"], "got nan"),
        (["--sigma", "-1"], "sigma must be from 0 to 4"),
        (["--block-size", "5"], "--block-size 5 is not supported"),
    ],
)
def test_bad_options(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", *options]) == 2
    assert says in capsys.readouterr().err


def test_throughput_shows_what_was_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    options = ["--requests", "1", "--prompt-mean", "12", "--output-mean", "200", "--sigma", "0", "--kv-memory", "32MiB"]
    assert main(["bench", "throughput", *options]) == 0
    assert "--speculation" in capsys.readouterr().out
    assert main(["bench", "throughput", *options, "--speculation", "off"]) == 0
    assert "--speculation" not in capsys.readouterr().out
