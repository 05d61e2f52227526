"""vllm-router with kv_aware routing in front of two servers: a prompt goes to the server that has computed its beginning."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from server.harness import Process, free_port, http, wait_until
from server.scraping import Scrape

ROUTER = shutil.which("vllm-router", path=f"{Path(sys.executable).parent}") or shutil.which("vllm-router")
COMPLETIONS = "/v1/completions"
pytestmark = pytest.mark.skipif(ROUTER is None, reason="make test-clients installs vllm-router")


class Router:
    def __init__(self, servers: dict[str, tuple[str, str]]) -> None:
        """servers: URL → (endpoint of its events, of their replay)."""
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        sources = [f"{url}={events}" for url, (events, _) in servers.items()]
        replays = [f"{url}={replay}" for url, (_, replay) in servers.items()]
        arguments = [str(ROUTER), "--host", "127.0.0.1", "--port", str(self.port), "--worker-urls", *servers, "--policy", "kv_aware"]
        for source, replay in zip(sources, replays, strict=True):
            arguments += ["--kv-event-source", source, "--kv-event-replay-source", replay]
        arguments += ["--kv-event-block-size", "16", "--kv-event-model", "embedded"]
        arguments += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(self.metrics_port)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers, "the router is ready")

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the router has ended"
        try:
            return http.get(f"{self.url}/health").status_code == 200
        except httpx.ConnectError:
            return False

    def lookups(self) -> Counter[str]:
        """Its own counter: how often it knew where a prompt's beginning is."""
        text = http.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        found = re.findall(r'vllm_router_kv_placement_lookups_total\{result="(\w+)"\} (\d+)', text)
        return Counter({result: int(count) for result, count in found})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, tuple[str, str]]]:
    with ExitStack() as stack:
        found = {}
        for _ in range(2):
            events, replay = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
            process = Process("--kv-memory", "32MiB", "--kv-events", events, "--kv-events-replay", replay)
            stack.callback(process.kill)
            found[process.url] = (events, replay)
        yield found


def complete(url: str, prompt: str) -> int:
    """The tokens of the prompt that were found in the cache."""
    answer = http.post(url + COMPLETIONS, json={"model": "embedded", "prompt": prompt, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def test_warm_prompts_go_to_the_warm_server(servers: dict[str, tuple[str, str]]) -> None:
    router = Router(servers)
    try:
        rng = random.Random(1)
        words = ["import", "os", "sys", "json", "re", "math", "def", "class", "return", "for", "while", "if", "else"]
        prompts = [" ".join(rng.choices(words, k=120)) for _ in range(6)]
        urls = list(servers)
        for i, prompt in enumerate(prompts):  # behind the router's back
            complete(urls[i % 2], prompt)
        before = [Scrape(url)("quire_requests_received_total") for url in urls]

        def heard() -> bool:
            known = router.lookups()
            complete(router.url, prompts[0] + " again")
            return router.lookups()["hit"] > known["hit"]

        wait_until(heard, "the router has heard the events")
        asked = [Scrape(url)("quire_requests_received_total") for url in urls]
        known = router.lookups()
        for i, prompt in enumerate(prompts):
            for turn in range(2):
                assert complete(router.url, f"{prompt} {i} {turn}") > 100
        after = [Scrape(url)("quire_requests_received_total") for url in urls]
        assert [b - a for a, b in zip(asked, after, strict=True)] == [6, 6], "each went where it was warm"
        now = router.lookups()
        assert (now["hit"] - known["hit"], now["miss"] - known["miss"]) == (12, 0)
        assert sum(asked) > sum(before)
        chat = {"model": "embedded", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        answer = http.post(router.url + "/v1/chat/completions", json=chat)
        assert answer.status_code == 200, answer.text
    finally:
        router.close()
