"""Engines that die, hang and don't start, behind a real ``quire serve``: nobody's request is lost, and its bytes are those of a run
that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.core.sequence import Request, Retention
from quire.errors import EngineError, QuireError
from quire.sampling_params import SamplingParams
from quire.server.engine import supervisor
from quire.server.engine.messages import Add, decode_to_engine, encode
from quire.structured import Structured
from server.harness import (
    DEADLINE_S,
    EMBEDDED,
    Gate,
    Process,
    engine_pid,
    events,
    generated,
    health,
    http,
    in_flight,
    is_gone,
    named_events,
    start_process,
    wait_clean,
    wait_until,
)

SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "people",
        "schema": {
            "type": "array",
            "minItems": 8,
            "items": {
                "type": "object",
                "properties": {"first_name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
                "required": ["first_name", "age"],
                "additionalProperties": False,
            },
        },
    },
}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


@contextmanager
def serving(*arguments: str, **more: Any) -> Iterator[Process]:
    process = Process("--kv-memory", "32MiB", *arguments, **more)
    try:
        yield process
    finally:
        process.kill()


def calls() -> list[tuple[str, dict[str, Any]]]:
    """Requests of every kind: sampled and greedy, whole and streamed, several samples, the best of several, beams, stop strings,
    penalties, log-probabilities, prompts that share a beginning."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": "import os\n", "max_tokens": 300, "temperature": 0, "stream": True}),
        (COMPLETIONS, {"prompt": "import os\nimport re\n", "max_tokens": 200, "stream": True, "logprobs": 3}),
        (COMPLETIONS, {"prompt": ["class A:\n", "def f(x):\n"], "n": 3, "max_tokens": 150, "logprobs": 1, "echo": True}),
        (COMPLETIONS, {"prompt": "for i in", "n": 1, "best_of": 4, "max_tokens": 120}),
        (COMPLETIONS, {"prompt": "def g(", "beam_width": 3, "n": 2, "max_tokens": 60}),
        (COMPLETIONS, {"prompt": "x = [", "stop": ["return", "if "], "max_tokens": 300, "stream": True}),
        (COMPLETIONS, {"prompt": "y = {", "frequency_penalty": 0.5, "repetition_penalty": 1.1, "top_p": 0.9, "max_tokens": 300}),
        (CHAT, {"messages": [{"role": "user", "content": "Write a loop"}], "max_tokens": 200, "stream": True, "n": 2}),
        (RESPONSES, {"input": "Write a loop", "max_output_tokens": 150, "stream": True, "top_logprobs": 1}),
        (MESSAGES, {"messages": [{"role": "user", "content": "Write a loop"}], "max_tokens": 150, "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "List"}], "max_tokens": 200, "stream": True, "response_format": SCHEMA}),
        (COMPLETIONS, {"prompt": "z = ", "max_tokens": 200, "n": 2, "logprobs": 1, "structured_outputs": {"regex": "(ab|[0-9]+ )*"}}),
        (COMPLETIONS, {"prompt": "import os\n", "max_tokens": 200, "bad_words": ["import", "return x"], "stream": True}),
    ]
    return [(path, {"ignore_eos": True, "seed": 100 * i + j} | fields) for i in range(2) for j, (path, fields) in enumerate(kinds)]


def told(url: str, call: tuple[str, dict[str, Any]]) -> Any:
    """All that the client is told which may not depend on how often the engine died."""
    path, fields = call
    answer = http.post(url + path, json=fields)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()["choices"]
    if path in (RESPONSES, MESSAGES):
        return told_by_name(named_events(answer.text))
    said: dict[int, list[Any]] = {}
    found = events(answer.text)
    assert found[-1] == "[DONE]"
    for event in found[:-1]:
        assert "error" not in event, event
        for choice in event["choices"]:
            text, tokens, reasons = said.setdefault(choice["index"], ["", [], []])
            text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            if choice.get("logprobs"):
                tokens += zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True)
            if choice["finish_reason"]:
                reasons.append(choice["finish_reason"])
            said[choice["index"]] = [text, tokens, reasons]
    assert all(len(reasons) == 1 for _, _, reasons in said.values()), "one end for each"
    return said


def told_by_name(found: list[dict[str, Any]]) -> Any:
    """Of a stream of named events; what comes in one event depends on the steps, pings on the time, and the ids are made up."""
    found = [event for event in found if event["type"] != "ping"]
    end = "message_delta" if found[0]["type"] == "message_start" else "response.incomplete"
    assert [event["type"] for event in found].count(end) == 1, "one end for each"
    added = [event for event in found if event["type"] in ("content_block_delta", "response.output_text.delta")]
    text = "".join(event["delta"]["text"] if "index" in event else event["delta"] for event in added)
    return text, [entry for event in added for entry in event.get("logprobs", ())]


def all_told(url: str) -> list[Any]:
    with ThreadPoolExecutor(64) as clients:
        return list(clients.map(lambda call: told(url, call), calls()))


def test_killed_at_any_moment_every_stream_ends_with_the_same_bytes() -> None:
    rng = random.Random(3)
    with serving("--max-num-seqs", "24") as server:
        undisturbed = all_told(server.url)
        killed: list[int] = []

        def killer() -> None:
            for _ in range(4):  # after six of them, whoever has got nothing of any engine would be a suspect
                time.sleep(rng.uniform(0.05, 1))
                killed.append(server.engine_pid)
                os.kill(killed[-1], signal.SIGKILL)
                wait_until(lambda: server.engine_pid not in killed, "the death was noticed")
                wait_until(lambda: http.get(server.url + "/ready").status_code == 200, "the next engine is there")

        with ThreadPoolExecutor(1) as side:
            kills = side.submit(killer)
            while not kills.done():  # all of them, however soon the calls are answered
                assert all_told(server.url) == undisturbed
            kills.result()
        wait_clean(server.url)
        assert health(server.url)["engine_restarts"] == len(killed)
        code, err = server.stop()
    assert code == 0
    assert err.count("killed by SIGKILL") == len(killed)
    assert "Traceback" not in err


def test_a_hung_engine_is_found_by_its_missing_steps() -> None:
    call = calls()[1]
    steps = call[1]["max_tokens"] * 3 // 2
    with serving("--engine-timeout", "2", stop_after=steps) as server:
        expected = told(server.url, call)
        assert told(server.url, call) == expected, "in the middle of it the engine stands still"
        restarts = health(server.url)["engine_restarts"]
        assert restarts >= 1
        time.sleep(3)  # idle for longer than the timeout: nothing is wrong with that
        assert health(server.url)["engine_restarts"] == restarts
        _, err = server.stop()
    assert "did not finish a step for 2 seconds and was killed" in err


def test_a_request_that_kills_engines_fails_alone() -> None:
    """One whose first token is far away meets every death; the other one has made tokens in between."""
    # In 50 steps of 16 tokens a stream is where it was and goes on, and a prompt of 1,800 is not done.
    options = ("--max-num-batched-tokens", "16", "--max-num-seqs", "2", "--no-prefix-caching")
    with ThreadPoolExecutor() as clients, serving(*options, stop_after=50) as server:  # should it fail, the server ends first
        streamed = COMPLETIONS, {"prompt": "import os\n", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
        asked: list[Future[Any]] = []

        def ask() -> None:
            asked.append(clients.submit(told, server.url, streamed))
            wait_until(lambda: in_flight(server.url) == 1, "it is the first: the other one would take all of a step")
            asked.append(clients.submit(http.post, server.url + COMPLETIONS, json={"prompt": [7] * 1800, "max_tokens": 1}))

        server.ask_while_stopped(ask, 2)
        stream, long = asked
        for _ in range(4):
            engine = server.wait_stopped()
            os.kill(engine, signal.SIGUSR1)  # anything but SIGKILL is a crash
            os.kill(engine, signal.SIGCONT)
            wait_until(lambda engine=engine: is_gone(engine), "it is dead")
        failed = long.result(DEADLINE_S)
        server.go_on()
        assert failed.status_code == 500
        message = failed.json()["error"]["message"]
        assert "4 engines died while they worked on it" in message
        assert "/" not in message
        assert stream.result(DEADLINE_S) == told(server.url, streamed)


def test_a_poisoned_request_fails_alone() -> None:
    """It kills every engine that begins it. Everybody else ends with the bytes of a run without it, whole or streamed."""
    poison = 4000
    process = Process("--kv-memory", "32MiB", "--kv-debug", environment={"QUIRE_TEST_CRASH_TOKEN": str(poison)})
    try:
        undisturbed = all_told(process.url)
        with ThreadPoolExecutor() as clients:
            before = generated(process.url)
            others = clients.submit(all_told, process.url)
            wait_until(lambda: generated(process.url) > before, "the others run")
            failed = http.post(process.url + COMPLETIONS, json={"prompt": [5, poison, 7], "max_tokens": 5})
            assert others.result(2 * DEADLINE_S) == undisturbed
        assert failed.status_code == 500
        assert re.search(r"\b[4-6] engines died while they worked on it", failed.json()["error"]["message"])
        wait_clean(process.url)
        assert 4 <= health(process.url)["engine_restarts"] <= 6
        streamed = http.post(process.url + COMPLETIONS, json={"prompt": [poison], "max_tokens": 5, "stream": True})
        assert "engines died while they worked on it" in events(streamed.text)[-2]["error"]["message"]
    finally:
        process.kill()


def test_the_crash_of_tests_needs_a_debug_mode() -> None:
    process = Process("--kv-memory", "16MiB", environment={"QUIRE_TEST_CRASH_TOKEN": "5"})
    try:
        assert http.post(process.url + COMPLETIONS, json={"prompt": [5], "max_tokens": 2}).status_code == 200
        assert health(process.url)["engine_restarts"] == 0
    finally:
        process.kill()


def test_a_front_that_dies_takes_its_engine_with_it() -> None:
    with serving() as server:
        pid = server.engine_pid
        server.process.kill()
        wait_until(lambda: is_gone(pid), "the engine has gone too")


def test_an_engine_that_dies_while_it_loads(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with gate.closed():
        process = start_process("--port", "0", environment=gate.environment)
        os.kill(engine_pid(process.pid), signal.SIGKILL)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("quire: the engine could not start: its process was killed by SIGKILL"), err
    assert err.count("\n") == 1


def test_an_engine_that_can_not_be_started_again(tmp_path: Path) -> None:
    """Whoever waits learns why; whoever comes later too, until what was missing is there again."""
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    with ThreadPoolExecutor() as clients, serving(str(folder), stop_after=20) as server:
        stream = clients.submit(http.post, server.url + COMPLETIONS, json=calls()[0][1])
        engine = server.wait_stopped()
        (folder / "model.safetensors").rename(folder / "elsewhere")
        os.kill(engine, signal.SIGKILL)
        found = events(stream.result(DEADLINE_S).text)
        assert found[-1] == "[DONE]"
        assert "the engine could not be started again" in found[-2]["error"]["message"]
        for path in ("/health", "/ready"):
            assert http.get(server.url + path).status_code == 503
        refused = http.post(server.url + COMPLETIONS, json={"prompt": "a"})
        assert refused.status_code == 503
        assert "safetensors" in refused.json()["error"]["message"]
        (folder / "elsewhere").rename(folder / "model.safetensors")
        wait_until(lambda: http.get(server.url + "/ready").status_code == 200, "another engine starts")
        assert http.post(server.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).status_code == 200
        _, err = server.stop()
    assert "attempt 3: " in err
    assert "requests are refused until an engine can be started" in err
    assert "Traceback" not in err


@pytest.fixture
def draining() -> Iterator[Callable[..., tuple[Process, Future[Any]]]]:
    """Starts a server and a stream, and sends SIGTERM in the middle of it; the engine stands still there."""
    with ThreadPoolExecutor() as clients:
        servers: list[Process] = []

        def start(*arguments: str) -> tuple[Process, Future[Any]]:
            server = Process("--kv-memory", "32MiB", *arguments, stop_after=50)
            servers.append(server)
            fields = {"prompt": "import os\n", "max_tokens": 1000, "temperature": 0, "ignore_eos": True, "stream": True}
            stream = clients.submit(http.post, server.url + COMPLETIONS, json=fields)
            server.wait_stopped()
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: http.get(server.url + "/ready").status_code == 503, "it drains")
            return server, stream

        yield start
        for server in servers:
            server.kill()


Draining = Callable[..., tuple[Process, Future[Any]]]


def test_sigterm_drains(draining: Draining) -> None:
    server, stream = draining()
    os.kill(server.engine_pid, signal.SIGTERM)  # as service managers do, to all processes
    with ThreadPoolExecutor(1) as side:
        said = side.submit(health, server.url)  # asks the engine, which answers after its next step
        refused = http.post(server.url + COMPLETIONS, json={"prompt": "a"})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        server.go_on()
        assert said.result(DEADLINE_S)["status"] == "draining"
    found = events(stream.result(DEADLINE_S).text)
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    code, err = server.process.wait(DEADLINE_S), server.process.communicate()[1]
    assert (code, err) == (0, "")


def test_an_engine_that_dies_while_the_server_drains(draining: Draining) -> None:
    server, stream = draining()
    first = server.engine_pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: server.engine_pid != first, "there is another engine")
    server.go_on()
    found = events(stream.result(DEADLINE_S).text)
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(DEADLINE_S) == 0


def test_what_does_not_end_in_time_ends_with_an_error(draining: Draining) -> None:
    server, stream = draining("--drain-timeout", "1")
    found = events(stream.result(DEADLINE_S).text)
    assert "shutting down" in found[-2]["error"]["message"]
    assert len(found) > 2, "what was made until then has arrived"
    server.go_on()
    assert server.process.wait(DEADLINE_S) == 0


def test_sigterm_waits_until_answers_are_sent() -> None:
    """To a client that reads slowly, though the engine has nothing to do any more."""
    fields = {"prompt": "import os\n", "max_tokens": 1900, "n": 8, "ignore_eos": True, "stream": True, "logprobs": 5}
    body = json.dumps(fields).encode()
    head = b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n" % COMPLETIONS.encode()
    with serving("--drain-timeout", "600") as server, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        reader.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        reader.recv(1)
        wait_until(lambda: health(server.url)["running"] == 0, "all is computed")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(7)  # longer than the time that it gives to connections at its end
        said = b"".join(iter(lambda: reader.recv(1 << 16), b""))
        assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.process.wait(DEADLINE_S) == 0


def test_a_second_signal_does_not_wait(draining: Draining) -> None:
    server, stream = draining("--drain-timeout", "3600")
    server.process.send_signal(signal.SIGTERM)
    assert "shutting down" in events(stream.result(DEADLINE_S).text)[-2]["error"]["message"]
    server.go_on()
    assert (server.process.wait(DEADLINE_S), server.process.communicate()[1]) == (0, "")


def test_requests_cross_the_socket_as_they_are() -> None:
    everything = SamplingParams(
        n=2, best_of=3, temperature=0.3, top_p=0.5, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.2,
        logit_bias={5: 1.5, 7: -100.0}, seed=(1 << 64) - 1, max_tokens=None, min_tokens=2,
        stop=["é", "x"], stop_token_ids=[4], ignore_eos=True,
        logprobs=3, include_stop_str_in_output=True, skip_special_tokens=False,
        structured=Structured.json({"type": "object"}, whitespace=""), allowed_token_ids=[7, 5], bad_words=["a", "b c"],
    )  # fmt: skip
    for params in (SamplingParams(), everything, SamplingParams(beam_width=4, early_stopping="never", length_penalty=0.5, n=2)):
        request = Request("ä", [1, 2, 3], params, (1 << 64) - 1, (1, 2), -3, b"\xff\x00", Retention(5, 2.5))
        message = decode_to_engine(encode(Add(request, [[1], None])))
        assert isinstance(message, Add)
        assert message.read() == request
        assert message.resumed == [[1], None]
        json.dumps(message.request["params"])  # plain data


def test_a_start_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No descriptor, no thread, no process: it is tried again and again. And what the system has none of ends nothing."""
    config = EngineConfig(model=str(tmp_path))
    with pytest.raises(QuireError):
        supervisor._started(config, None, False)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with pytest.raises(QuireError):
            supervisor._started(config, None, False)
    wait_until(lambda: (len(os.listdir("/proc/self/fd")), threading.active_count()) <= before, "all of it is gone")

    def none(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(supervisor, "EngineProcess", none)
    with pytest.raises(EngineError, match=r"the engine's process could not be started: .*Too many open files"):
        supervisor._started(config, None, False)
