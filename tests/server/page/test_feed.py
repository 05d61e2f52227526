"""The page's routes and its feed over HTTP: who may see what, and that nobody is asked while nobody watches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.fake_backend import FakeBackend
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams
from quire.server.engine.messages import Seen
from quire.server.http.keys import read_keys
from quire.server.metrics.histogram import Histogram
from quire.server.page import assets
from quire.server.page.advice import advice
from quire.server.page.feed import LOOK_S, MAX_WATCHERS, interval
from quire.server.page.latency import Recent, quantile
from quire.server.page.view import View
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Process, Server, health, http, raw_request, wait_until

KEY = "sk-alice-0123456789"


@contextmanager
def watching(url: str, headers: dict[str, str] | None = None) -> Iterator[Iterator[dict[str, Any]]]:
    with http.stream("GET", f"{url}/page/events", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: "))


def test_the_page_is_whole_and_asks_nobody_else(fake: Server) -> None:
    assert {path.name for path in assets.FOLDER.iterdir()} == {assets.INDEX, *assets.FILES}
    with httpx.Client(base_url=fake.url, timeout=DEADLINE_S) as client:
        for path in sorted(assets.PATHS):
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            elsewhere = set(re.findall(r"https?://[^\s\"'`)]+", answer.text)) - {"http://www.w3.org/2000/svg"}
            assert not elsewhere, path
            for asked in re.findall(r'(?:src|href|from)[= ]"([./][^"]+)"', answer.text):
                target = asked.replace("./", "/page/")
                assert target in assets.PATHS or target == "/docs", f"{path} asks for {asked}"
        for path in (
            "/page/index.html",
            "/page/",
            "/page/nothing.js",
            "/page/%2e%2e%2fassets.py",
            "/page/..%2fassets.py",
            "/page/static/main.js",
        ):
            answer = client.get(path)
            assert answer.status_code == 404, path
            assert "Traceback" not in answer.text
        assert client.post("/", json={}).status_code == 405
    with raw_request(fake.port, "/page/../assets.py", {}) as connection:
        assert b" 40" in connection.recv(1000)


def test_the_files_are_open_and_the_data_are_not(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nkey = "{KEY}"\n')
    file.chmod(0o600)
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), keys=read_keys(str(file)))
    try:
        for path in sorted(assets.PATHS):
            assert http.get(server.url + path).status_code == 200
        for path in ("/page/events", "/page/nothing.js", "/page/", "//", "/page/main.js/", "/page/events/../main.js", "/docs"):
            answer = http.get(server.url + path)
            assert answer.status_code == 401 or str(answer.url) != server.url + path, path  # httpx tidies some of them up
        with raw_request(server.port, "/page/main.js/../events", {}) as connection:
            assert b" 401 " in connection.recv(1000)
        assert http.get(server.url + "/page/events", headers={"Authorization": "Bearer wrong-key-0123456789"}).status_code == 401
        with watching(server.url, {"Authorization": f"Bearer {KEY}"}) as pictures:
            assert next(pictures)["whole"]
    finally:
        server.stop()


def test_many_watch_one_look_and_none_is_taken_while_nobody_does(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    scheduler = server.engine.scheduler
    try:
        assert scheduler.manager.cache.listener is None
        with watching(server.url) as first, watching(server.url) as second:
            assert next(first)["whole"]
            assert next(second)["whole"]
            assert scheduler.manager.cache.listener is not None
            for pictures in (first, second):
                wait_until(lambda pictures=pictures: next(pictures)["server"]["watchers"] == 2, "both are counted")
                assert next(pictures)["server"]["watchers"] == 2
            seen, other = next(first), next(second)
            while (seen["number"], seen["whole"]) != (other["number"], other["whole"]):  # whoever is slow misses some, and gets a whole one
                if other["number"] < seen["number"]:
                    other = next(second)
                else:
                    seen = next(first)
            assert seen == other, "one look, for both of them"
        wait_until(lambda: scheduler.manager.cache.listener is None, "the engine knows that nobody watches")
        with watching(server.url) as again:
            assert next(again)["whole"]
    finally:
        server.stop()


def test_no_more_than_so_many_watch(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    feed = server.feed
    try:
        feed._watchers = MAX_WATCHERS
        answer = http.get(server.url + "/page/events")
        assert answer.status_code == 429
        assert str(MAX_WATCHERS) in answer.json()["error"]["message"]
        feed._watchers = 0
    finally:
        server.stop()


def test_what_is_sent_is_what_happens_and_no_text_is_in_it(real: Process) -> None:
    view = View()
    secret = "the_secret_of_somebody"
    with watching(real.url) as pictures:
        view.apply(next(pictures))
        body = {"prompt": f"def {secret}(a, b):\n    return a + b\n\n" * 4, "n": 4, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        mine: list[Any] = []

        def look(call_id: str) -> bool:
            """Whether all of it was seen; it may end before."""
            nonlocal mine
            shared = 0
            for number, picture in enumerate(pictures):
                assert secret not in json.dumps(picture)
                view.apply(picture)
                mine = [s for s in view.sequences if s["id"] == f"{call_id}-0"]
                shared = max(shared, *(view.owners.get(s["blocks"][0], 0) for s in mine if s["blocks"]), 0)
                if mine and shared == 4 and view.facts["latency"]["between"]["p50"] is not None:
                    return True
                if number > 4 and not view.facts["running"]:
                    return False
            pytest.fail("the pictures have ended")

        def ask() -> bool:
            with http.stream("POST", real.url + "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                if not look(json.loads(next(lines).removeprefix("data: "))["id"]):
                    return False
                check()
                return True

        def check() -> None:
            assert {s["index"] for s in mine} == {0, 1, 2, 3}
            assert view.facts["running"] >= 4
            assert view.facts["rates"]["sampled"] > 0
            assert view.facts["latency"]["first"]["p50"] > 0
            kv = view.facts["kv"]
            assert 0 < kv["used"] <= kv["num_blocks"]
            assert 0 <= kv["empty_tail"] < kv["used"] * kv["block_size"]

        wait_until(ask, "it is seen while it runs")
        for picture in pictures:
            view.apply(picture)
            if not view.facts["running"]:
                break
        assert not view.owners
        assert view.facts["kv"]["cached"] > 0
    assert health(real.url)["status"] == "ok"


def test_the_last_minute_of_a_histogram() -> None:
    histogram = Histogram([0.01, 0.1, 1.0])
    histogram.observe(0.5, 1000)  # before anybody watched
    recent = Recent({"first": histogram})

    def counts(now: float) -> list[int]:
        return recent.look(now)["first"][1]

    assert counts(10.0) == [0, 0, 0, 0]
    histogram.observe(0.05, 99)
    histogram.observe(5.0)
    assert counts(11.5) == [0, 99, 0, 1]
    histogram.observe(0.5, 3)
    assert counts(60.0) == [0, 99, 3, 1]
    assert counts(71.6) == [0, 0, 3, 0], "what is older than a minute is gone"
    assert counts(200.0) == [0, 0, 0, 0]


def test_quantiles() -> None:
    assert quantile([0.01, 0.1], [0, 0, 0], 0.5) is None
    assert quantile([0.01, 0.1], [10, 0, 0], 0.5) == 0.005
    assert quantile([0.01, 0.1], [0, 99, 1], 1.0) == 0.1
    middle = quantile([0.01, 0.1], [50, 50, 0], 0.75)
    assert middle is not None
    assert 0.0549 < middle < 0.0551


def test_advice_names_the_bottleneck() -> None:
    def told(num_blocks: int, **options: Any) -> str:
        config = EngineConfig(**{"max_num_seqs": 4, "admission": "watermark", "speculation": "off", **options})
        engine = Engine(FakeBackend(num_blocks, 4, 32, 50), config)
        watch = engine.watch()
        for i in range(6):
            engine.add(Request(str(i), [i] * 20, SamplingParams(max_tokens=4), i))
        for _ in range(3):
            engine.step()
        return " ".join(advice(watch.snapshot(), engine.limits, 0))

    assert "for memory" in (tight := told(8))
    assert "--kv-memory" in tight
    assert "--max-model-len (now 32)" in tight
    assert "--max-num-seqs 4 run already" in told(64)
    assert told(64, max_num_seqs=8) == ""
    engine = Engine(FakeBackend(8, 4, 32, 50), EngineConfig(max_num_seqs=2))
    assert "had to give memory back" in " ".join(advice(engine.watch().snapshot(), engine.limits, 3))


def test_a_dear_look_is_taken_less_often() -> None:
    engine = Engine(FakeBackend(8, 4, 32, 50), EngineConfig(max_num_seqs=2))
    snapshot = engine.watch().snapshot()
    for cost in (0.0, 0.0001, 0.001, 0.02):
        assert interval(Seen(0, snapshot, cost)) >= max(LOOK_S, cost / 0.01), "at most 1 % of the engine's time"
