"""--kv-events: a subscriber that keeps books by vLLM's events knows what the cache holds."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq

from quire.core.events import BlockEvicted, BlockRemoved, BlockShared, BlockStored
from quire.server.metrics.kv_events import EventLog
from quire.server.metrics.kv_publisher import KVPublisher
from server.harness import DEADLINE_S, Process, Server, free_port, http, wait_clean, wait_until
from server.test_serve import one_line, run

COMPLETIONS = "/v1/completions"
END = (1 << 64) - 1


class Subscriber:
    """Keeps books as a router does: content → (its parent, its tokens)."""

    def __init__(self, endpoint: str, topic: str = "") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(topic.encode())
        self.socket.connect(endpoint)
        self.topic = topic
        self.held: dict[int, tuple[int | None, list[int]]] = {}
        self.numbers: list[int] = []
        self.kinds: list[str] = []
        self.payloads: list[bytes] = []

    def read(self) -> bool:
        """Take what has arrived; whether there was anything."""
        any_ = False
        while self.socket.poll(0):
            topic, number, payload = self.socket.recv_multipart()
            assert topic.decode() == self.topic
            self.numbers.append(int.from_bytes(number, "big"))
            self.payloads.append(payload)
            _, events, rank = msgspec.msgpack.decode(payload)
            assert rank == 0
            for event in events:
                self._apply(event)
            any_ = True
        return any_

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            self.read()
            return condition()

        wait_until(look, what)

    def _apply(self, event: dict[str, Any]) -> None:
        self.kinds.append(event["type"])
        match event["type"]:
            case "BlockStored":
                size, parent = event["block_size"], event["parent_block_hash"]
                assert len(event["token_ids"]) == size * len(event["block_hashes"])
                assert parent is None or parent in self.held, "a block below one that nobody has heard of"
                for i, name in enumerate(event["block_hashes"]):
                    assert name not in self.held
                    assert 0 < name < 1 << 63
                    self.held[name] = parent, event["token_ids"][i * size : (i + 1) * size]
                    parent = name
            case "BlockRemoved":
                for name in event["block_hashes"]:
                    del self.held[name]
            case "AllBlocksCleared":
                self.held.clear()

    def prefix(self, name: int) -> list[int]:
        """All tokens from the prompt's start to the end of a block."""
        parent, tokens = self.held[name]
        return [*(self.prefix(parent) if parent is not None else []), *tokens]

    def knows(self, tokens: list[int]) -> bool:
        return any(self.prefix(name) == tokens for name in self.held)

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()


def complete(url: str, **fields: Any) -> list[int]:
    """The tokens."""
    answer = http.post(url + COMPLETIONS, json={"ignore_eos": True, "return_token_ids": True, **fields})
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def test_a_subscriber_knows_what_is_cached_through_evictions_and_deaths() -> None:
    events, replay = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    options = ("--kv-events", events, "--kv-events-replay", replay, "--kv-events-topic", "kv@here@embedded")
    process = Process("--kv-memory", "4MiB", "--max-model-len", "512", *options)
    subscriber = Subscriber(events, "kv@here@embedded")
    try:
        assert http.get(f"{process.url}/kv_event_sources").json()["0"] | {
            "endpoint": events, "replay_endpoint": replay, "topic": "kv@here@embedded", "publisher": "zmq"
        } == http.get(f"{process.url}/kv_event_sources").json()["0"]  # fmt: skip
        warm_up = iter(range(100, 1000))

        def connected() -> bool:
            complete(process.url, prompt=[next(warm_up)] * 17, max_tokens=1)
            return subscriber.read()

        wait_until(connected, "the subscription has arrived")
        prompt = list(range(20, 90))
        made = complete(process.url, prompt=prompt, max_tokens=30)
        complete(process.url, prompt=list(range(200, 240)), max_tokens=1, cache_salt="secret")
        whole = [*prompt, *made][:96]  # the last token's KV was never computed
        subscriber.wait(lambda: subscriber.knows(whole), "the last whole block was stored")
        subscriber.read()
        assert subscriber.knows(whole)
        assert all(subscriber.knows(whole[: 16 * (i + 1)]) for i in range(6))
        assert not any(200 in tokens for _, tokens in subscriber.held.values()), "what is salted is nobody's business"
        for i in range(12):  # 85 blocks of 16: most of this does not fit
            complete(process.url, prompt=[300 + i] * 300, max_tokens=1)
        wait_clean(process.url)
        subscriber.wait(lambda: "BlockRemoved" in subscriber.kinds, "blocks were evicted")
        assert len(subscriber.held) <= 85
        usage = http.post(process.url + COMPLETIONS, json={"prompt": [311] * 300, "max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 280
        assert subscriber.knows([311] * 288)
        os.kill(process.engine_pid, signal.SIGKILL)
        subscriber.wait(lambda: subscriber.kinds[-1] == "AllBlocksCleared", "the death was told")
        assert not subscriber.held
        wait_until(lambda: http.get(process.url + "/ready").status_code == 200, "another engine is there")
        complete(process.url, prompt=prompt, max_tokens=1)
        subscriber.wait(lambda: subscriber.knows(prompt[:64]), "the next engine's blocks are told of")
        first = subscriber.numbers[0]
        assert subscriber.numbers == list(range(first, first + len(subscriber.numbers))), "nothing was missed, by no death either"
        replayed = ask(replay, first)
        assert replayed == [*zip(subscriber.numbers, subscriber.payloads, strict=True), (END, b"")]
        assert ask(replay, 1 << 40) == [(END, b"")]
    finally:
        subscriber.close()
        process.kill()


def ask(endpoint: str, first: int) -> list[tuple[int, bytes]]:
    """What is replayed from message ``first`` on."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.connect(endpoint)
        socket.send_multipart([b"", first.to_bytes(8, "big")])
        found: list[tuple[int, bytes]] = []
        while not found or found[-1][0] != END:
            assert socket.poll(int(DEADLINE_S * 1000)), "the replay ends"
            _, number, payload = socket.recv_multipart()
            found.append((int.from_bytes(number, "big"), payload))
        return found
    finally:
        socket.close(0)
        context.term()


def test_the_log_writes_runs_together_and_leaves_out_what_is_not_whole_or_not_everybodys() -> None:
    log = EventLog(2, "map")
    assert log.take() is None
    for event in (
        BlockStored(0, 5, 0, (1, 2), b""),
        BlockStored(1, 6, 5, (3, 4), b""),
        BlockStored(2, 7, 6, (5,), b""),
        BlockStored(3, 8, 0, (1, 2), b"salt"),
        BlockShared(0, 2),
        BlockRemoved(2, 7),
        BlockEvicted(3, 8),
        BlockEvicted(1, 6),
        BlockEvicted(0, 5),
    ):
        log(event)
    _, events, _ = msgspec.msgpack.decode(log.take() or b"")
    stored, removed = events
    five, six = stored["block_hashes"]
    assert six == five + 1
    assert (stored["type"], stored["parent_block_hash"], stored["token_ids"], stored["block_size"]) == (
        "BlockStored",
        None,
        [1, 2, 3, 4],
        2,
    )
    assert (removed["type"], removed["block_hashes"]) == ("BlockRemoved", [six, five])
    assert log.take() is None
    other = EventLog(2, "array")
    other(BlockStored(0, 5, 0, (1, 2), b""))
    _, (event,), _ = msgspec.msgpack.decode(other.take() or b"")
    assert event[0] == "BlockStored"
    assert event[2:6] == [None, [1, 2], 2, None]
    assert event[1] != [five], "two engines do not use the same names"


def test_a_subscriber_that_never_reads_holds_up_nobody() -> None:
    publisher = KVPublisher("tcp://127.0.0.1:*", None, "", "map", high_water_mark=10)
    subscriber = Subscriber(publisher.endpoint)
    try:

        def arrives() -> bool:
            publisher.publish(None)
            return bool(subscriber.socket.poll(10))

        wait_until(arrives, "it is connected")
        for _ in range(10_000):
            publisher.publish(b"x" * 1000)  # more than all buffers on the way hold
        publisher.close()  # the thread ends, though nobody has read
    finally:
        subscriber.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kv-events", "localhost:5557"), ("--kv-events localhost:5557", "tcp://127.0.0.1:5557")),
        (("--kv-events-replay", "tcp://127.0.0.1:5558"), ("--kv-events-replay needs --kv-events",)),
        (("--kv-events", "tcp://127.0.0.1:*", "--kv-events-format", "xml"), ("xml", "map, array")),
    ],
)
def test_what_can_not_work_is_refused_at_once(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    for word in words:
        assert word in one_line(err)


def test_an_address_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run("--kv-events", f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    assert code == 2
    assert "Address already in use" in one_line(err)


def test_what_vllm_router_adds_to_calls_is_no_error(fake: Server) -> None:
    """It asks for the tokens of a prompt with fields of another server in it, and sends chats with them."""
    common = {"no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True, "return_hidden_states": False, "max_tokens": 2}
    chat = {
        "separate_reasoning": True,
        "stream_reasoning": True,
        "include_reasoning": True,
        "continue_final_message": False,
        "logprobs": False,
    }
    for path, body in (
        ("/v1/completions/render", {"prompt": "a", "echo": False} | common),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | common | chat),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "a"}]} | common | chat),
    ):
        answer = http.post(fake.url + path, json=body)
        assert answer.status_code == 200, answer.text
