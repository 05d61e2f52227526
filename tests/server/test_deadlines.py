"""Requests that take too long: they end with an error in the form that was asked for, and their blocks are free at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Server, events, http, raw_request, wait_clean, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(tokenizer: Tokenizer, **options: Any) -> Iterator[Server]:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), **options)
    try:
        yield server
        server.backend.go.set()
        wait_clean(server.url)
        assert server.client.in_flight == 0
    finally:
        server.stop()
        server.engine.check()


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "seed": 1} | fields


def check(error: dict[str, Any], seconds: str) -> None:
    assert (error["code"], error["type"], error["param"]) == ("deadline_exceeded", "server_error", "timeout")
    assert f"within {seconds} seconds" in error["message"]


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"beam_width": 4}, {"stream": True, "n": 2}], ids=str)
def test_a_request_that_would_never_end(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    with serving(tokenizer) as server:
        server.backend.delay_s = 0.05
        if fields.get("stream"):
            for seconds in (0.3, 1, 5, 10):  # a busy machine may make nothing in less
                answer = http.post(server.url + COMPLETIONS, json=body(timeout=seconds, **fields))
                assert answer.status_code == 200
                found = events(answer.text)
                check(found[-2]["error"], str(seconds))
                assert found[-1] == "[DONE]"
                if any("choices" in event for event in found[:-2]):
                    break
            else:
                pytest.fail("what was made in time did not arrive")
        else:
            answer = http.post(server.url + COMPLETIONS, json=body(timeout=0.3, **fields))
            assert answer.status_code == 504
            assert answer.headers["x-should-retry"] == "false", "the same request would take as long"
            check(answer.json()["error"], "0.3")
        wait_clean(server.url)


def test_the_servers_own_limit_holds_for_everybody(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, request_timeout=1) as server:
        server.backend.go.clear()  # it is not even begun
        for fields in ({}, {"timeout": 3600}):
            answer = http.post(server.url + CHAT, json={"messages": HELLO} | fields)
            assert answer.status_code == 504
            check(answer.json()["error"], "1")
        server.backend.go.set()
        in_time = {"messages": HELLO, "max_tokens": 3, "timeout": 0.999}
        wait_until(lambda: http.post(server.url + CHAT, json=in_time).status_code == 200, "the machine is fast enough for once")


def test_a_client_that_does_not_read_holds_no_blocks(tokenizer: Tokenizer) -> None:
    """The deadline is kept by a clock, and not by whoever fetches the tokens."""
    with serving(tokenizer) as server:
        server.backend.delay_s = 0.02
        with raw_request(server.port, COMPLETIONS, body(stream=True, n=20, timeout=1.0), receive_buffer=4096) as connection:
            wait_until(lambda: server.client.meter.received == 1, "it has begun")
            wait_until(lambda: server.client.in_flight == 0, "it has ended, though nothing was read")
            wait_clean(server.url)
            got = b""
            while b"[DONE]" not in got:
                got += connection.recv(65536)
        assert b"deadline_exceeded" in got


def test_a_request_that_is_done_in_time_is_not_touched(tokenizer: Tokenizer) -> None:
    with serving(tokenizer) as server:
        plain = http.post(server.url + COMPLETIONS, json=body()).json()
        timed = http.post(server.url + COMPLETIONS, json=body(timeout=DEADLINE_S)).json()
        assert timed["choices"] == plain["choices"]


def test_the_official_client(tokenizer: Tokenizer) -> None:
    with serving(tokenizer) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S) as client:
        server.backend.delay_s = 0.05
        fields: dict[str, Any] = {"model": "fake", "prompt": "a", "max_tokens": 400, "extra_body": {"timeout": 0.3, "ignore_eos": True}}
        with pytest.raises(openai.InternalServerError, match=r"within 0\.3 seconds"):
            client.completions.create(**fields)
        with pytest.raises(openai.APIError, match=r"within 0\.3 seconds"):
            list(client.completions.create(stream=True, **fields))


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity", "1e9", '"5"', "true"])
def test_what_is_no_timeout(fake: Server, value: str) -> None:
    content = json.dumps(body()).replace("400", f'4, "timeout": {value}')
    answer = http.post(fake.url + COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "timeout"
