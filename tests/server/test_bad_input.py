"""Bad input: the right status, the field, a message with the numbers and the remedy; the server goes on, no block leaks."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from typing import Any

import httpx
import pytest
from fastapi import Request

from quire.server.http.errors import TooLargeError
from quire.server.http.limits import read_json
from server.harness import DEADLINE_S, Server, health, http, raw_request, wait_clean

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 2} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hello", "max_tokens": 2} | fields


# path, body, status, param, words that the message must have
TABLE: list[tuple[str, Any, int, str | None, tuple[str, ...]]] = [
    # prompts
    (COMPLETIONS, {}, 400, "prompt", ("required",)),
    (COMPLETIONS, text(prompt=None), 400, "prompt", ("string",)),
    (COMPLETIONS, text(prompt=""), 400, "prompt", ("empty",)),
    (COMPLETIONS, text(prompt=[]), 400, "prompt", ("empty",)),
    (COMPLETIONS, text(prompt=[[]]), 400, "prompt", ("empty",)),
    (COMPLETIONS, text(prompt=["a", ""]), 400, "prompt", ("empty",)),
    (COMPLETIONS, text(prompt=["a", 1]), 400, "prompt", ("got 1",)),
    (COMPLETIONS, text(prompt=[1, True]), 400, "prompt", ("true",)),
    (COMPLETIONS, text(prompt=[[1], [1.5]]), 400, "prompt", ("1.5",)),
    (COMPLETIONS, text(prompt={"a": 1}), 400, "prompt", ("list of token ids",)),
    (COMPLETIONS, text(prompt=[1] * 600), 400, "prompt", ("600", "512", "511", "--max-model-len")),
    (COMPLETIONS, text(prompt="a b " * 1000), 400, "prompt", ("512", "shorten")),
    (COMPLETIONS, text(prompt="x" * 100_000), 400, "prompt", ("100,000 bytes", "65,536", "128")),
    (COMPLETIONS, text(prompt=[1] * 500, max_tokens=13), 400, "max_tokens", ("500", "13", "512", "at most 12")),
    (COMPLETIONS, text(prompt=[1 << 20]), 400, "prompt", ("1048576", "4095")),
    (COMPLETIONS, text(prompt=[-1]), 400, "prompt", ("-1", "4095")),
    (COMPLETIONS, text(prompt=[1 << 80]), 400, "prompt", ("4095",)),
    (COMPLETIONS, text(prompt=["a"] * 9), 400, "prompt", ("9", "at most 8")),
    (COMPLETIONS, text(prompt=["a"] * 8, n=129), 400, "n", ("128", "129")),
    # numbers
    (COMPLETIONS, text(max_tokens=0), 400, "max_tokens", ("at least 1", "got 0", "echo")),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", ("at least 1", "got 0")),
    (COMPLETIONS, text(max_tokens=0, echo=True, beam_width=2), 400, "max_tokens", ("beam search",)),
    (COMPLETIONS, text(max_tokens=-5), 400, "max_tokens", ("-5",)),
    (COMPLETIONS, text(max_tokens=10**30), 400, "max_tokens", ("from 0 to",)),
    (COMPLETIONS, text(max_tokens="2"), 400, "max_tokens", ("an integer", '"2"')),
    (COMPLETIONS, text(max_tokens=2.5), 400, "max_tokens", ("2.5",)),
    (COMPLETIONS, text(max_tokens=True), 400, "max_tokens", ("an integer", "true")),
    (COMPLETIONS, text(temperature=-1), 400, "temperature", ("from 0", "-1")),
    (COMPLETIONS, text(temperature="hot"), 400, "temperature", ("a number", '"hot"')),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "temperature", ("nan",)),
    (COMPLETIONS, b'{"prompt": "a", "temperature": Infinity}', 400, "temperature", ("inf",)),
    (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", ("inf",)),
    (COMPLETIONS, b'{"prompt": "a", "logit_bias": {"1": NaN}}', 400, "logit_bias", ("nan",)),
    (COMPLETIONS, text(top_p=0), 400, "top_p", ("above 0", "temperature=0")),
    (COMPLETIONS, text(top_p=2), 400, "top_p", ("from 0 to 1", "got 2")),
    (COMPLETIONS, text(top_k=-2), 400, "top_k", ("-2",)),
    (COMPLETIONS, text(min_p=1.5), 400, "min_p", ("1.5",)),
    (COMPLETIONS, text(n=0), 400, "n", ("from 1 to 128",)),
    (COMPLETIONS, text(n=10**6), 400, "n", ("from 1 to 128",)),
    (COMPLETIONS, text(logprobs=21), 400, "logprobs", ("20",)),
    (COMPLETIONS, text(logprobs=-1), 400, "logprobs", ("-1",)),
    (COMPLETIONS, text(logprobs=True), 400, "logprobs", ("an integer",)),
    (COMPLETIONS, text(seed=1 << 64), 400, "seed", ("18446744073709551615",)),
    (COMPLETIONS, text(seed="1"), 400, "seed", ("an integer",)),
    (COMPLETIONS, text(presence_penalty=3), 400, "presence_penalty", ("3",)),
    (COMPLETIONS, text(repetition_penalty=0), 400, "repetition_penalty", ("0.01",)),
    (COMPLETIONS, text(min_tokens=5), 400, "min_tokens", ("5", "2")),
    (COMPLETIONS, text(allowed_token_ids=[7], stop_token_ids=[7], min_tokens=1), 400, "allowed_token_ids", ("min_tokens 1 bans",)),
    (COMPLETIONS, {"prompt": "x", "min_tokens": 9_000}, 400, "min_tokens", ("9,000", "lower min_tokens")),
    (COMPLETIONS, text(stop_token_ids=[99999]), 400, "stop_token_ids", ("99999", "4095")),
    (COMPLETIONS, text(stop_token_ids=[1.5]), 400, "stop_token_ids.0", ("an integer",)),
    (COMPLETIONS, text(logit_bias={"99999": 1}), 400, "logit_bias", ("99999", "4095")),
    (COMPLETIONS, text(logit_bias={"x": 1}), 400, "logit_bias", ("'x'",)),
    (COMPLETIONS, text(logit_bias={"1": 101}), 400, "logit_bias", ("101",)),
    (COMPLETIONS, text(logit_bias={str(i): 1 for i in range(1025)}), 400, "logit_bias", ("1025", "1024")),
    (COMPLETIONS, text(stop=5), 400, "stop", ("got 5",)),
    (COMPLETIONS, text(stop=[""]), 400, "stop", ("non-empty",)),
    (COMPLETIONS, text(stop=["a"] * 17), 400, "stop", ("17", "16")),
    (COMPLETIONS, text(stop="x" * 2000), 400, "stop", ("2000", "1024")),
    # combinations and what is not supported
    (COMPLETIONS, text(stream_options={"include_usage": True}), 400, "stream_options", ("stream",)),
    (COMPLETIONS, text(stream="yes"), 400, "stream", ("true or false",)),
    (COMPLETIONS, text(best_of=3, n=4), 400, "best_of", ("best_of 3 < n 4", "raise best_of")),
    (COMPLETIONS, text(best_of=129), 400, "best_of", ("129", "128")),
    (COMPLETIONS, text(best_of="3"), 400, "best_of", ("an integer",)),
    (COMPLETIONS, text(prompt=["a"] * 8, n=2, best_of=129), 400, "best_of", ("129", "128")),
    (COMPLETIONS, text(best_of=3, stream=True), 400, "best_of", ("best_of 3 > n 1", "streamed", "leave out")),
    (CHAT, chat(best_of=3, stream=True), 400, "best_of", ("streamed",)),
    # beams
    (COMPLETIONS, text(use_beam_search="yes"), 400, "use_beam_search", ("true or false",)),
    (COMPLETIONS, text(beam_width=0), 400, "beam_width", ("from 1 to 32",)),
    (COMPLETIONS, text(beam_width=33), 400, "beam_width", ("from 1 to 32",)),
    (COMPLETIONS, text(beam_width=2, n=3), 400, "beam_width", ("beam_width 2 < n 3",)),
    (COMPLETIONS, text(beam_width=2, use_beam_search=False), 400, "beam_width", ("needs use_beam_search",)),
    (COMPLETIONS, text(length_penalty=2), 400, "length_penalty", ("needs use_beam_search", "2")),
    (COMPLETIONS, text(early_stopping=True), 400, "early_stopping", ("needs use_beam_search",)),
    (COMPLETIONS, text(beam_width=2, length_penalty=11), 400, "length_penalty", ("-10 to 10",)),
    (COMPLETIONS, text(beam_width=2, early_stopping="soon"), 400, "early_stopping", ("soon", '"never"')),
    (COMPLETIONS, text(beam_width=2, early_stopping=[1]), 400, "early_stopping", ("[1]", '"never"')),
    (COMPLETIONS, text(beam_width=2, early_stopping=1), 400, "early_stopping", ("got 1", '"never"')),
    (COMPLETIONS, text(beam_width=2, temperature=0.5), 400, "temperature", ("0.5", "beam search", "leave it out")),
    (COMPLETIONS, text(beam_width=2, top_p=0.5), 400, "top_p", ("beam search",)),
    (COMPLETIONS, text(beam_width=2, stop="x"), 400, "stop", ("beam search",)),
    (COMPLETIONS, text(beam_width=2, logprobs=1), 400, "logprobs", ("logprobs=0",)),
    (CHAT, chat(beam_width=2, logprobs=True, top_logprobs=1), 400, "top_logprobs", ("top_logprobs=0",)),
    (COMPLETIONS, text(beam_width=32, prompt=[[1] * 300], max_tokens=212), 400, "beam_width", ("32 beams", "466 KV blocks", "has 256")),
    # scheduling and the cache
    (COMPLETIONS, text(priority="high"), 400, "priority", ("an integer",)),
    (COMPLETIONS, text(priority=1.5), 400, "priority", ("an integer",)),
    (COMPLETIONS, text(priority=1 << 31), 400, "priority", ("2147483648", "2147483647")),
    (CHAT, chat(priority=-(1 << 31) - 1), 400, "priority", ("-2147483648",)),
    (COMPLETIONS, text(cache_salt=5), 400, "cache_salt", ("a string",)),
    (COMPLETIONS, text(cache_salt=""), 400, "cache_salt", ("1 to 128", "0 characters")),
    (CHAT, chat(cache_salt="x" * 129), 400, "cache_salt", ("128", "129")),
    (COMPLETIONS, text(cache_retention=5), 400, "cache_retention", ("an object",)),
    (COMPLETIONS, text(cache_retention={"priority": 5}), 400, "cache_retention.seconds", ("required",)),
    (COMPLETIONS, text(cache_retention={"priority": 0, "seconds": 1}), 400, "cache_retention.priority", ("from 1 to 100", "got 0")),
    (COMPLETIONS, text(cache_retention={"priority": 101, "seconds": 1}), 400, "cache_retention.priority", ("101",)),
    (COMPLETIONS, text(cache_retention={"priority": 5.5, "seconds": 1}), 400, "cache_retention.priority", ("an integer",)),
    (COMPLETIONS, text(cache_retention={"priority": 5, "seconds": 0}), 400, "cache_retention.seconds", ("above 0",)),
    (CHAT, chat(cache_retention={"priority": 5, "seconds": 86401}), 400, "cache_retention.seconds", ("86400", "86401")),
    (COMPLETIONS, b'{"prompt": "a", "cache_retention": {"priority": 5, "seconds": NaN}}', 400, "cache_retention.seconds", ("nan",)),
    (COMPLETIONS, text(cache_retention={"priority": 5, "seconds": 5, "sec": 1}), 400, "cache_retention.sec", ("got 1",)),
    (COMPLETIONS, text(echo=True, logprobs=0, beam_width=2), 400, "prompt_logprobs", ("beam search", "echo with logprobs")),
    (COMPLETIONS, text(echo=True, logprobs=21), 400, "logprobs", ("from 0 to 20",)),
    (COMPLETIONS, text(suffix="x"), 400, "suffix", ("not supported",)),
    (COMPLETIONS, text(guided_regex=""), 400, "guided_regex", ("not empty",)),
    (COMPLETIONS, text(structured_outputs={"json": {}, "regex": "a"}), 400, "structured_outputs", ("exactly one",)),
    (COMPLETIONS, text(prompt_logprobs=21, stream=False), 400, "prompt_logprobs", ("from 0 to 20",)),
    (CHAT, chat(prompt_logprobs=-1, stream=False), 400, "prompt_logprobs", ("from 0 to 20",)),
    (COMPLETIONS, text(prompt_logprobs=True), 400, "prompt_logprobs", ("an integer",)),
    (COMPLETIONS, text(prompt_logprobs=0, stream=True), 400, "prompt_logprobs", ("stream",)),
    (COMPLETIONS, text(truncate_prompt_tokens=0), 400, "truncate_prompt_tokens", ("-1", "got 0")),
    (COMPLETIONS, text(truncate_prompt_tokens=-2), 400, "truncate_prompt_tokens", ("-2",)),
    (CHAT, chat(truncate_prompt_tokens=513), 400, "truncate_prompt_tokens", ("512", "513")),
    (COMPLETIONS, text(truncate_prompt_tokens=-1, max_tokens=600), 400, "truncate_prompt_tokens", ("512 - 600", "max_tokens")),
    (COMPLETIONS, text(truncation_side="middle"), 400, "truncation_side", ("middle", "left", "right")),
    (COMPLETIONS, text(request_id=""), 400, "request_id", ("1 to 128",)),
    (CHAT, chat(request_id="a\nb"), 400, "request_id", ("visible ASCII",)),
    (COMPLETIONS, text(request_id="a" * 129), 400, "request_id", ("128",)),
    # embeddings
    (EMBEDDINGS, {}, 400, "input", ("required",)),
    (EMBEDDINGS, {"input": ""}, 400, "input", ("empty",)),
    (EMBEDDINGS, {"input": ["a", 1]}, 400, "input", ("input must be", "got 1")),
    (EMBEDDINGS, {"input": ["a"] * 9}, 400, "input", ("input holds 9", "at most 8")),
    (EMBEDDINGS, {"input": [1] * 513}, 400, "input", ("513", "at most 512")),
    (EMBEDDINGS, {"input": [1 << 20]}, 400, "input", ("1048576", "4095")),
    (EMBEDDINGS, {"input": "a", "dimensions": 0}, 400, "dimensions", ("from 1 to 2", "got 0")),
    (EMBEDDINGS, {"input": "a", "dimensions": 3}, 400, "dimensions", ("from 1 to 2", "got 3")),
    (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, 400, "encoding_format", ("hex", "base64")),
    (EMBEDDINGS, {"input": "a", "pooling": "max"}, 400, "pooling", ("max", "mean or last")),
    (EMBEDDINGS, {"input": "a", "temperature": 1}, 400, "temperature", ("unknown field",)),
    (EMBEDDINGS, {"input": "a", "model": "gpt-5"}, 404, "model", ("gpt-5",)),
    (COMPLETIONS, text(temprature=1), 400, "temprature", ("temperature",)),
    (COMPLETIONS, text(zzz=1), 400, "zzz", ("unknown field", "max_tokens")),
    (COMPLETIONS, text(model="gpt-5"), 404, "model", ("gpt-5", "fake")),
    (COMPLETIONS, text(model=5), 400, "model", ("a string",)),
    # chat
    (CHAT, {}, 400, "messages", ("required",)),
    (CHAT, chat(messages=[]), 400, "messages", ("at least one",)),
    (CHAT, chat(messages="Hello"), 400, "messages", ("a list",)),
    (CHAT, chat(messages=["Hello"]), 400, "messages.0", ("an object",)),
    (CHAT, chat(messages=[{"role": "boss", "content": "a"}]), 400, "messages[0].role", ("boss",)),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content", ("missing",)),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", ("got 5",)),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages[0].content", ("image_url", "text")),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), 400, "messages[0].content", ("[0] has no text",)),
    (CHAT, chat(messages=[{"role": "user", "content": "a b " * 1000}]), 400, "messages", ("512",)),
    (CHAT, chat(max_completion_tokens=9000), 400, "max_completion_tokens", ("max_completion_tokens 9,000", "512")),
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 100_000}]), 400, "messages", ("65,536",)),
    (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens", ("max_completion_tokens must be at least 1, got 0",)),
    (CHAT, chat(max_completion_tokens=-1), 400, "max_completion_tokens", ("max_completion_tokens must be at least 1, got -1",)),
    (CHAT, chat(reasoning_effort=3), 400, "reasoning_effort", ("a string",)),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs", ("logprobs",)),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", ("top_logprobs", "20")),
    (CHAT, chat(logprobs=1), 400, "logprobs", ("true or false",)),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools", ("chat template", "--tool-parser")),
    (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", ("json_object", '"xml"')),
    (CHAT, chat(add_generation_prompt=True, continue_final_message=True), 400, "continue_final_message", ("at most one",)),
    (CHAT, chat(prompt="Hello"), 400, "prompt", ("unknown field",)),
    # bodies
    (COMPLETIONS, b"", 400, None, ("empty",)),
    (COMPLETIONS, b'{"prompt": ', 400, None, ("JSON", "column")),
    (COMPLETIONS, b"[1]", 400, None, ("a list",)),
    (COMPLETIONS, b'"hello"', 400, None, ("a string",)),
    (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400, None, ("UTF-8", "byte 12")),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None, ("JSON", "half of a pair")),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 50_000, 400, None, ("JSON",)),
    (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 50_000 + b"}", 400, None, ()),
    (COMPLETIONS, b" " * 200_001, 413, None, ("200,001", "200,000", "--max-body-bytes")),
    # tokenizing
    (TOKENIZE, {}, 400, "prompt", ("either prompt or messages",)),
    (TOKENIZE, {"prompt": 5}, 400, "prompt", ("a string",)),
    (TOKENIZE, {"prompt": "a", "messages": HELLO}, 400, "prompt", ("not both",)),
    (DETOKENIZE, {}, 400, "tokens", ("required",)),
    (DETOKENIZE, {"tokens": [1, 99999]}, 400, "tokens", ("99999", "4096")),
    (DETOKENIZE, {"tokens": [-1]}, 400, "tokens", ("-1",)),
    (DETOKENIZE, {"tokens": [True]}, 400, "tokens.0", ("an integer",)),
    (DETOKENIZE, {"tokens": "1"}, 400, "tokens", ("a list",)),
]  # fmt: skip


def check_error(answer: httpx.Response, status: int, param: str | None, words: tuple[str, ...]) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["param"] == param, error
    assert isinstance(error["code"], str)
    for word in words:
        assert word in error["message"], error
    assert len(error["message"]) < 1500
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    if status < 500:
        assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_table(fake: Server, stream: bool) -> None:
    with httpx.Client(base_url=fake.url, timeout=DEADLINE_S) as client:
        for path, body, status, param, words in TABLE:
            if stream:
                if not isinstance(body, dict) or path in (TOKENIZE, DETOKENIZE, EMBEDDINGS) or "stream" in body or "stream_options" in body:
                    continue
                body = body | {"stream": True}
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post(path, content=content, headers={"content-type": "application/json"})
            try:
                check_error(answer, status, param, words)
            except AssertionError as e:
                raise AssertionError(f"{path} {content[:200]!r}: {e}") from e
        assert client.post(COMPLETIONS, json=text()).status_code == 200, "the server goes on"
    wait_clean(fake.url)
    fake.engine.check()


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_wrong_content_type(fake: Server, kind: str) -> None:
    answer = http.post(fake.url + COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind} if kind else {})
    check_error(answer, 415, None, ("application/json",))


def test_a_compressed_body(fake: Server) -> None:
    body, headers = gzip.compress(json.dumps(text()).encode()), {"content-type": "application/json", "content-encoding": "gzip"}
    check_error(http.post(fake.url + COMPLETIONS, content=body, headers=headers), 415, None, ("encoding 'gzip' is not supported",))
    assert http.post(fake.url + COMPLETIONS, json=text(), headers={"content-encoding": "identity"}).status_code == 200


def test_probes_without_a_body(fake: Server) -> None:
    for path in ("/health", "/ping", "/ready"):
        answer = http.head(fake.url + path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_content_type_with_a_charset_is_fine(fake: Server) -> None:
    answer = http.post(fake.url + COMPLETIONS, content=json.dumps(text()), headers={"content-type": "application/json; charset=utf-8"})
    assert answer.status_code == 200


def test_unknown_paths_and_methods(fake: Server) -> None:
    check_error(http.get(fake.url + "/v2/nothing"), 404, None, ("/v2/nothing", "/v1/completions", "/docs"))
    check_error(http.get(fake.url + "/v1/completions/"), 404, None, ())
    check_error(http.get(fake.url + COMPLETIONS), 405, None, ("POST",))
    check_error(http.get(fake.url + "/v1/models/meta/llama"), 404, "model", ("meta/llama", "fake"))


def test_chunked_body_is_cut_at_the_limit(fake: Server) -> None:
    """Without a Content-Length the size shows only while reading."""
    answer = http.post(fake.url + COMPLETIONS, content=(b"x" * 10_000 for _ in range(40)), headers={"content-type": "application/json"})
    check_error(answer, 413, None, ("200,000",))


def test_a_body_whose_last_part_is_over_the_limit_is_not_waited_for() -> None:
    """After the last message there is nothing to throw away: asking for more would wait for ever."""
    parts = [
        {"type": "http.request", "body": b"x" * 60, "more_body": True},
        {"type": "http.request", "body": b"x" * 60, "more_body": False},
    ]

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(TooLargeError, match="100"):
        asyncio.run(read_json(Request(scope, receive), 100))


@pytest.mark.parametrize("length", [b"content-length: 1500000", b"transfer-encoding: chunked"])
def test_a_client_that_writes_everything_before_it_reads_gets_the_answer(fake: Server, length: bytes) -> None:
    """Closing a connection with unread input resets it, and the answer would be lost on the way."""
    body = b"x" * 1_500_000 if b"content-length" in length else b"2710\r\n%b\r\n" % (b"x" * 10_000) * 150 + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + length + b"\r\n\r\n")
        for start in range(0, len(body), 10_000):
            connection.sendall(body[start : start + 10_000])
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_endless_body_is_cut_off(fake: Server) -> None:
    """A client that never stops sending is not read for ever."""
    with socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE_S) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        sent = 0
        try:
            while sent < 100_000_000:
                connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
        except OSError:  # reset, or a broken pipe
            pass
        assert sent < 100_000_000
    wait_clean(fake.url)


def test_expect_continue_is_refused_before_the_body(fake: Server) -> None:
    with socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE_S) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 999999999\r\nexpect: 100-continue\r\n\r\n"
        )
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"999,999,999" in answer


def test_huge_headers(fake: Server) -> None:
    for head in (
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-big: " + b"a" * 1_000_000,  # never ends
        b"GET /" + b"a" * 1_000_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1;ext=" + b"a" * 1_000_000,
    ):
        with socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE_S) as connection:
            answer = b""
            try:
                connection.sendall(head)
                answer = connection.recv(65536)
            except OSError:  # the server closed before it had read everything
                pass
            assert not answer or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")), answer[:200]
    assert health(fake.url)["status"] == "ok"


def test_what_is_not_http(fake: Server) -> None:
    with socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00 this is TLS\r\n\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"error"' in answer


def test_client_that_leaves_in_the_middle_of_its_body(fake: Server) -> None:
    with socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE_S) as connection:
        connection.sendall(
            b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"prompt"'
        )
    wait_clean(fake.url)


def test_harmless_fields_are_ignored(fake: Server) -> None:
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "suffix": None, "best_of": 1, "tools": None,
        "response_format": {"type": "text"}, "use_beam_search": False, "stop": None, "ignore_eos": True, "logprobs": None, "n": 1,
        "length_penalty": 1.0, "early_stopping": False, "priority": 0, "cache_salt": None, "prompt_cache_key": "x",
        "prompt_cache_retention": "24h", "repetition_penalty": 1.0, "prompt_logprobs": None, "temperature": None,
        "spaces_between_special_tokens": False,
        "not_known_but_null": None,
    }  # fmt: skip
    answer = http.post(fake.url + COMPLETIONS, json=text(**harmless))
    assert answer.status_code == 200, answer.text


def test_request_ids(fake: Server) -> None:
    assert http.get(fake.url + "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get(fake.url + "/health", headers={"x-request-id": "a" * 500}).headers["x-request-id"].startswith("req-")
    with raw_request(fake.port, COMPLETIONS, text(stream=True)) as connection:
        assert b"x-request-id: req-" in connection.recv(65536)
