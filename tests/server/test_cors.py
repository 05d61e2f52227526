"""Pages of other origins: refused by default, and let in where the operator names them; keys are asked for all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from quire.errors import ConfigError
from quire.server.http.cors import read_origins
from quire.server.http.keys import Keys, read_keys
from quire.text.tokenizer import Tokenizer
from server.harness import PacedBackend, Server, http, start_process

ASK = {
    "Origin": "https://a.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
ALLOW = "access-control-allow-origin"


@contextmanager
def serving(tokenizer: Tokenizer, origins: str | None, keys: Keys | None = None) -> Iterator[Server]:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), keys=keys, allowed_origins=origins)
    try:
        yield server
    finally:
        server.stop()


def post(server: Server, origin: str, **headers: str) -> httpx.Response:
    return http.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"Origin": origin, **headers})


def test_off_by_default(fake: Server) -> None:
    assert http.options(fake.url + "/v1/completions", headers=ASK).status_code == 405
    for answer in (http.options(fake.url + "/v1/completions", headers=ASK), post(fake, "https://a.example")):
        assert not any(name.startswith("access-control") for name in answer.headers)
    # A page can send this without asking first: it must not be taken for JSON.
    assert http.post(fake.url + "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}).status_code == 415


def test_named_origins_with_keys(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text('[a]\nkey = "sk-0123456789abcdef"\n')
    path.chmod(0o600)
    with serving(tokenizer, "https://a.example, http://localhost:3000", read_keys(str(path))) as server:
        asked = http.options(server.url + "/v1/completions", headers=ASK)
        assert asked.status_code == 200, "a preflight brings no key"
        assert asked.headers[ALLOW] == "https://a.example"
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        refused = post(server, "https://a.example")
        assert refused.status_code == 401
        assert refused.headers[ALLOW] == "https://a.example", "the page can read what is wrong"
        answer = post(server, "https://a.example", Authorization="Bearer sk-0123456789abcdef")
        assert answer.status_code == 200
        assert answer.headers[ALLOW] == "https://a.example"
        assert "access-control-allow-credentials" not in answer.headers
        for other in ("https://b.example", "https://a.example.evil.test", "http://a.example", "null"):
            assert ALLOW not in post(server, other, Authorization="Bearer sk-0123456789abcdef").headers
            assert http.options(server.url + "/v1/completions", headers=ASK | {"Origin": other}).status_code == 400


def test_every_origin(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, "*") as server:
        assert post(server, "https://anything.example").headers[ALLOW] == "*"
        assert "x-request-id" in post(server, "https://a.example").headers["access-control-expose-headers"]


@pytest.mark.parametrize("text", ["", "a.example", "https://a.example/", "https://a.example/path", "https://a.example,", "https://u@a"])
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        read_origins(text)


def test_a_wrong_origin_is_said_at_the_start() -> None:
    process = start_process("--port", "0", "--allowed-origins", "a.example")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("quire: --allowed-origins: 'a.example' is no origin")
    assert err.count("\n") == 1
