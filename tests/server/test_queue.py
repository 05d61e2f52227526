"""The bound on the queue, the order in it, and what the log says of those who had to make room."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import pytest

from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Server, events, http, raw_request, wait_clean, wait_until

COMPLETIONS = "/v1/completions"


def body(number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"request {number}", "max_tokens": 8, "seed": number, "ignore_eos": True} | fields


@contextmanager
def serving(tokenizer: Tokenizer, *, hold: bool = True, num_blocks: int = 256, **options: Any) -> Iterator[Server]:
    """A server whose backend is held before its first step."""
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size, num_blocks=num_blocks), **options)
    if hold:
        server.backend.go.clear()
    try:
        yield server
    finally:
        server.backend.go.set()
        wait_clean(server.url)
        server.stop()
        server.engine.check()


def in_flight(server: Server, count: int) -> None:
    wait_until(lambda: server.client.in_flight == count, f"{count} sequences are in flight")


def refusals(server: Server) -> int:
    return server.client.meter.rejections["queue_full"]


def check_refusal(answer: httpx.Response) -> None:
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert "x-should-retry" not in answer.headers
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "queue_full", None)
    for words in ("3 sequences run or wait", "--max-num-seqs 1", "--max-waiting 2", "larger --max-waiting"):
        assert words in error["message"]


def test_a_full_queue_refuses_before_an_answer_begins(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, max_num_seqs=1, max_waiting=2) as server, ExitStack() as clients:
        for number in range(3):
            clients.enter_context(raw_request(server.port, COMPLETIONS, body(number, stream=number == 1)))
        in_flight(server, 3)
        for fields in ({}, {"stream": True}, {"n": 3}):
            check_refusal(http.post(server.url + COMPLETIONS, json=body(9, **fields)))
        chat = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        check_refusal(http.post(server.url + "/v1/chat/completions", json=chat))
        assert server.client.in_flight == 3
        clients.close()  # who leaves makes room, though the engine has not even begun
        in_flight(server, 0)
        clients.enter_context(raw_request(server.port, COMPLETIONS, body(4)))
        in_flight(server, 1)


def test_a_crowd_that_comes_at_once(tokenizer: Tokenizer) -> None:
    """Exactly as many are taken as there is room for, streams and others; each of them is answered in full."""

    async def everyone(server: Server) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE_S, limits=httpx.Limits(max_connections=None)) as http:
            tasks = [asyncio.ensure_future(http.post(COMPLETIONS, json=body(i, stream=i % 2 == 0))) for i in range(60)]
            while sum(task.done() for task in tasks) < 48:
                await asyncio.sleep(0.01)
            assert server.client.in_flight == 12
            server.backend.go.set()
            return await asyncio.gather(*tasks)

    with serving(tokenizer, max_num_seqs=4, max_waiting=8) as server:
        answers = asyncio.run(everyone(server))
        assert sorted(answer.status_code for answer in answers) == [200] * 12 + [429] * 48
        for answer in answers:
            if answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"):
                found = events(answer.text)
                assert found[-1] == "[DONE]"
                assert found[-2]["choices"][0]["finish_reason"] == "length"
            elif answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] == 8
        assert server.client.in_flight == 0


def test_a_large_request_is_taken_while_there_is_room(tokenizer: Tokenizer) -> None:
    """Otherwise it would be refused for ever."""
    with serving(tokenizer, hold=False, max_num_seqs=1, max_waiting=1) as server:
        answer = http.post(server.url + COMPLETIONS, json=body(n=6))
        assert answer.status_code == 200
        assert len(answer.json()["choices"]) == 6


def test_the_official_client_tries_again(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, max_num_seqs=1, max_waiting=1) as server, ExitStack() as clients:
        clients.enter_context(raw_request(server.port, COMPLETIONS, body(1)))
        clients.enter_context(raw_request(server.port, COMPLETIONS, body(2)))
        in_flight(server, 2)
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
            with pytest.raises(openai.RateLimitError, match="2 sequences run or wait") as refused:
                client.completions.create(model="fake", prompt="a")
            assert refused.value.code == "queue_full"
            refused_before = refusals(server)

            def go() -> None:
                wait_until(lambda: refusals(server) > refused_before, "it was refused once more")
                server.backend.go.set()

            thread = threading.Thread(target=go)
            thread.start()
            assert client.with_options(max_retries=20).completions.create(model="fake", prompt="a").choices
            thread.join()


def test_hang_ups_leave_no_trace_in_the_count(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, hold=False, max_num_seqs=2, max_waiting=64) as server:
        server.backend.delay_s = 0.002
        for number in range(40):
            with raw_request(
                server.port, COMPLETIONS, body(number, stream=number % 2 == 0, n=1 + number % 3, max_tokens=200)
            ) as connection:
                if number % 4 == 0:
                    connection.recv(100)
        in_flight(server, 0)


def test_priority_is_the_order_of_the_queue_and_takes_the_rows_of_the_lower(tokenizer: Tokenizer) -> None:
    order: list[str] = []

    def ask(name: str, priority: int | None) -> None:
        http.post(server.url + COMPLETIONS, json=body(max_tokens=40, priority=priority)).raise_for_status()
        order.append(name)

    with serving(tokenizer, max_num_seqs=1) as server:
        asked = (("first", None), ("late", (1 << 31) - 1), ("plain", None), ("later", 7), ("early", -3), ("plain 2", 0))
        threads = []
        for number, (name, priority) in enumerate(asked, start=1):
            threads.append(threading.Thread(target=ask, args=(name, priority)))
            threads[-1].start()
            in_flight(server, number)
            if number == 1:
                wait_until(lambda: len(server.engine.scheduler.running) == 1, "the first one runs")
        server.backend.delay_s = 0.001
        server.backend.go.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert order == ["early", "first", "plain", "plain 2", "later", "late"], "the first makes way for the early one, and goes on after it"


def test_preemptions_are_logged(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """One line a second at most, with the request, what it held, and why."""
    with serving(tokenizer, num_blocks=40, max_num_seqs=8, admission="watermark") as server, caplog.at_level(logging.WARNING):
        answers = []

        def ask() -> None:
            fields = body(prompt=[[number] * 20 for number in range(1, 9)], max_tokens=120)
            answers.append(http.post(server.url + COMPLETIONS, json=fields))

        thread = threading.Thread(target=ask)
        thread.start()
        in_flight(server, 8)
        server.backend.go.set()
        thread.join(DEADLINE_S)
        assert answers[0].status_code == 200
        assert server.engine.stats().preemptions > 0
    lines = [record for record in caplog.records if record.name == "quire.engine"]
    assert 1 <= len(lines) <= 1 + server.engine.stats().preemptions
    message = lines[0].getMessage()
    assert message.startswith("request cmpl-")
    for words in ("was preempted", "computed positions", "no free block was left for request cmpl-"):
        assert words in message
