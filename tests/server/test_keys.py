"""API keys: who is let in, how much they may do, and who shares cached prefixes with whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire.errors import ConfigError
from quire.server.http.errors import RateLimitError
from quire.server.http.keys import Bucket, Caller, read_keys
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Server, http, raw_request, start_process, wait_clean, wait_until

COMPLETIONS = "/v1/completions"
ALICE, BOB = "sk-alice-0123456789", "sk-bob-01234567890"
FILE = f"""
[alice]
key = "{ALICE}"
[bob]
key = "{BOB}"
max_concurrent = 1
requests_per_minute = 3
tokens_per_minute = 100
"""


def write(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@contextmanager
def serving(tokenizer: Tokenizer, path: str) -> Iterator[Server]:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), keys=read_keys(path))
    try:
        yield server
    finally:
        server.stop()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def complete(server: Server, key: str, **fields: Any) -> httpx.Response:
    body = {"prompt": "a", "max_tokens": 4, "ignore_eos": True, "seed": 1} | fields
    return http.post(server.url + COMPLETIONS, json=body, headers=bearer(key))


def test_every_route_asks_for_a_key_but_those_that_watch_the_server(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tokenizer, write(tmp_path, FILE)) as server:
        for path in ("/health", "/ready", "/ping"):
            assert http.get(server.url + path).status_code == 200
        tricks = ["/v1/models", "/docs", "/openapi.json", "/version", "/nothing", "/page/events", "/health/", "/health/../v1/models",
                  "/%68ealth/", "/health%2f..%2fv1/models", "/HEALTH", "/health;x", "/v1/models?/health", "/v1/models#/health"]  # fmt: skip
        with httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
            for path in tricks:
                answer = client.get(path)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            for path in (COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"):
                assert client.post(path, json={}).status_code == 401
        # A proxy in front may hand the path on as it is: no client library tidies it up here.
        for path in ("/health/../v1/completions", "//health", "//", "//v1/completions", "/page/main.js/../../v1/completions"):
            with raw_request(server.port, path, {"prompt": "a"}) as connection:
                assert b" 401 " in connection.recv(1000), path


@pytest.mark.parametrize("header", [
    {}, {"Authorization": "Bearer"}, {"Authorization": "Bearer sk-alice-012345678"}, {"Authorization": f"Basic {ALICE}"},
    {"Authorization": ALICE}, {"X-Api-Key": ALICE + "x"}, {"Authorization": "Bearer \xff\xfe"}, {"Authorization": "Bearer " + "x" * 9000},
])  # fmt: skip
def test_what_is_no_key(header: dict[str, str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tokenizer, write(tmp_path, FILE)) as server:
        answer = http.get(server.url + "/v1/models", headers={k: v.encode("latin-1") for k, v in header.items()})
        assert answer.status_code == 401
        assert "sk-" not in answer.text


def test_official_clients_bring_their_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tokenizer, write(tmp_path, FILE)) as server:
        for key in (ALICE, BOB):
            with openai.OpenAI(base_url=server.url + "/v1", api_key=key, timeout=DEADLINE_S) as client:
                assert client.models.list().data[0].id == "fake"
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", timeout=DEADLINE_S, max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        assert http.get(server.url + "/v1/models", headers={"x-api-key": ALICE}).status_code == 200


def test_a_key_without_limits_is_not_limited_by_that_of_another(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tokenizer, write(tmp_path, FILE)) as server:
        answers = [complete(server, BOB) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        refused = answers[-1]
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "'bob' has used up its requests per minute" in refused.json()["error"]["message"]
        assert all(complete(server, ALICE).status_code == 200 for _ in range(6))


def test_calls_in_flight_are_counted_until_they_end_or_their_client_leaves(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tokenizer, write(tmp_path, FILE.replace("requests_per_minute = 3", "").replace("= 100", "= 100000"))) as server:
        server.backend.go.clear()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {BOB}\r\ncontent-type: application/json\r\n"
        body = b'{"prompt": "a", "max_tokens": 100, "ignore_eos": true, "stream": true}'
        import socket

        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: server.client.in_flight == 1, "it is in flight")
            refused = complete(server, BOB)
            assert refused.status_code == 429
            assert "'bob' has 1 calls in flight, and may have 1" in refused.json()["error"]["message"]
        server.backend.go.set()
        wait_until(lambda: server.client.in_flight == 0, "its client has left")
        wait_clean(server.url)
        assert complete(server, BOB).status_code == 200


def test_tokens_are_paid_when_they_are_known(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with serving(tokenizer, write(tmp_path, FILE)) as server:
        assert complete(server, BOB, max_tokens=300).status_code == 200
        refused = complete(server, BOB)
        assert refused.status_code == 429
        assert "tokens per minute" in refused.json()["error"]["message"]
        assert 100 <= int(refused.headers["retry-after"]) <= 130, "some 200 overdrawn, at 100 a minute"


def test_prefixes_are_shared_within_a_key_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """By counters, and not by their words: two callers who send the same have nothing in common, whatever salt they name."""
    with serving(tokenizer, write(tmp_path, FILE.replace("tokens_per_minute = 100", ""))) as server:

        def cached(key: str, **fields: Any) -> int:
            found = complete(server, key, prompt="x = 1\n" * 40, **fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert isinstance(found, int)
            return found

        assert cached(ALICE) == 0
        assert cached(ALICE) > 0
        assert cached(BOB) == 0
        assert cached(BOB, cache_salt="alice") == 0


def test_bucket() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    for _ in range(60):
        assert bucket.wait_s() == 0
        bucket.take(1)
    assert bucket.wait_s() == pytest.approx(1)
    now[0] += 1
    assert bucket.wait_s() == 0
    bucket.take(31)
    assert bucket.wait_s() == pytest.approx(31)
    now[0] += 1e6
    assert bucket.wait_s() == 0
    for _ in range(60):
        bucket.take(1)
    assert bucket.wait_s() == pytest.approx(1), "it holds no more than a minute brings"


def test_a_refused_call_counts_for_nothing() -> None:
    caller = Caller("a", max_concurrent=1)
    caller.enter()
    with pytest.raises(RateLimitError):
        caller.enter()
    caller.leave(3)
    assert caller.concurrent == 0


@pytest.mark.parametrize(("text", "words"), [
    ("", "has no keys"),
    ("[a", "is not valid TOML"),
    ('a = "sk-0123456789abcdef"', "a is not a table"),
    ('[a]\nkey = "short"', "[a] needs a key of at least 16 characters"),
    ("[a]", "[a] needs a key"),
    (f'[a]\nkey = "{ALICE}"\nrate = 3', "unknown field rate; known: key, requests_per_minute"),
    (f'[a]\nkey = "{ALICE}"\nmax_concurrent = 0', "max_concurrent must be an integer from 1"),
    (f'[a]\nkey = "{ALICE}"\ntokens_per_minute = true', "tokens_per_minute must be an integer"),
    (f'[a]\nkey = "{ALICE}"\n[b]\nkey = "{ALICE}"', "[b] has the key of [a]"),
])  # fmt: skip
def test_wrong_files(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        read_keys(write(tmp_path, text))
    assert words in e.value.message
    assert ALICE not in e.value.message


def test_files_that_can_not_be_trusted(tmp_path: Path) -> None:
    for path, words in ((str(tmp_path / "none"), "No such file"), (write(tmp_path, FILE, 0o644), "mode 644): chmod 600 it")):
        process = start_process("--port", "0", "--api-keys", path)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
