"""Streams and hang-ups, on a backend that can be held in the middle of a step."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from collections.abc import AsyncIterator
from queue import SimpleQueue
from typing import Any

import httpx
import pytest

from quire.core.sequence import Request
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams
from quire.server.engine import client
from quire.server.engine.client import EngineClient
from quire.server.engine.loop import EngineLoop
from quire.server.http.protocol import LimitedProtocol
from quire.text.output import OutputAssembler
from quire.text.tokenizer import Tokenizer
from sample_tokenizers import sample
from server.harness import DEADLINE_S, PacedBackend, Server, events, health, http, raw_request, wait_clean, wait_until

Tokens = list[tuple[str, int, int]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def body(number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"request {number}", "max_tokens": 40, "seed": number, "ignore_eos": True} | fields


def stream_text(found: list[Any], index: int = 0) -> str:
    chosen = [choice for event in found if event != "[DONE]" for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in chosen)


@pytest.fixture
def held(fake: Server) -> Any:
    """The fake server with its backend held before each step; let go at the end."""
    fake.backend.go.clear()
    yield fake
    fake.backend.go.set()
    wait_clean(fake.url)


def test_stream_says_what_the_whole_answer_says(fake: Server) -> None:
    for path, fields in (
        (COMPLETIONS, body(1, n=3, logprobs=2)),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, "seed": 5, "n": 2}),
    ):
        http.post(fake.url + path, json=fields)  # from here on the prompt is cached
        whole = http.post(fake.url + path, json=fields).json()
        options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        found = events(http.post(fake.url + path, json=fields | options).text)
        assert found[-1] == "[DONE]"
        assert found[-2]["choices"] == []
        assert found[-2]["usage"] == whole["usage"]
        assert all(event["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] for event in found[:-1])
        for choice in whole["choices"]:
            mine = [c for event in found[:-1] for c in event["choices"] if c["index"] == choice["index"]]
            assert stream_text(found, choice["index"]) == (choice["text"] if "text" in choice else choice["message"]["content"])
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]] == ["length"]
            if choice.get("logprobs"):
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    assert [x for c in mine if c["logprobs"] for x in c["logprobs"][name]] == choice["logprobs"][name]


def test_headers_of_a_stream(fake: Server) -> None:
    answer = http.post(fake.url + COMPLETIONS, json=body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert all("usage" not in event for event in events(answer.text)[:-1])


def test_token_ids(fake: Server) -> None:
    fields = body(2, return_token_ids=True, prompt=[5, 6, 7])
    whole = http.post(fake.url + COMPLETIONS, json=fields).json()["choices"][0]
    found = events(http.post(fake.url + COMPLETIONS, json=fields | {"stream": True}).text)[:-1]
    assert whole["prompt_token_ids"] == found[0]["choices"][0]["prompt_token_ids"] == [5, 6, 7]
    assert [i for event in found for i in event["choices"][0]["token_ids"]] == whole["token_ids"]
    assert len(whole["token_ids"]) == 40


def test_choice_indexes_of_several_prompts(fake: Server) -> None:
    alone = [http.post(fake.url + COMPLETIONS, json=body(seed=3, prompt=p, n=2)).json()["choices"] for p in ("a", "b", "c")]
    together = http.post(fake.url + COMPLETIONS, json=body(seed=3, prompt=["a", "b", "c"], n=2)).json()["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    assert [choice["text"] for choice in together] == [choice["text"] for choices in alone for choice in choices]
    found = events(http.post(fake.url + COMPLETIONS, json=body(seed=3, prompt=["a", "b", "c"], n=2, stream=True, echo=True)).text)
    for index, choice in enumerate(together):
        assert stream_text(found, index) == "abc"[index // 2] + choice["text"]


def test_a_completion_continues_its_prompt() -> None:
    """With a sentencepiece vocabulary a text's first word loses its leading space; the continuation of a prompt must not."""
    tokenizer = Tokenizer(sample("llama"))
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    prompt = tokenizer.encode("hello")
    for seed in range(100):
        fields = {"prompt": prompt, "max_tokens": 5, "seed": seed, "return_token_ids": True}
        choice = http.post(server.url + COMPLETIONS, json=fields).json()["choices"][0]
        whole = tokenizer.decode(prompt + choice["token_ids"])
        assert whole == tokenizer.decode(prompt) + choice["text"]
        if choice["text"].startswith(" "):
            break
    else:
        pytest.fail("no output began with a space: the test proves nothing")
    server.stop()


def test_stop_string_frees_the_sequence_at_once(fake: Server) -> None:
    text = http.post(fake.url + COMPLETIONS, json=body(7)).json()["choices"][0]["text"]
    stop = text[len(text) // 2 :][:6]
    steps = fake.engine.stats().steps
    fake.backend.delay_s = 0.005
    answer = http.post(fake.url + COMPLETIONS, json=body(7, stop=[stop], max_tokens=400)).json()
    wait_clean(fake.url)
    fake.backend.delay_s = 0.0
    assert fake.engine.stats().steps - steps < 300, "the engine did not go on to max_tokens"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == stop
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["usage"]["completion_tokens"] <= 40


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_hang_up_frees_the_blocks_at_once(fake: Server, stream: bool) -> None:
    fake.backend.delay_s = 0.01  # 500 tokens would take 5 seconds
    try:
        steps = fake.engine.stats().steps
        with raw_request(fake.port, COMPLETIONS, body(max_tokens=500, stream=stream, n=2)):
            wait_until(lambda: health(fake.url).get("kv_blocks_used", 0) > 0, "the request runs")
        wait_clean(fake.url)
        assert fake.engine.stats().steps - steps < 400, "it ended because the client left, not because it was done"
    finally:
        fake.backend.delay_s = 0.0
    fake.engine.check()


def test_a_hang_up_before_anything_was_computed(held: Server) -> None:
    with raw_request(held.port, COMPLETIONS, body(stream=True)):
        pass
    with raw_request(held.port, COMPLETIONS, body(stream=False, prompt=["a", "b"])):
        pass


def test_hang_ups_of_waiting_requests(tokenizer: Tokenizer) -> None:
    """Two rows, ten clients: those that wait leave first."""
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), max_num_seqs=2)
    server.backend.delay_s = 0.03  # 15 seconds for the first two
    from contextlib import ExitStack

    with ExitStack() as patient, ExitStack() as impatient:
        for number in range(10):
            (patient if number < 2 else impatient).enter_context(
                raw_request(server.port, COMPLETIONS, body(number, max_tokens=500, stream=True))
            )
        wait_until(lambda: health(server.url).get("waiting") == 8, "eight wait")
        impatient.close()
        wait_until(lambda: health(server.url).get("waiting") == 0, "nobody waits")
        assert health(server.url)["running"] == 2
    wait_clean(server.url)
    server.stop()


@pytest.mark.parametrize("logprobs", [20, None], ids=["outputs", "single tokens"])
def test_slow_reader_gets_everything(fake: Server, monkeypatch: pytest.MonkeyPatch, logprobs: int | None) -> None:
    """It stops reading while the engine goes on and finishes; what it missed comes in fewer, larger pieces. A socket takes what it has
    room for, which may end within an event."""
    carry, connected, unsent = client.carry, LimitedProtocol.connection_made, 0

    def counted(*arguments: Any) -> Any:
        nonlocal unsent
        carried = carry(*arguments)
        unsent += len(carried[2])
        return carried

    def with_little_room(self: LimitedProtocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connected(self, transport)

    monkeypatch.setattr(client, "carry", counted)
    monkeypatch.setattr(LimitedProtocol, "connection_made", with_little_room)
    fields = body(9, max_tokens=480, logprobs=logprobs)
    whole = http.post(fake.url + COMPLETIONS, json=fields).json()["choices"][0]
    with raw_request(fake.port, COMPLETIONS, fields | {"stream": True}, receive_buffer=4096) as connection:
        first = connection.recv(100)
        wait_clean(fake.url)  # the engine is done with it, whether it reads or not
        answer = first
        while not answer.endswith(b"0\r\n\r\n"):
            answer += connection.recv(65536)
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"200" in head
    found = events(dechunked(rest).decode())
    assert found[-1] == "[DONE]"
    assert stream_text(found) == whole["text"]
    assert (unsent > 0) == (logprobs is None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_http_1_0_gets_no_chunks(fake: Server, stream: bool) -> None:
    """It knows no framing: what has no length ends with the connection."""
    fields = body(22, max_tokens=20, stream=stream)
    usual = http.post(fake.url + COMPLETIONS, json=fields)
    payload = json.dumps(fields).encode()
    head = f"POST {COMPLETIONS} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE_S) as connection:
        connection.sendall(head.encode() + payload)
        got = b"".join(iter(lambda: connection.recv(65536), b""))
    headers, _, rest = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers
    assert b"connection: close" in headers
    if stream:
        assert stream_text(events(rest.decode())) == stream_text(events(usual.text))
    else:
        assert json.loads(rest)["choices"] == usual.json()["choices"]


def test_requests_in_a_row_on_one_connection_get_each_its_own(fake: Server) -> None:
    """Both are sent at once (HTTP pipelining): what is pushed past the application belongs to the first until that one has ended."""
    requests = [body(20, max_tokens=60, stream=True), body(21, max_tokens=60, stream=True)]
    alone = [stream_text(events(http.post(fake.url + COMPLETIONS, json=fields).text)) for fields in requests]
    assert alone[0] != alone[1]
    fake.backend.delay_s = 0.002
    try:
        with raw_request(fake.port, COMPLETIONS, requests[0]) as connection:
            payload = json.dumps(requests[1]).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
            connection.sendall(head.encode() + payload)
            got = b""
            while got.count(b"0\r\n\r\n") < 2:
                part = connection.recv(65536)
                assert part, "the connection was closed"
                got += part
    finally:
        fake.backend.delay_s = 0.0
    for answer, text in zip(got.split(b"0\r\n\r\n")[:2], alone, strict=True):
        head_, _, rest = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head_
        assert stream_text(events(dechunked(rest).decode())) == text


@pytest.mark.parametrize("where", [(OutputAssembler, "feed"), (Tokenizer, "piece")], ids=["outputs", "single tokens"])
def test_a_stream_that_fails_midway_says_so(fake: Server, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str]) -> None:
    """In what is pushed past the application, too: the client is told, and the blocks come back."""
    original, calls = getattr(*where), 0

    def failing(self: Any, argument: Any) -> Any:
        nonlocal calls
        calls += len(getattr(argument, "token_ids", "1"))  # outputs may have several
        if calls >= 20:
            raise RuntimeError("in /secret/path")
        return original(self, argument)

    monkeypatch.setattr(*where, failing)
    fake.backend.delay_s = 0.002
    plain = where[0] is Tokenizer
    if plain:
        monkeypatch.setattr(fake.tokenizer, "json_texts", type(fake.tokenizer.json_texts)(fake.tokenizer))  # which asks again
    try:
        found = events(
            http.post(fake.url + COMPLETIONS, json=body(22, max_tokens=60, stream=True) | ({} if plain else {"logprobs": 0})).text
        )
    finally:
        fake.backend.delay_s = 0.0
    assert found[-1] == "[DONE]"
    assert "internal error" in found[-2]["error"]["message"]
    assert 1 < len(found) < 60
    wait_clean(fake.url)


def shapes(stream: bytes) -> set[bytes]:
    """The events of a stream without what differs from one to the next."""
    string = rb'"(?:[^"\\\\]|\\\\.)*"'
    for key in (b"id", b"text", b"content"):
        stream = re.sub(b'"' + key + b'":' + string, b'"' + key + b'":""', stream)
    stream = re.sub(rb'"(timings|metrics)":{[^}]*}', b"", stream)
    return set(re.sub(rb'"created":\d+', b"", stream).split(b"\n\n"))


@pytest.mark.parametrize("usage", [None, {"include_usage": True}], ids=["plain", "usage"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_single_tokens_that_go_past_everything_make_the_same_bytes(
    fake: Server, monkeypatch: pytest.MonkeyPatch, path: str, usage: dict[str, bool] | None
) -> None:
    """The fake model says any token at all: parts of characters, special ones, quotes."""
    asked: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    fields = asked | {"max_tokens": 400, "seed": 31, "ignore_eos": True, "stream": True, "stream_options": usage}
    carry, went = client.carry, [0, 0]

    def counted(tokens: Tokens, *rest: Any) -> Any:
        carried = carry(tokens, *rest)
        left = len(carried[0])
        went[0], went[1] = went[0] + left, went[1] + len(tokens) - left
        return carried

    monkeypatch.setattr(client, "carry", counted)
    fake.backend.delay_s = 0.001
    try:
        http.post(fake.url + path, json=fields)  # from here on the prompt is cached
        short = http.post(fake.url + path, json=fields).content
        assert min(went) > 5, "some go past everything, some don't"
        monkeypatch.setattr(client, "carry", lambda tokens, ways, now: (tokens, [], []))
        long = http.post(fake.url + path, json=fields).content
    finally:
        fake.backend.delay_s = 0.0
    assert stream_text(events(short.decode())) == stream_text(events(long.decode()))
    assert shapes(short) == shapes(long)
    if usage is not None:
        assert events(short.decode())[-2]["usage"] == events(long.decode())[-2]["usage"]


def dechunked(data: bytes) -> bytes:
    content = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        content += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    return content


def test_unfetched_outputs_are_merged(tokenizer: Tokenizer) -> None:
    """However long a reader sleeps, it finds one piece for each sequence."""
    from quire.server.calls.generation import _merged

    outputs = [SequenceOutput("a", i % 2, [i], None) for i in range(10)]
    outputs.append(SequenceOutput("a", 1, [99], None, "length"))
    merged = _merged(outputs)
    assert [(o.index, o.token_ids, o.finish_reason) for o in merged] == [(0, [0, 2, 4, 6, 8], None), (1, [1, 3, 5, 7, 9, 99], "length")]


def test_200_clients_with_random_hang_ups(fake: Server) -> None:
    """Those that stay get what they would have got alone; of those that leave nothing is left."""
    rng = random.Random(0)
    staying = set(rng.sample(range(200), 100))
    lengths = [rng.randint(1, 120) for _ in range(200)]

    def fields(number: int) -> dict[str, Any]:
        chosen = body(number, max_tokens=lengths[number], stream=True, prompt=f"client {number} " * rng.randint(1, 20))
        return chosen | {"n": 2} if number % 10 == 0 else chosen

    bodies = [fields(number) for number in range(200)]

    async def client(http: httpx.AsyncClient, number: int, leaves_after: int | None) -> bytes:
        got = b""
        async with http.stream("POST", COMPLETIONS, json=bodies[number]) as answer:
            assert answer.status_code == 200
            async for part in answer.aiter_raw():
                got += part
                if leaves_after is not None and len(got) >= leaves_after:
                    return b""
        return got

    async def everyone() -> list[bytes]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=fake.url, limits=limits, timeout=DEADLINE_S) as http:
            return await asyncio.gather(*(client(http, n, None if n in staying else rng.choice([0, 1, 500, 5000])) for n in range(200)))

    answers = asyncio.run(everyone())
    wait_clean(fake.url)
    fake.engine.check()
    with httpx.Client(base_url=fake.url, timeout=DEADLINE_S) as http:
        for number in sorted(staying):
            found = events(answers[number].decode())
            alone = http.post(COMPLETIONS, json=bodies[number] | {"stream": False}).json()
            assert found[-1] == "[DONE]"
            for choice in alone["choices"]:
                assert stream_text(found, choice["index"]) == choice["text"]
                reasons = [c["finish_reason"] for event in found[:-1] for c in event["choices"] if c["index"] == choice["index"]]
                assert reasons[-1] == "length"
                assert not any(reasons[:-1])


def test_pings_while_nothing_comes(held: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.calls.answers.PING_S", 0.05)
    with raw_request(held.port, COMPLETIONS, body(stream=True)) as connection:
        got = b""
        while got.count(b": ping\n\n") < 3:
            got += connection.recv(65536)
        assert b"data:" not in got


def test_the_engine_dies(tokenizer: Tokenizer) -> None:
    """Nobody hangs: what is in flight ends with an error, what comes later is refused, /health says 503."""
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    server.backend.delay_s = 0.01
    with (
        raw_request(server.port, COMPLETIONS, body(stream=True, max_tokens=400)) as streaming,
        raw_request(server.port, COMPLETIONS, body(max_tokens=400)) as waiting,
    ):
        wait_until(lambda: health(server.url).get("running") == 2, "both run")
        server.backend.broken = True
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += streaming.recv(65536)
        answer = waiting.recv(65536)
    found = events(dechunked(got.partition(b"\r\n\r\n")[2]).decode())
    assert found[-1] == "[DONE]"
    assert found[-2]["error"]["type"] == "server_error"
    assert "/secret" not in json.dumps(found)
    assert answer.startswith(b"HTTP/1.1 503")
    for answered in (
        http.get(server.url + "/health"),
        http.post(server.url + COMPLETIONS, json=body()),
        http.post(server.url + COMPLETIONS, json=body(stream=True)),
    ):
        assert answered.status_code == 503
        assert answered.json()["error"]["code"] == "unavailable"
        assert "/secret" not in answered.text
    assert http.get(server.url + "/v1/models").status_code == 200
    server.stop()


def test_one_row_fails(fake: Server) -> None:
    """An error in one request's work ends that request, and no other."""
    fake.backend.fail_rows = set(range(64))
    try:
        answer = http.post(fake.url + COMPLETIONS, json=body())
        assert answer.status_code == 500
        assert "not finite" in answer.json()["error"]["message"]
        found = events(http.post(fake.url + COMPLETIONS, json=body(stream=True)).text)
        assert "not finite" in found[-2]["error"]["message"]
    finally:
        fake.backend.fail_rows = set()
    assert http.post(fake.url + COMPLETIONS, json=body()).status_code == 200
    wait_clean(fake.url)


def test_health_while_a_step_takes_long(fake: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    original = EngineClient.stats
    monkeypatch.setattr(EngineClient, "stats", lambda self, timeout=5.0: original(self, 0.05))
    fake.backend.go.clear()
    try:
        with raw_request(fake.port, COMPLETIONS, body()):
            wait_until(lambda: health(fake.url)["status"] == "busy", "the step is on its way")
    finally:
        fake.backend.go.set()
    monkeypatch.undo()
    wait_clean(fake.url)


def test_shutdown_ends_streams_with_an_error(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    server.backend.delay_s = 0.01
    with raw_request(server.port, COMPLETIONS, body(stream=True, max_tokens=400)) as connection:
        wait_until(lambda: health(server.url).get("running") == 1, "it runs")
        server.stop()
        got = b""
        while part := connection.recv(65536):
            got += part
    found = events(dechunked(got.partition(b"\r\n\r\n")[2]).decode())
    assert "shutting down" in found[-2]["error"]["message"]
    assert found[-1] == "[DONE]"


def test_the_loop_refuses_what_the_engine_refuses(fake: Server) -> None:
    """The front checks first; should the engine still refuse, the request ends with its message."""
    got: list[Any] = []
    inbox: SimpleQueue[Any] = SimpleQueue()
    loop = EngineLoop(fake.engine, inbox, got.append)  # not running: one turn by hand
    bad = Request("bad", [], SamplingParams(n=2), 0)
    from quire.server.engine.messages import Add, Outputs

    inbox.put(Add(bad))
    assert loop._turn()
    message = got[0]  # what the engine has counted may follow
    assert isinstance(message, Outputs)
    assert [(o.index, o.finish_reason) for o in message.outputs] == [(0, "error"), (1, "error")]
    assert "empty" in str(message.outputs[0].stop_reason)


def test_a_client_that_leaves_before_the_first_byte() -> None:
    """The generator of events was never begun then, so nothing in it can clean up."""
    from quire.server.http.sse import EventStream

    closed = []

    async def events_() -> AsyncIterator[bytes]:
        pytest.fail("begun")
        yield b""

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def blocked(message: Any) -> None:
        await asyncio.Event().wait()

    asyncio.run(EventStream(events_(), lambda: closed.append(True))({}, gone, blocked))
    assert closed == [True]
