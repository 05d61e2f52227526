"""quire bench memory: loads whose figures can be worked out by hand, the paper's, and what the command line gets and gives."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path

import pytest

from quire.bench import memory_device
from quire.bench.memory import QUEUE, run
from quire.bench.memory_load import Layout, Load, ended_by, layouts
from quire.bench.memory_tally import Tally
from quire.cli.main import main
from quire.core.engine import Engine
from quire.core.sequence import Sequence
from quire.outputs import SequenceOutput
from quire.workload import TraceRequest, draw_requests, paper_lengths

PAGED = Layout("paged", None, 4)


def equal(number: int, prompt: int = 4, output: int = 5) -> list[TraceRequest]:
    return [TraceRequest(None, prompt, output)] * number


def paper(name: str, number: int) -> list[TraceRequest]:
    return ended_by(draw_requests(number, *paper_lengths(name)), 2048)


def test_reservations_by_hand() -> None:
    """Requests of 4 + 5 tokens run in lockstep: 4, 5, 6, 7, 8 positions are computed, the last token's never is."""
    load = Load(equal(40), pool=64, max_len=16)
    most = run(load, Layout("max", "buddy"))
    assert most["mean_sequences"] == most["max_sequences"] == 4
    assert most["token_share"] == pytest.approx(4 * 6 / 64)
    assert most["reserved_share"] == pytest.approx(4 * 2 / 64)
    assert most["internal_share"] == pytest.approx(4 * 8 / 64)
    assert most["external_share"] == 0
    assert (most["steps"], most["counted_steps"]) == (50, 45), "all but the last four requests have somebody behind them"
    assert (most["useful_tokens"], most["preemptions"], most["saved_share"]) == (360, 0, 0)
    first_fit = run(load, Layout("oracle", "first-fit"))
    assert first_fit["mean_sequences"] == 7
    assert first_fit["internal_share"] == pytest.approx(7 / 64), "the last token's position"
    assert first_fit["external_share"] == pytest.approx(1 / 64)
    assert run(load, Layout("oracle", "buddy"))["mean_sequences"] == 4, "9 becomes 16"
    assert run(load, Layout("pow2", "first-fit"))["mean_sequences"] == 5, "4 + 8 each"


def test_paged_by_hand() -> None:
    """In blocks of 8, each request has one block; 3 + 3 tokens compute 3, 4, 5 positions."""
    result = run(Load(equal(16, 3, 3), pool=32, max_len=8, admission="watermark"), Layout("paged", None, 8))
    assert result["mean_sequences"] == 4
    assert result["token_share"] == pytest.approx(4 / 8)
    assert result["reserved_share"] == pytest.approx(1 / 8)
    assert result["internal_share"] == pytest.approx(3 / 8)
    assert result["external_share"] == 0


@pytest.mark.parametrize("layout", [PAGED, Layout("oracle", "first-fit"), Layout("pow2", "buddy")])
@pytest.mark.parametrize("n", [1, 3])
def test_the_sums_are_what_the_tables_hold(layout: Layout, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a count of every position, in every step."""
    counted = Tally._count

    def compare(tally: Tally, running: list[Sequence], computed: dict[int, int]) -> None:
        manager, before = tally._manager, (tally.tokens, tally.reserved)
        counted(tally, running, computed)
        size, held, later = manager.block_size, set(), set()
        for seq in running:
            for position, places in ((computed.get(seq.row, seq.num_computed), held), (tally._ends[seq.seed], later)):
                places.update((seq.block_table[p // size], p % size) for p in range(min(position, len(seq.block_table) * size)))
        assert tally.tokens - before[0] == len(held)
        if layout.policy == "paged":
            assert tally.reserved - before[1] == len(later - held)
        assert tally.owned >= tally.tokens + tally.reserved

    monkeypatch.setattr(Tally, "_count", compare)
    requests = [TraceRequest(None, 1 + i * 7 % 13, 1 + i * 5 % 11) for i in range(60)]
    result = run(Load(requests, pool=120, max_len=32, n=n, admission="watermark"), layout)
    shares = [result[f"{part}_share"] for part in ("token", "reserved", "internal", "external")]  # type: ignore[literal-required]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    assert (result["saved_share"] > 0) == (n > 1 and layout is PAGED)


def test_the_engine_knows_neither_the_lengths_nor_the_whole_load(monkeypatch: pytest.MonkeyPatch) -> None:
    step, waiting = Engine.step, []

    def watched(engine: Engine) -> object:
        waiting.append(len(engine.scheduler.waiting))
        assert all(seq.max_tokens == 32 - seq.num_prompt for seq in engine.scheduler.running)
        return step(engine)

    monkeypatch.setattr(Engine, "step", watched)
    result = run(Load(equal(2000), pool=100, max_len=32), PAGED)
    assert QUEUE <= max(waiting) < QUEUE + 20, "and those that were preempted"
    assert result["requests"] == 2000


def test_samples_end_at_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[int, int, str | None]] = []
    step = Engine.step

    def watched(engine: Engine) -> list[SequenceOutput]:
        lengths = {(seq.request.request_id, seq.index): seq.num_generated + 1 for seq in engine.scheduler.running}
        outputs = step(engine)
        ends.extend((o.index, lengths.get((o.request_id, o.index), 1), o.finish_reason) for o in outputs if o.finish_reason)
        return outputs

    monkeypatch.setattr(Engine, "step", watched)
    run(Load([TraceRequest(None, 2, 3), TraceRequest(None, 3, 1)], pool=64, max_len=8, n=2), PAGED)
    assert sorted(ends) == [(0, 1, "stop"), (0, 3, "stop"), (1, 1, "stop"), (1, 3, "stop")]


def test_the_same_load_gives_the_same_figures() -> None:
    load, layout = Load(paper("alpaca-paper", 100), pool=2100, n=2), Layout("paged", None, 8)
    first, second = run(load, layout), run(load, layout)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_a_pool_that_is_never_full() -> None:
    result = run(Load(equal(3), pool=640, max_len=16, admission="watermark"), PAGED)
    assert not result["saturated"]
    assert result["counted_steps"] == result["steps"] == 5
    assert result["mean_sequences"] == 3


def test_prefixes_of_a_trace_are_found() -> None:
    """Two prompts of four blocks, of which three are the same."""
    requests = [TraceRequest(None, 2048, 2, (1, 2, 3, last)) for last in (4, 5)]
    result = run(Load(requests, pool=10_240, max_len=2050, max_num_seqs=1), Layout("paged", None, 512))
    assert result["hit_share"] == pytest.approx(3 / 8)
    assert result["limited_by_sequences"]
    assert result["max_sequences"] == 1


def test_the_paper() -> None:
    """Fig. 2 of arXiv 2309.06180, and the 6.09 % of blocks that two samples save (Fig. 15), with fewer requests."""
    load = Load(paper("sharegpt-paper", 500))
    most, oracle = run(load, Layout("max", "buddy")), run(load, Layout("oracle", "buddy"))
    assert most["token_share"] == pytest.approx(0.204, abs=0.015)
    assert most["mean_sequences"] == pytest.approx(7, abs=0.3)
    assert oracle["token_share"] == pytest.approx(0.382, abs=0.02)
    paged = run(Load(load.requests, admission="watermark"), Layout("paged", None, 16))
    assert paged["token_share"] >= 0.965
    assert paged["mean_sequences"] >= 32
    shared = run(Load(paper("alpaca-paper", 1500), n=2, admission="watermark"), Layout("paged", None, 16))
    assert shared["saved_share"] == pytest.approx(0.065, abs=0.007)


def test_layouts() -> None:
    assert layouts(["max", "paged"], ["buddy", "first-fit"], [8, 16]) == [
        Layout("max", "buddy"), Layout("max", "first-fit"), Layout("paged", None, 8), Layout("paged", None, 16),
    ]  # fmt: skip


# The command.

SMALL = ["bench", "memory", "--dist", "alpaca-paper", "--requests", "60", "--pool", "1024", "--max-len", "800"]


def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, name = tmp_path / "runs.json", tmp_path / "picture"
    assert main([*SMALL, "--block-size", "8,16", "--allocator", "buddy,first-fit", "--json", str(file), "--plot", str(name)]) == 0
    shown = capsys.readouterr().out
    runs = json.loads(file.read_text())["runs"]
    assert len(runs) == 2 * 2 + 3 * 2
    assert "paged / block 8" in shown
    assert "oracle / first-fit" in shown
    assert "60 requests, " in shown
    fields = {"policy", "allocator", "block_size", "token_share", "reserved_share", "internal_share", "external_share", "mean_sequences",
              "preemptions", "recomputed_tokens", "hit_share", "saved_share"}  # fmt: skip
    assert all(fields <= run.keys() for run in runs)
    for path in (name.with_suffix(".png"), name.with_suffix(".svg")):
        assert path.stat().st_size > 1000
        assert str(path) in shown


def test_json_alone_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--policy", "paged", "--admission", "watermark", "--json", "-", "--no-plot"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["runs"]
    assert (result["policy"], result["allocator"], result["block_size"], result["pool_tokens"]) == ("paged", None, 16, 1024)
    assert not list(tmp_path.iterdir())


def test_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("prompt,output\n" + "".join(f"{10 + i},{5 + i}\n" for i in range(20)))
    options = ["bench", "memory", "--trace", str(trace), "--pool", "128", "--policy", "paged,max", "--no-plot"]
    assert main([*options, "--max-len", "64", "--requests", "12"]) == 0
    assert "12 requests, 312 prompt and output tokens" in capsys.readouterr().out
    assert main([*options, "--max-len", "40"]) == 2
    assert "7 of the 20 requests are longer than --max-len 40, prompt and output together: pass --max-len 53" in capsys.readouterr().err
    assert main([*options, "--max-len", "64", "--requests", "21"]) == 2
    assert "has only 20" in capsys.readouterr().err
    assert main([*options, "--dist", "alpaca-paper"]) == 2
    assert "--trace and --dist both say" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--dist", "alpaca"], "there is no built-in workload 'alpaca'; choose from: sharegpt-paper, alpaca-paper"),
        (["--policy", "paged,most"], "--policy 'most' is not supported; choose from: paged, max, pow2, oracle"),
        (["--allocator", "best-fit"], "--allocator 'best-fit' is not supported; choose from: buddy, first-fit"),
        (["--block-size", "12"], "--block-size must be a power of two from 1 to 1024, got 12"),
        (["--block-size", "8,many"], "--block-size must be numbers with commas"),
        (["--block-size", "512", "--execute", "--max-len", "1024"], "--block-size 512 is not supported; choose from: 4, 8, 16"),
        (["--pool", "799"], "--pool 799 holds 784 positions in blocks of 16, less than one sequence of --max-len 800"),
        (["--pool", "0"], "--pool must be at least 1, got 0"),
        (["--pool", "1023"], "reserves up to 800 positions for a sequence, but the longest run that --allocator buddy can hand out of"),
        (["--max-len", "1"], "--max-len must be at least 2, got 1"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be from 1 to 4096, got 0"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens must be from 1"),
        (["--admission", "always"], "--admission 'always' is not supported"),
        (["--beam-width", "4"], "--beam-width needs --execute"),
        (["embedded"], "MODEL needs --execute"),
        (["--beam-width", "4", "--execute", "--policy", "max"], "--beam-width works with --policy paged only"),
        (["--beam-width", "4", "--execute", "--policy", "paged"], "may need 3,200 positions together, but --pool holds 1,024"),
        (["--json", "no/such/folder/x.json"], "can't write no/such/folder/x.json"),
        (["--plot", "no/such/folder/x"], "can't write no/such/folder/x.png"),
    ],
)
def test_bad_options(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    plot = [] if "--plot" in options else ["--no-plot"]
    assert main([*SMALL, *plot, *options]) == 2
    assert says in capsys.readouterr().err


def test_execute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    generated = count()
    step = Engine.step

    def counted(engine: Engine) -> object:
        outputs = step(engine)
        for _ in range(sum(len(output.token_ids) for output in outputs)):
            next(generated)
        return outputs

    monkeypatch.setattr(Engine, "step", counted)
    # Prompts are cut from Quire's source, and how long beams stay together depends on the prompt: from a text that stays here.
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    monkeypatch.setattr(memory_device, "_text", lambda tokenizer: tokenizer.encode(text, add_special_tokens=False))
    options = ["bench", "memory", "--execute", "--dist", "alpaca-paper", "--requests", "4", "--pool", "2048", "--json", "-", "--no-plot"]
    options += ["--admission", "past-future"]
    assert main([*options, "--policy", "paged,oracle", "--block-size", "8", "--max-num-seqs", "2"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["block_size"] for run in runs] == [8, 4]
    outputs = sum(request.output_tokens for request in paper("alpaca-paper", 4))
    assert next(generated) == 2 * outputs, "forced to the lengths of the load"
    assert main([*options, "--policy", "paged", "--max-len", "400", "--beam-width", "3"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["runs"]
    assert next(generated) - 1 == 3 * outputs
    assert result["max_sequences"] >= 3
    assert result["saved_share"] > 0.3


def test_a_missing_matplotlib_costs_only_the_picture(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--policy", "max", "--max-len", "800"]) == 0
    printed = capsys.readouterr()
    assert "max / buddy" in printed.out
    assert "no picture is written: the plot needs matplotlib" in printed.err
    assert main([*SMALL, "--policy", "max", "--plot", "x"]) == 2


def test_a_trace_brings_its_own_longest_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("t_s,prompt,output\n0,3000,10\n1,20,5\n")
    assert main(["bench", "memory", "--trace", str(trace), "--policy", "paged", "--json", "-", "--no-plot"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["admission"] for run in runs] == ["watermark", "past-future"]
