"""The simulator: the engine's own decisions, in time that is added up."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.backends.memory import kv_layout
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.groups import KVGroups
from quire.core.plan import RowWork, StepPlan
from quire.errors import ConfigError
from quire.machine import GPUS, Machine
from quire.models.quantization import planned_cost
from quire.models.spec import RopeSpec, TransformerSpec
from quire.models.weights import load_spec, resolve_model
from quire.simulator.clock import SimulatedTime
from quire.simulator.devices import Forced, NoModel, Simulated
from quire.simulator.drive import Clients
from quire.simulator.report import GROWS, Goodput, Report, describe, latency
from quire.simulator.simulate import ENOUGH, Load, Server, execute, highest_rate, simulate
from quire.workload import Lengths, TraceRequest, arrive_at, draw_requests, prompt_token_ids
from sample_models import MISTRAL, QWEN2, write_model

SPEC = TransformerSpec("Llama", 32000, 768, 12, 12, 12, 64, 2048, 2048, rope=RopeSpec(rotary_dim=64))
MACHINE = Machine("a CPU", 30e9, 400e9, ((0.5, 0.9), (13.0, 0.7), (100.0, 0.8)), 20e9, 200e9, step_s=3e-4)
CONFIG = EngineConfig(max_num_batched_tokens=256)
NOTHING = Goodput(())
SHORT = Lengths(60, 0.8, 200)


def server(config: EngineConfig = CONFIG, num_blocks: int = 400, spec: TransformerSpec = SPEC) -> Server:
    return Server(config, num_blocks, 2048, planned_cost(config, spec))


def requests(count: int, rate: float = float("inf")) -> list[TraceRequest]:
    return arrive_at(draw_requests(count, SHORT, SHORT), rate)


def test_a_request_alone_takes_the_time_of_its_steps() -> None:
    one = server()
    found = simulate(one, MACHINE, Load([TraceRequest(5.0, 600, 10)]), NOTHING)

    def seconds(start: int, count: int, sample: bool) -> float:
        return MACHINE.seconds(one.cost.of(StepPlan(work=[RowWork(0, start, count, [], sample)]).extent()))

    prompt = seconds(0, 256, False) + seconds(256, 256, False) + seconds(512, 88, True)
    decode = sum(seconds(600 + i, 1, True) for i in range(9))
    assert found.latencies["ttft"]["mean"] == pytest.approx(prompt)
    assert found.latencies["e2el"]["mean"] == pytest.approx(prompt + decode) == pytest.approx(found.seconds)
    assert found.latencies["tpot"]["p99"] == pytest.approx(decode / 9)
    assert (found.completed, found.prompt_tokens, found.output_tokens, found.steps) == (1, 600, 10, 12)
    assert found.busy == pytest.approx(1.0)
    assert found.latencies["queue"]["p99"] == pytest.approx(0.0)


def test_the_same_load_gives_the_same_report() -> None:
    load = Load(requests(60, 20.0))
    first = simulate(server(), MACHINE, load, NOTHING)
    assert simulate(server(), MACHINE, load, NOTHING) == first
    assert first.completed == 60
    assert first.output_tokens == sum(r.output_tokens for r in load.requests)


def test_steps_and_memory_are_those_of_the_engine_itself() -> None:
    """Everything comes at once: when does not matter then, and all that the simulator says but times must be so."""
    pytest.importorskip("quire.backends.cpu._native")
    spec = load_spec(resolve_model("embedded"))
    blocks = 60
    config = EngineConfig(
        max_model_len=512, max_num_batched_tokens=128, kv_memory=str(blocks * 16 * spec.kv_bytes_per_token("float16")), max_waiting=100
    )
    load = Load(requests(40))
    foretold = simulate(Server(config, blocks, 512, planned_cost(config, spec)), MACHINE, load, NOTHING)
    seen = execute(config, load, NOTHING)
    assert foretold.preemptions > 0, "the load fills the memory"
    for name in ("requests", "completed", "prompt_tokens", "output_tokens", "steps", "preemptions", "tokens_recomputed", "most_rows",
                 "most_waiting", "kv_blocks", "kv_most"):  # fmt: skip
        assert getattr(foretold, name) == getattr(seen, name), name
    assert [point[1:] for point in foretold.timeline] == [point[1:] for point in seen.timeline]
    assert seen.seconds > 0


def test_on_a_gpu_steps_begin_when_the_last_one_has_ended() -> None:
    config = EngineConfig(device="cuda", max_num_seqs=8)
    spec = replace(SPEC, dtype="bfloat16")
    load = Load([TraceRequest(0.0, 30, 50)] * 4)
    found = simulate(server(config, 400, spec), GPUS["h200"], load, NOTHING)
    cost = planned_cost(config, spec)
    step = GPUS["h200"].seconds(cost.of(StepPlan(work=[RowWork(i, 50, 1, [], True) for i in range(4)]).extent()))
    assert found.latencies["itl"]["p50"] == pytest.approx(step, rel=0.01), "nothing between two steps"
    assert found.output_tokens == 200
    assert found.steps >= 50


def test_closed_loops_keep_so_many_requests_in_flight() -> None:
    found = simulate(server(), MACHINE, Load(requests(30), concurrency=3), NOTHING)
    assert found.completed == 30
    assert found.most_rows == 3
    assert found.latencies["queue"]["p99"] < 0.1, "who waits with a client does not wait in the queue"
    alone = simulate(server(), MACHINE, Load(requests(30), concurrency=1), NOTHING)
    assert alone.latencies["e2el"]["mean"] < found.latencies["e2el"]["mean"]


def test_what_a_server_refuses() -> None:
    config = replace(CONFIG, max_num_seqs=2, max_waiting=3)
    long = TraceRequest(0.0, 4000, 5)
    found = simulate(server(config), MACHINE, Load([long, *requests(20)]), NOTHING)
    assert found.refused["length"] == 1
    assert found.refused["queue"] > 0
    assert found.completed + sum(found.refused.values()) == found.requests == 21
    assert "longer than the context" in describe(found, NOTHING)


def test_an_output_ends_where_the_context_does() -> None:
    found = simulate(server(), MACHINE, Load([TraceRequest(0.0, 2000, 500)]), NOTHING)
    assert found.output_tokens == 48
    assert simulate(server(), MACHINE, Load([TraceRequest(0.0, 20, 500)], max_tokens=7), NOTHING).output_tokens == 7


def test_equal_beginnings_are_found_in_the_cache() -> None:
    shared = [TraceRequest(float(i), 512, 4, (7,)) for i in range(4)]
    found = simulate(server(), MACHINE, Load(shared), NOTHING)
    assert found.cached_tokens == 3 * 511
    assert simulate(server(replace(CONFIG, prefix_caching=False)), MACHINE, Load(shared), NOTHING).cached_tokens == 0


def found_rate(*goodput: str, config: EngineConfig = CONFIG, count: int = 120) -> tuple[float, Report]:
    return highest_rate(lambda timed: simulate(server(config), MACHINE, Load(timed), Goodput.parse(goodput)), requests(count), 0)


@pytest.mark.parametrize("goodput", [("ttft:600", "tpot:60"), ("e2el:100000",), ("tpot:1000",)])
def test_the_highest_rate_lasts(goodput: tuple[str, ...]) -> None:
    """Three times as many requests at a little less are served well, too; at much more the queue grows, or they are not."""
    rate, best = found_rate(*goodput)
    assert best.goodput is not None
    assert best.goodput >= ENOUGH
    assert best.requests >= 120
    longer = [requests(120)[i % 120] for i in range(3 * best.requests)]
    less, more = (simulate(server(), MACHINE, Load(arrive_at(longer, factor * rate, 1)), Goodput.parse(goodput)) for factor in (0.8, 1.6))
    assert less.goodput is not None
    assert less.goodput >= 0.9
    assert less.kept_up is not None
    assert less.kept_up >= GROWS
    assert more.kept_up is not None
    assert more.kept_up < GROWS or (more.goodput or 0.0) < ENOUGH


def test_a_search_for_the_highest_rate_ends() -> None:
    """Where the first rate is too high, where nobody but single requests is served well, where a burst is served, and where none is."""
    alone = simulate(server(), MACHINE, Load(arrive_at(requests(120), 1e-6)), NOTHING).latencies["ttft"]["p99"]
    tight, _ = found_rate(f"ttft:{1001 * alone}")
    assert 0 < tight < found_rate("ttft:100000")[0]
    assert found_rate("e2el:100000", config=replace(CONFIG, max_waiting=18), count=20)[0] < 1000
    with pytest.raises(ConfigError, match="no rate keeps --goodput"):
        found_rate("ttft:0.001")


def test_a_search_ends_where_only_the_later_requests_are_too_much() -> None:
    def search(drawn: list[TraceRequest]) -> tuple[float, Report]:
        goodput = Goodput.parse(["e2el:3000"])
        return highest_rate(lambda timed: simulate(server(), MACHINE, Load(timed), goodput), drawn, 0)

    short, long = TraceRequest(None, 20, 5), TraceRequest(None, 20, 1000)
    with pytest.raises(ConfigError, match=r"no rate keeps .* and 0\.0% of the last quarter"):
        search([short] * 60 + [long] * 20)
    assert search([long] * 3 + [short] * 97)[0] > 0, "and where only some of the first are, it goes on"
    with pytest.raises(ConfigError, match="none of these requests is served at all"):
        search([TraceRequest(None, 5000, 5)] * 4)


def test_overload_is_said() -> None:
    found = simulate(server(), MACHINE, Load(requests(300, 50.0)), NOTHING)
    assert found.kept_up is not None
    assert found.kept_up < GROWS
    assert "the queue grows" in describe(found, NOTHING)
    assert "the queue grows" not in describe(simulate(server(), MACHINE, Load(requests(60, 1.0)), NOTHING), NOTHING)
    assert simulate(server(), MACHINE, Load(requests(30)), NOTHING).kept_up is None, "they did not come over some time"


def test_a_prompt_with_one_token_of_output_needs_memory() -> None:
    for config, machine in ((CONFIG, MACHINE), (EngineConfig(device="cuda", block_size=16), GPUS["l4"])):
        found = simulate(server(config), machine, Load([TraceRequest(0.0, 400, 1)]), NOTHING)
        assert found.most_rows == 1
        assert 25 / 400 <= found.kv_most <= 26 / 400
        assert found.mean_rows == pytest.approx(1.0)
        assert found.busy <= 1.0
        assert found.steps == 2, "two chunks; on a GPU, the step that began before the end was known"


def test_what_no_server_takes_is_not_made() -> None:
    def prompt(work: TraceRequest, number: int) -> list[int]:
        assert work.prompt_tokens < 2048
        return [1] * work.prompt_tokens

    time, lengths, nothing = SimulatedTime(), dict[int, int](), NoModel(200, 16, 2048)
    forced = Forced(nothing, lengths, 5)
    engine = Engine(Simulated(forced, MACHINE, planned_cost(CONFIG, SPEC), time), replace(CONFIG, speculation="off"), time.now)
    run = Clients(engine, forced, time, [TraceRequest(0.0, 10**8, 1), TraceRequest(0.0, 5, 2)], prompt, lengths, (5,)).drive("")
    assert [served.refused for served in run.served] == ["length", None]


@pytest.mark.parametrize(
    ("config_json", "groups"),
    [
        ({**MISTRAL, "sliding_window": 64}, KVGroups(0, 1, 64)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, KVGroups(1, 2, 64)),
    ],
)
def test_blocks_leave_a_sliding_window(tmp_path: Path, config_json: dict[str, Any], groups: KVGroups) -> None:
    """In all layers, and in two of three."""
    pytest.importorskip("quire.backends.cpu._native")
    write_model(tmp_path, config_json | {"num_hidden_layers": 3, "max_position_embeddings": 2048, "vocab_size": 4096})
    for file in resolve_model("embedded").glob("*tokenizer*"):
        shutil.copy(file, tmp_path)
    spec, blocks = load_spec(tmp_path), 70 * groups.width
    layout = kv_layout(spec, 1024, 16)
    assert layout.groups == groups
    size = blocks * 16 * spec.kv_bytes_per_token("float16") // groups.width
    config = EngineConfig(model=str(tmp_path), max_model_len=1024, kv_memory=str(size), max_num_batched_tokens=128)
    load = Load([TraceRequest(0.0, 300, 100)] * 8)
    foretold, seen = (
        simulate(Server(config, blocks, 1024, planned_cost(config, spec), groups), MACHINE, load, NOTHING),
        execute(config, load, NOTHING),
    )
    assert [point[1:] for point in foretold.timeline] == [point[1:] for point in seen.timeline]
    assert foretold.preemptions == seen.preemptions == 0


def test_a_higher_rate_makes_them_wait_longer() -> None:
    slow, fast = (simulate(server(), MACHINE, Load(requests(80, rate)), NOTHING) for rate in (1.0, 100.0))
    assert fast.latencies["e2el"]["p90"] > slow.latencies["e2el"]["p90"]
    assert fast.mean_rows > slow.mean_rows
    assert slow.busy < 1


@pytest.mark.parametrize("text", ["ttft", "ttft:0", "ttft:x", "speed:5", "ttft:nan", "tpot:-1"])
def test_bad_goodput(text: str) -> None:
    with pytest.raises(ConfigError, match="write a latency and milliseconds"):
        Goodput.parse([text])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80)), min_size=1, max_size=25),
    rate=st.sampled_from([0.5, 10.0, 300.0, float("inf")]),
    blocks=st.integers(30, 80),
    concurrency=st.none() | st.integers(1, 5),
)
def test_nobody_is_lost_and_time_goes_on(lengths: list[tuple[int, int]], rate: float, blocks: int, concurrency: int | None) -> None:
    """Whatever the load: each request gets its tokens, in the order of time, and all memory comes back."""
    config = replace(CONFIG, max_model_len=400, max_num_seqs=6)
    time, forced = SimulatedTime(), dict[int, int]()
    nothing = NoModel(blocks, 16, 400)
    ends = Forced(nothing, forced, nothing.spec.vocab_size - 1)
    engine = Engine(Simulated(ends, MACHINE, planned_cost(config, SPEC), time), replace(config, speculation="off"), time.now)
    work = arrive_at([TraceRequest(None, *each) for each in lengths], rate)
    clients = Clients(engine, ends, time, work, lambda r, i: prompt_token_ids(r, i, nothing.spec.vocab_size), forced,
                      (nothing.spec.vocab_size - 1,), concurrency)  # fmt: skip
    run = clients.drive("")
    engine.check()
    assert engine.stats().kv.used_blocks == 0
    for served, asked in zip(run.served, work, strict=True):
        assert served.output_tokens == asked.output_tokens
        assert (asked.arrival_s or 0) <= served.sent < served.first <= served.last <= run.seconds
        assert 0 <= served.queued <= latency("ttft", served)
    assert len(run.gaps) == sum(output - 1 for _, output in lengths)
    assert min(run.gaps, default=0) >= 0


def test_reports_are_plain_data() -> None:
    import json

    found = simulate(server(), MACHINE, Load(requests(5)), Goodput.parse(["e2el:1000"]))
    assert json.loads(json.dumps(asdict(found)))["completed"] == 5
