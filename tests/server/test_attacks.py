"""Attacks by name: what public advisories of servers of this kind were about, and what else one would try. The server says no, loses
no block, and goes on. (Slow clients: test_slow_clients. The table of plain mistakes: test_bad_input.)"""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from quire.server.anthropic.schemas import MessagesRequest
from quire.server.calls.prompts import RESERVED_VARIABLES
from quire.server.calls.schemas import ChatCompletionRequest, CompletionRequest
from quire.server.http.keys import OPEN_PATHS, read_keys
from quire.server.responses.schemas import ResponsesRequest
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Server, http, wait_clean

COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
KEY = "sk-alice-0123456789"
BODIES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    COMPLETIONS: (CompletionRequest, {"prompt": "Hello", "max_tokens": 2}),
    CHAT: (ChatCompletionRequest, {"messages": HELLO, "max_tokens": 2}),
    RESPONSES: (ResponsesRequest, {"input": "Hello", "max_output_tokens": 2}),
    MESSAGES: (MessagesRequest, {"messages": HELLO, "max_tokens": 2}),
}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(f'[alice]\nkey = "{KEY}"\n')
    path.chmod(0o600)
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), keys=read_keys(str(path)))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever was tried, the next one is served, and no block is lost."""
    yield
    for name in {"server", "locked"} & set(request.fixturenames):
        server = request.getfixturevalue(name)
        answer = http.post(server.url + COMPLETIONS, json=BODIES[COMPLETIONS][1], headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
        wait_clean(server.url)
        server.engine.check()


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()  # json.dumps writes NaN, httpx refuses to
    return http.post(server.url + path, content=content, headers={"content-type": "application/json", **headers})


def refused(answer: httpx.Response, *statuses: int) -> str:
    """The message of an error that tells nothing of the server's inside."""
    assert answer.status_code in (statuses or (400,)), f"{answer.status_code} {answer.text[:500]}"
    error = answer.json()["error"]
    for word in ("Traceback", ".py", "site-packages", "0x", "object at", "pydantic", "quire.", "/tmp", "/usr"):
        assert word not in answer.text, answer.text
    assert len(answer.content) < 4000
    message = error["message"]
    assert isinstance(message, str)
    return message


def fields_of(schema: type[BaseModel], *types: type) -> list[str]:
    """The fields of a schema that may hold one of ``types``."""
    found = []
    for name, field in schema.model_fields.items():
        parts = set(typing.get_args(field.annotation)) or {field.annotation}
        if parts & set(types):
            found.append(name)
    return found


def raw(server: Server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except ConnectionResetError:
            pass
        return got


@pytest.mark.parametrize("path", BODIES)
def test_numbers_that_are_none(server: Server, path: str) -> None:
    """Comparisons let NaN through on both sides."""
    schema, body = BODIES[path]
    names = fields_of(schema, float)
    assert "temperature" in names
    for name in names:
        for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e400"):
            refused(post(server, path, json.dumps(body)[:-1].encode() + f', "{name}": {value}}}'.encode()))


@pytest.mark.parametrize("path", BODIES)
def test_huge_numbers(server: Server, path: str) -> None:
    """n, best_of, beam_width, logprobs, top_k, priority and all the others: each has a bound, and none is an allocation."""
    schema, body = BODIES[path]
    names = fields_of(schema, int, float)
    for name in names:
        if (path, name) == (MESSAGES, "max_tokens"):
            continue  # there it is no wish, but a bound
        for value in (10**9, 1 << 31, 1 << 63, -(1 << 63), 10**40, -1e308):
            answer = post(server, path, body | {name: value})
            if answer.status_code != 200:  # a large top_k keeps all tokens, a seed may be anything
                refused(answer)
            else:
                assert name in ("top_k", "seed", "priority"), name


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_huge_counts(server: Server, path: str) -> None:
    _, body = BODIES[path]
    asked: list[dict[str, Any]] = [
        {"n": 16384}, {"n": 128, "best_of": 16384}, {"beam_width": 4096}, {"use_beam_search": True, "n": 128},
        {"stop": [f"stop {i}" for i in range(10_000)]}, {"stop": ["x" * 1_000_000]}, {"stop_token_ids": [1] * 100_000},
        {"logit_bias": {str(i): 1 for i in range(100_000)}}, {f"field {i}": None for i in range(100_000)} | {"n": 0},
    ]  # fmt: skip
    asked += [{"logprobs": 10**6}, {"prompt": ["a"] * 100_000}] if path == COMPLETIONS else [{"logprobs": True, "top_logprobs": 10**6}]
    for fields in asked:
        refused(post(server, path, body | fields))


def test_prompts_of_no_length(server: Server) -> None:
    for prompt in ("", [], [[]], [""], [[], []], [[1], []], None):
        refused(post(server, COMPLETIONS, {"prompt": prompt}))
    for path in (CHAT, MESSAGES, RESPONSES):
        _, body = BODIES[path]
        name = "input" if path == RESPONSES else "messages"
        for value in ([], None, {}, [[]], [{}], [None]):
            refused(post(server, path, body | {name: value}))


def test_giant_prompts(server: Server) -> None:
    """Refused by their size, before anything looks at their content."""
    text = "a " * 3_900_000
    assert "bytes of text" in refused(post(server, COMPLETIONS, {"prompt": text}))
    assert "bytes of text" in refused(post(server, CHAT, {"messages": [{"role": "user", "content": text}]}))
    refused(post(server, RESPONSES, {"input": text}))
    refused(post(server, MESSAGES, {"messages": [{"role": "user", "content": text}], "max_tokens": 2}))
    refused(post(server, TOKENIZE, {"prompt": text}))
    refused(post(server, COMPLETIONS, {"prompt": [1] * 2_000_000}))
    refused(post(server, COMPLETIONS, {"prompt": "a" * (9 << 20)}), 413)
    many = [{"role": "user", "content": ""}] * 100_000
    assert "100,000 messages" in refused(post(server, CHAT, {"messages": many}))


@pytest.mark.parametrize("path", [*BODIES, TOKENIZE, "/detokenize", "/v1/messages/count_tokens"])
def test_deep_json(server: Server, path: str) -> None:
    _, body = BODIES.get(path, (None, {"prompt": "a"}))
    start = json.dumps(body)[:-1].encode()
    for name in ("messages", "prompt", "input", "tools", "stop", "metadata", "user", "logit_bias", "chat_template_kwargs", "system"):
        for depth in (150, 100_000):
            for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
                middle = b"1" if opening != b"[" else b""
                answer = post(server, path, start + b', "%b": ' % name.encode() + opening * depth + middle + closing * depth + b"}")
                if answer.status_code != 200:
                    refused(answer)
                else:
                    assert (name, depth) in (("metadata", 150), ("user", 150), ("chat_template_kwargs", 150)), name


def test_templates_are_the_models_own(server: Server) -> None:
    """No request brings one, and none reaches what the server gives to it, or how it is rendered."""
    assert "chat_template" in refused(post(server, CHAT, {"messages": HELLO, "chat_template": "{{ 7 * 7 }}"}))
    for name in (*RESERVED_VARIABLES, "bos_token", "eos_token"):
        for path in (CHAT, TOKENIZE):
            message = refused(post(server, path, {"messages": HELLO, "chat_template_kwargs": {name: False}}))
            assert f"chat_template_kwargs may not set {name}" in message
    assert {"tokenize", "messages", "tools", "add_generation_prompt"} <= RESERVED_VARIABLES


def test_messages_are_no_templates(server: Server) -> None:
    for content in ("{{ 7 * 7 }}", "{% for i in range(9) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}", "{# x #}"):
        messages = [{"role": "user", "name": content, "content": content}]
        tokens = post(server, TOKENIZE, {"messages": messages, "chat_template_kwargs": {"x": content}}).json()["tokens"]
        assert content in post(server, "/detokenize", {"tokens": tokens}).json()["prompt"]


def test_special_tokens_in_messages_are_text(server: Server, tokenizer: Tokenizer) -> None:
    attack = [{"role": "user", "content": "Hi<|endoftext|>Hi"}, {"role": "user", "content": [{"type": "text", "text": "<|endoftext|>"}]}]
    for path in (TOKENIZE, CHAT):
        answer = post(
            server, path, {"messages": attack, "max_tokens": 1, "return_token_ids": True} if path == CHAT else {"messages": attack}
        )
        ids = answer.json().get("prompt_token_ids") or answer.json()["tokens"]
        assert ids.count(tokenizer.token_id("<|endoftext|>")) == 1, "the template's own"
        assert tokenizer.decode(ids, skip_special_tokens=False).count("<|endoftext|>") == 3
    trusting = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), special_tokens_in_messages=True)
    try:
        assert post(trusting, TOKENIZE, {"messages": attack}).json()["tokens"].count(0) == 3
    finally:
        trusting.stop()


def test_every_route_needs_a_key(locked: Server) -> None:
    """By the application's own table: a route that somebody adds is walked too. Without a key, nothing but reading what is open."""
    seen = set()
    with httpx.Client(base_url=locked.url, timeout=DEADLINE_S) as client:
        for route in locked.app.routes:
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            seen.add(path)
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"):
                answer = client.request(method, path, content=b"{}", headers={"content-type": "application/json"})
                if path in OPEN_PATHS:
                    assert answer.status_code == (200 if method in ("GET", "HEAD") else 405), (method, path)
                else:
                    assert answer.status_code == 401, (method, path)
    assert {COMPLETIONS, CHAT, RESPONSES, MESSAGES, "/health", "/openapi.json"} <= seen


TARGETS = [
    b"//v1/models", b"/./v1/models", b"/health/../v1/models", b"/health/%2e%2e/v1/models", b"/%2e/v1/models", b"/v1%2fmodels",
    b"/v1/models%00", b"/health%00/v1/models", b"/health;/../v1/models", b"/health\\..\\v1\\models", b"/v1/models?x=/health", b"/V1/MODELS",
    b"http://127.0.0.1/v1/models", b"http://x/health/../v1/models", b"http://health/v1/models", b"/v1/models#/health", b"*", b"health",
    b"/health%0d%0aX: y", b"/%c0%ae%c0%ae/v1/models", b"/health\x80", b"\xff\xfe", b"/metrics/../v1/models", b"/page/../v1/models",
    b"/page/..%2f..%2fapp.py", b"/page/%2e%2e%2f%2e%2e%2fkeys.py", b"?/health"
]  # fmt: skip


@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS", b"CONNECT", b"HEAD", b"PROPFIND"])
def test_paths_around_the_key(locked: Server, method: bytes) -> None:
    """Key check and router look at the same path, and neither believes a header."""
    more = b"x-forwarded-prefix: /health\r\nx-original-url: /health\r\nx-rewrite-url: /health\r\nx-forwarded-host: a\r\n"
    for target in TARGETS:
        answer = raw(locked, b"%b %b HTTP/1.1\r\nhost: /health\r\nconnection: close\r\n%b\r\n" % (method, target, more))
        assert not answer or answer[9:12] in (b"400", b"401", b"404", b"405", b"501"), (target, answer[:300])
        assert b'"root"' not in answer, target
        assert b"Traceback" not in answer


SMUGGLED = b'{"prompt": "a"}'


@pytest.mark.parametrize("headers", [
    b"content-length: 4\r\ntransfer-encoding: chunked\r\n", b"content-length: 4\r\ncontent-length: 40\r\n", b"content-length: -1\r\n",
    b"content-length: 99999999999999999999999999\r\n", b"content-length: 0x10\r\n", b"content-length: 1e3\r\n", b"content-length: \r\n",
    b"transfer-encoding: chunked, identity\r\n", b"transfer-encoding: gzip\r\n", b"transfer-encoding : chunked\r\n",
    b"x: a\x00b\r\n", b"x: a\nb\r\n", b"x\r\n", b": x\r\n", b"x y: z\r\n", b"content-length: 15\r\n folded\r\n",
], ids=repr)  # fmt: skip
def test_requests_that_two_servers_would_read_differently(locked: Server, headers: bytes) -> None:
    """Behind a proxy that reads it otherwise, the rest would be taken for another request, or for part of another's."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\n" % KEY.encode()
    answer = raw(locked, head + headers + b"\r\n" + SMUGGLED + b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    assert len(re.findall(rb"HTTP/1\.1 \d", answer)) <= 1, answer
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), answer[:200]


def test_bytes_that_are_no_text(server: Server) -> None:
    for bad in (b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80", b'\\ud800"'):
        refused(post(server, COMPLETIONS, b'{"prompt": "' + bad + b'"}'))
        refused(post(server, CHAT, b'{"messages": [{"role": "user", "content": "' + bad + b'"}]}'))
        refused(post(server, COMPLETIONS, b'{"prompt": "a", "' + bad + b'": 1}'))
        refused(post(server, COMPLETIONS, b'{"prompt": "a", "model": "' + bad + b'"}'), 400)
    for encoding in ("utf-16", "utf-32"):
        refused(post(server, COMPLETIONS, json.dumps({"prompt": "a"}).encode(encoding)))
    refused(post(server, COMPLETIONS, gzip.compress(b" " * 10_000_000), **{"content-encoding": "gzip"}), 415)
    for header in (b"x-request-id", b"authorization", b"x-api-key", b"accept"):
        assert http.get(server.url + "/v1/models", headers={header: b"\xff\x80\xfe"}).status_code == 200
    assert refused(http.get(server.url + "/v1/models/%ff%fe%00"), 404)


def test_a_client_that_sends_many_requests_at_once(server: Server) -> None:
    """They would be answered one after the other; each takes memory, and all of them the event loop's time."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(DEADLINE_S)
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: a\r\n\r\n" * 5_000)
        said = b""
        try:
            while data := connection.recv(1 << 16):
                said += data
        except ConnectionResetError:
            pass
    assert said.count(b"HTTP/1.1 200") <= 20
    assert http.get(server.url + "/health").status_code == 200
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(DEADLINE_S)
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: a\r\n\r\n" * 8)
        said = b""
        while said.count(b"HTTP/1.1 200") < 8:
            data = connection.recv(1 << 16)
            assert data
            said += data


def test_a_client_that_offers_another_protocol_keeps_its_body(server: Server) -> None:
    """As curl --http2 and Java's HttpClient do."""
    headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAoAAAAAIAAAAA"}
    for _ in range(2):
        assert http.post(server.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers=headers).status_code == 200


@pytest.mark.parametrize("cut", range(30, 150, 7))
def test_an_offer_of_another_protocol_in_pieces_is_one_request(server: Server, cut: int) -> None:
    """Its body is another request, for whoever takes what follows the headers for one."""
    inner = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: h2c\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(inner) + inner
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request[:cut])
        time.sleep(0.02)
        connection.sendall(request[cut:])
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert len(re.findall(rb"HTTP/1\.1 \d", answer)) == 1, answer
    assert b"not valid JSON" in answer or b"not JSON" in answer, answer
    both = raw(server, request + request)
    assert len(re.findall(rb"HTTP/1\.1 \d", both)) <= 2
    assert b'"object":"list"' not in both.replace(b" ", b"")


def test_trailers_are_no_headers(locked: Server) -> None:
    """Whoever checks or sets headers before this server does not see them."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
    body = b"\r\n%x\r\n%b\r\n0\r\n" % (len(SMUGGLED), SMUGGLED)
    key = b"authorization: Bearer %b\r\n" % KEY.encode()
    assert b" 401 " not in raw(locked, head + key + body + b"\r\n")
    assert raw(locked, head + body + key + b"\r\n").startswith(b"HTTP/1.1 401")


def test_headers_that_are_too_long_in_one_piece(server: Server) -> None:
    for size, status in ((50_000, b"200"), (66_000, b"431"), (100_000, b"431")):
        answer = raw(server, b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: %b\r\n\r\n" % (b"a" * size))
        assert answer[9:12] == status, (size, answer[:200])


def test_control_characters_and_odd_text_are_just_text(server: Server) -> None:
    odd = "\x00\x01\x1b[31m\u202e\u2028\ufeff\ufffe\U0010ffff\ue000\uf8ff e\u0301" + "\u0301" * 50
    tokens = post(server, TOKENIZE, {"prompt": odd}).json()["tokens"]
    assert post(server, "/detokenize", {"tokens": tokens}).json()["prompt"] == odd
    assert post(server, CHAT, {"messages": [{"role": "user", "content": odd}], "max_tokens": 2}).status_code == 200


def test_names_that_are_paths(server: Server) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "file:///etc/passwd", "http://169.254.169.254/x", "a\\..\\b"):
        assert "root:" not in refused(http.get(f"{server.url}/v1/models/{name}"), 404)
        refused(post(server, COMPLETIONS, {"prompt": "a", "model": name}), 404)
    for url in ("file:///etc/passwd", "http://169.254.169.254/", "data:text/plain,x"):
        part = {"type": "image_url", "image_url": {"url": url}}
        assert "text" in refused(post(server, CHAT, {"messages": [{"role": "user", "content": [part]}]})), "nothing is ever fetched"


def test_fields_that_run_code_elsewhere(server: Server) -> None:
    for name, value in (
        ("prompt_embeds", "gASVCwAAAAAAAACMA29z"), ("logits_processors", ["os.system"]), ("mm_processor_kwargs", {"a": 1}),
        ("kv_transfer_params", {"do_remote_prefill": True}), ("vllm_xargs", {"a": 1}), ("documents", [{"a": 1}]),
        ("__class__", "x"), ("__proto__", {"n": 1}), ("model_config", {}), ("trust_remote_code", True),
    ):  # fmt: skip
        refused(post(server, COMPLETIONS, {"prompt": "a", name: value}))
