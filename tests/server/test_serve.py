"""``quire serve`` as a process: what it prints, how it ends, how it refuses to start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from server.harness import (
    DEADLINE_S,
    EMBEDDED,
    Process,
    events,
    free_port,
    health,
    http,
    raw_request,
    start_process,
    wait_clean,
    wait_until,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def run(*arguments: str) -> tuple[int, str, str]:
    process = start_process(*arguments)
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def one_line(err: str) -> str:
    """The message; nothing else may be on stderr."""
    assert err.startswith("quire: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_a_model_may_have_several_names() -> None:
    server = Process("--kv-memory", "32MiB", "--served-model-name", "quire-tiny, claude-x,")
    try:
        assert [model["id"] for model in http.get(server.url + "/v1/models").json()["data"]] == ["quire-tiny", "claude-x"]
        assert http.get(server.url + "/v1/models/claude-x").json()["root"] == "quire-tiny"
        for name in ("quire-tiny", "claude-x"):
            body = {"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
            for path in ("/v1/chat/completions", "/v1/messages"):
                assert http.post(server.url + path, json=body).json()["model"] == "quire-tiny"
        refused = http.post(server.url + "/v1/responses", json={"model": "claude-x, quire-tiny", "input": "a"})
        assert refused.status_code == 404
        assert "'quire-tiny' or 'claude-x'" in refused.json()["error"]["message"]
    finally:
        server.kill()


def test_banner(real: Process) -> None:
    """32 MiB at 6 layers x 4 KV heads x 32 x 2 (keys, values) x 2 bytes = 3072 bytes a token."""
    tokens = 32 * 2**20 // 3072 // 16 * 16
    now = health(real.url)
    assert now["kv_blocks_total"] * now["kv_block_size"] == tokens
    for words in (
        real.url,
        "embedded",
        "parameters",
        f"{tokens // 16:,} blocks x 16 = {tokens:,} tokens",
        f"{tokens // 16 // 128} requests of 2,048",
        "512",
    ):
        assert words in real.banner
    for phase in ("HTTP stack", "tokenizer", "started"):
        assert phase in real.banner


def test_banner_says_how_the_memory_is_used() -> None:
    process = Process("--kv-memory", "auto", "--max-num-seqs", "4", "--no-prefix-caching", "--swap-memory", "16MiB")
    process.kill()
    for words in (
        "KV memory",
        "GB free",
        "80% of it",
        "512 blocks x 16 = 8,192 tokens",
        "prefix caching off, admission ",
        "swapped to 16.0 MiB (341 blocks)",
        "at most 4 sequences run at a time; 1,024 more wait",
    ):
        assert words in process.banner, process.banner


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_line_works_when_pasted(real: Process) -> None:
    (line,) = [line for line in real.banner.splitlines() if line.strip().startswith("curl")]
    done = subprocess.run(line + " -s", shell=True, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    found = events(done.stdout)
    assert found[-1] == "[DONE]"
    assert found[-2]["choices"][0]["finish_reason"] in ("length", "stop")


def test_ctrl_c_ends_it_cleanly() -> None:
    """With a stream in flight, which ends with an error instead of hanging. (SIGTERM drains: test_supervisor.)"""
    process = Process("--kv-memory", "16MiB", stop_after=50)
    try:
        with raw_request(
            process.port, "/v1/completions", {"prompt": "a", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        ) as connection:
            engine, got = process.wait_stopped(), b""
            process.process.send_signal(signal.SIGINT)
            while b"shutting down" not in got:
                part = connection.recv(65536)
                assert part, "the connection was closed"
                got += part
            os.kill(engine, signal.SIGCONT)
            code, err = process.process.wait(DEADLINE_S), process.process.communicate()[1]
            while part := connection.recv(65536):
                got += part
        assert (code, err) == (0, "")
        assert b"shutting down" in got
        assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert process.process.stdout is not None
    finally:
        process.kill()


def test_ctrl_c_while_loading() -> None:
    """No traceback, and no crash of a thread that is busy in native code."""
    port = free_port()
    process = start_process("--port", str(port))

    def listens() -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, "it has begun to load")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) in ((130, ""), (0, ""))


def test_port_in_use(real: Process) -> None:
    code, out, err = run("--port", str(real.port))
    assert code == 2
    assert out == ""
    assert str(real.port) in one_line(err)
    assert "--port" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "no.such.host.invalid"), ("no.such.host.invalid", "127.0.0.1")),
        (("--port", "70000"), ("70000", "65535")),
        (("--port", "http"), ("http", "integer")),
        (("--block-size", "17"), ("17", "16", "32")),
        (("--kv-memory", "lots"), ("lots", "2GiB")),
        (("--config", "/no/such/file.toml"), ("/no/such/file.toml",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_options(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    for word in words:
        assert word in one_line(err)


def test_unknown_option() -> None:
    code, _, err = run("--max-num-seq", "4")
    assert code == 2
    assert "--max-num-seq" in err
    assert "Traceback" not in err


def test_pool_too_small_for_one_request() -> None:
    code, _, err = run("--port", "0", "--kv-memory", "1MiB")
    assert code == 1
    for word in ("2,048", "--kv-memory", "--max-model-len"):
        assert word in one_line(err)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return edit


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def cut_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def not_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{not json")


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no config.json": (remove(CONFIG), (CONFIG,)),
    "config.json is not JSON": (not_json, (CONFIG,)),
    "no weights": (remove(WEIGHTS), ("safetensors",)),
    "weights cut short": (truncate, (WEIGHTS, "bytes")),
    "weights without a header": (cut_header, (WEIGHTS,)),
    "no tokenizer": (remove("tokenizer.json"), ("tokenizer.json",)),
    "architecture": (edit_config(architectures=["MambaForCausalLM"]), ("MambaForCausalLM", "LlamaForCausalLM")),
    "shapes": (edit_config(intermediate_size=700), ("700", "704")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(tmp_path: Path, name: str) -> None:
    damage, words = BROKEN[name]
    for file in EMBEDDED.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    damage(tmp_path)
    code, out, err = run("--port", "0", str(tmp_path))
    assert code == 1
    assert out == ""
    for word in words:
        assert word in one_line(err)


def test_no_such_folder() -> None:
    code, _, err = run("/no/such/folder")
    assert code == 1
    assert "/no/such/folder" in one_line(err)


def test_other_name_and_config_file(tmp_path: Path) -> None:
    (tmp_path / "quire.toml").write_text('kv-memory = "16MiB"\nserved-model-name = "my/model"\nmax-model-len = 100\n')
    process = Process("--config", str(tmp_path / "quire.toml"))
    try:
        model = http.get(process.url + "/v1/models/my/model").json()
        assert (model["id"], model["max_model_len"]) == ("my/model", 100)
        answer = http.post(process.url + "/v1/completions", json={"model": "my/model", "prompt": "a", "max_tokens": 100})
        assert answer.status_code == 400
        assert "lower max_tokens to at most 98" in answer.json()["error"]["message"]
    finally:
        process.kill()


def test_many_clients_on_a_small_pool(real: Process) -> None:
    """More than fits: requests wait and are preempted, half of the clients leave, and everything ends as it would have alone."""
    import asyncio
    import random
    from typing import Any

    import httpx

    rng = random.Random(1)

    def fields(number: int) -> dict[str, Any]:
        return {"prompt": "x = 1\n" * (number % 7 + 1), "max_tokens": 20 + 20 * (number % 11), "seed": number, "ignore_eos": True}

    async def one(http: httpx.AsyncClient, number: int, leaves: bool) -> str | None:
        text = ""
        async with http.stream("POST", "/v1/completions", json=fields(number) | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    if leaves and len(text) > 50:
                        return None
            assert line == "" or line == "data: [DONE]"
        return text

    async def everyone() -> list[str | None]:
        async with httpx.AsyncClient(base_url=real.url, limits=httpx.Limits(max_connections=None), timeout=DEADLINE_S) as http:
            leaving = set(rng.sample(range(200), 120))
            return await asyncio.gather(*(one(http, number, number in leaving) for number in range(200)))

    texts = asyncio.run(everyone())
    wait_clean(real.url)
    with httpx.Client(base_url=real.url, timeout=DEADLINE_S) as http:
        stayed = [number for number, text in enumerate(texts) if text is not None]
        for number in stayed[::8]:
            assert http.post("/v1/completions", json=fields(number)).json()["choices"][0]["text"] == texts[number]


def test_a_connection_that_is_early() -> None:
    """The port is taken before the HTTP stack is imported; whoever connects then is answered when it is there."""
    port = free_port()
    process = start_process("--port", str(port), "--kv-memory", "16MiB")
    try:

        def answered() -> bool:
            try:
                return health(f"http://127.0.0.1:{port}")["status"] in ("loading", "ok")
            except OSError:
                return False
            except Exception as e:
                if "refused" in str(e):
                    return False
                raise

        wait_until(answered, "it answers")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
