"""GET /metrics: what it says is what really happened."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quire.server.http.keys import read_keys
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, Gate, PacedBackend, Process, Server, http, raw_request, wait_clean, wait_until
from server.scraping import OPENMETRICS, Scrape

COMPLETIONS = "/v1/completions"


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), speculation="off", max_num_seqs=2, max_waiting=4)
    yield server
    server.stop()


def complete(url: str, **fields: Any) -> dict[str, Any]:
    answer = http.post(url + COMPLETIONS, json={"ignore_eos": True, **fields})
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    return value


def test_counts_are_those_of_the_load(server: Server) -> None:
    prompts = [[i] * 40 for i in range(3)]
    usages = [complete(server.url, prompt=prompt, max_tokens=5)["usage"] for prompt in (*prompts, *prompts)]
    usages.append(complete(server.url, prompt=prompts, n=2, max_tokens=3)["usage"])
    for body, status in (({"prompt": [1], "temperature": -1}, 400), ({"prompt": [1] * 600}, 400), ({"prompt": [1], "model": "x"}, 404)):
        assert http.post(server.url + COMPLETIONS, json=body).status_code == status
    wait_clean(server.url)
    seen = Scrape(server.url)
    assert seen("quire_requests_received_total") == 6 + 3
    assert seen.by("quire_requests_finished_total", "finished_reason") == {"stop": 0, "length": 9, "abort": 0, "error": 0}
    rejected = seen.by("quire_requests_rejected_total", "reason")
    assert rejected == {"invalid_request": 1, "context_length_exceeded": 1, "model_not_found": 1}
    assert seen("quire_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages) == 9 * 40
    # The last position of a prompt is always computed: 39 of 40 are found.
    assert seen("quire_prompt_tokens_cached_total") == 6 * 39
    assert seen("quire_prompt_tokens_cached_total") == sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert seen("quire_generation_tokens_total") == generated == 6 * 5 + 3 * 2 * 3
    sequences = 6 + 3 * 2
    for name, count, total in (
        ("time_to_first_token_seconds", 9, None),
        ("inter_token_latency_seconds", generated - sequences, None),
        ("request_seconds", 9, None),
        ("request_queue_seconds", 9, None),
        ("request_prefill_seconds", 9, None),
        ("request_decode_seconds", 9, None),
        ("request_inference_seconds", 9, None),
        ("request_time_per_output_token_seconds", 9, None),
        ("request_prompt_tokens", 9, 360),
        ("request_generation_tokens", 9, generated),
        ("request_samples", 9, 6 + 3 * 2),
        ("request_max_tokens", 9, 6 * 5 + 3 * 3),
        ("request_preemptions", 9, 0),
    ):
        assert seen(f"quire_{name}_count") == count, name
        assert seen(f"quire_{name}_bucket", le="+Inf") == count, name
        if total is not None:
            assert seen(f"quire_{name}_sum") == total, name
    assert seen("quire_request_prompt_tokens_bucket", le="20.0") == 0
    assert seen("quire_request_prompt_tokens_bucket", le="50.0") == 9
    stats = server.engine.stats()
    assert seen("quire_steps_total") == stats.steps
    assert seen("quire_positions_computed_total") == stats.tokens_computed == 9 * 40 - 6 * 39 + generated - sequences + 3
    assert seen("quire_kv_blocks_copied_total") == stats.kv.counters.blocks_copied > 0
    blocks = seen.by("quire_kv_blocks", "state")
    assert blocks["owned"] == 0
    assert blocks["cached"] == stats.kv.cached_blocks > 0
    assert sum(blocks.values()) == seen("quire_kv_pool_blocks") == 256
    assert seen("quire_kv_block_tokens") == 16
    assert seen("quire_kv_block_groups") == 1
    assert set(seen.by("quire_step_seconds_total", "phase")) == {"schedule", "execute", "sample", "commit", "send"}
    assert seen("quire_step_seconds_total", phase="execute") > 0
    assert seen("quire_info", version=health_version(server.url), model="fake", architecture="") == 1


def health_version(url: str) -> str:
    version: str = http.get(f"{url}/version").json()["version"]
    return version


def test_what_runs_waits_and_shares(server: Server) -> None:
    """Two of one prompt run, two wait for a row; one more client hangs up."""
    server.backend.go.clear()
    with ThreadPoolExecutor() as clients:
        two = clients.submit(complete, server.url, prompt=[7] * 40, n=2, max_tokens=150)
        wait_until(lambda: server.client.in_flight == 2, "they are there")
        more = [clients.submit(complete, server.url, prompt=[i] * 8, max_tokens=2) for i in range(2)]
        wait_until(lambda: server.client.in_flight == 4, "they are there")
        with raw_request(server.port, COMPLETIONS, {"prompt": [9] * 8, "max_tokens": 2, "stream": True}):
            wait_until(lambda: server.client.in_flight == 5, "it is there")
        server.backend.delay_s = 0.05  # 7 seconds for the two
        server.backend.go.set()
        seen = Scrape(server.url)

        def two_run() -> bool:
            nonlocal seen
            seen = Scrape(server.url)
            return seen("quire_sequences_running") == 2 and seen("quire_sequences_waiting") == 2

        wait_until(two_run, "two run")
        server.backend.delay_s = 0.0
        assert seen("quire_sequences_waiting_by_reason", reason="rows") == seen("quire_sequences_waiting") == 2
        assert seen("quire_kv_blocks_saved") >= 2, "two whole blocks of the prompt are shared"
        used, allocated, tail = (seen(f"quire_kv_positions_{name}") for name in ("used", "allocated", "empty_tail"))
        assert used + tail == allocated == 16 * seen("quire_kv_blocks", state="owned")
        assert 0 < seen("quire_kv_usage_ratio") < 0.1
        for future in (two, *more):
            future.result(DEADLINE_S)
    wait_clean(server.url)
    assert Scrape(server.url).by("quire_requests_finished_total", "finished_reason") == {"stop": 0, "length": 3, "abort": 1, "error": 0}


def test_a_full_queue_a_stop_string_and_an_error_are_counted(server: Server) -> None:
    text = complete(server.url, prompt="def", max_tokens=20, seed=1)["choices"][0]["text"]
    server.backend.delay_s = 0.02  # the engine would be done before the string was seen
    stopped = complete(server.url, prompt="def", max_tokens=400, seed=1, stop=text[3:6])
    server.backend.delay_s = 0.0
    assert stopped["choices"][0]["finish_reason"] == "stop"
    server.backend.go.clear()
    with ThreadPoolExecutor() as clients:
        crowd = clients.submit(complete, server.url, prompt=[1], n=6, max_tokens=2)
        wait_until(lambda: server.client.in_flight == 6, "all places are taken")
        assert http.post(server.url + COMPLETIONS, json={"prompt": [1]}).status_code == 429
        server.backend.go.set()
        crowd.result(DEADLINE_S)
    server.backend.fail_rows = {0, 1}
    assert http.post(server.url + COMPLETIONS, json={"prompt": [1]}).status_code == 500
    seen = Scrape(server.url)
    assert seen.by("quire_requests_finished_total", "finished_reason") == {"stop": 1, "length": 2, "abort": 0, "error": 1}
    assert seen.by("quire_requests_rejected_total", "reason") == {"queue_full": 1}
    assert seen("vllm:admission_rejections_total", model_name="fake") == 1
    assert seen("quire_request_seconds_count") == 3, "one that failed has no duration"


def test_preemptions_have_a_cause_and_requests_count_theirs(tokenizer: Tokenizer) -> None:
    backend = PacedBackend(num_blocks=12, max_model_len=128, vocab_size=tokenizer.vocab_size)
    server = Server(tokenizer, backend, admission="watermark", max_num_seqs=6)
    try:
        backend.go.clear()
        with ThreadPoolExecutor() as clients:
            asked = [clients.submit(complete, server.url, prompt=[i] * 20, max_tokens=100) for i in range(6)]
            wait_until(lambda: server.client.in_flight == 6, "all are there")  # one after the other, each would have room
            backend.go.set()
            for each in asked:
                each.result(DEADLINE_S)
        wait_clean(server.url)
        seen = Scrape(server.url)
        preempted = server.engine.stats().preemptions
        assert preempted > 0
        causes = seen.by("quire_preemptions_total", "cause")
        assert causes == server.engine.stats().kv.counters.preempted
        assert sum(causes.values()) == preempted
        assert causes["memory"] > 0
        assert seen("quire_request_preemptions_sum") == preempted
        assert seen("quire_request_preemptions_bucket", le="0.0") < seen("quire_request_preemptions_count") == 6
        assert seen("vllm:num_preemptions_total", model_name="fake") == preempted
        assert seen("quire_positions_recomputed_total") == server.engine.stats().tokens_recomputed
    finally:
        server.stop()


def test_beams_are_one_request(server: Server) -> None:
    usage = complete(server.url, prompt=[3] * 20, use_beam_search=True, beam_width=2, n=2, max_tokens=4)["usage"]
    seen = Scrape(server.url)
    assert seen("quire_requests_finished_total", finished_reason="length") == 1
    assert seen("quire_generation_tokens_total") == usage["completion_tokens"] == 8
    assert seen("quire_time_to_first_token_seconds_count") == 1
    assert seen("quire_inter_token_latency_seconds_count") == 0


def test_both_formats_say_the_same(server: Server) -> None:
    complete(server.url, prompt=[1, 2], max_tokens=3)
    wait_clean(server.url)
    text, strict = Scrape(server.url), Scrape(server.url, accept=OPENMETRICS)
    assert text.content_type.startswith("text/plain")
    assert strict.content_type.startswith("application/openmetrics-text")
    assert strict.text.endswith("# EOF\n")
    ours = {key: value for key, value in text.samples.items() if key[0].startswith(("quire_", "vllm:")) and "send" not in str(key)}
    assert ours.items() <= strict.samples.items()
    assert all(family.documentation for family in text.families.values())


def test_vllms_names(server: Server) -> None:
    """As its routers and dashboards look for them; the values are those of our own."""
    complete(server.url, prompt=[5] * 40, max_tokens=3)
    complete(server.url, prompt=[5] * 40, max_tokens=3)
    wait_clean(server.url)
    seen = Scrape(server.url)
    label = {"model_name": "fake"}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc", "num_preemptions_total"):
        assert seen(f"vllm:{name}", **label) == 0
    for name in ("prefix_cache", "gpu_prefix_cache"):
        assert (seen(f"vllm:{name}_queries_total", **label), seen(f"vllm:{name}_hits_total", **label)) == (80, 39)
    assert seen("vllm:prompt_tokens_total", **label) == 80
    assert seen("vllm:generation_tokens_total", **label) == 6
    assert seen("vllm:request_success_total", finished_reason="length", **label) == 2
    assert seen("vllm:cache_config_info", block_size="16", num_gpu_blocks="256", **label) == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
                 "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens",
                 "request_params_n", "request_params_max_tokens", "request_num_preemptions"):  # fmt: skip
        assert seen(f"vllm:{name}_count", **label) == 2, name
    assert seen("vllm:inter_token_latency_seconds_count", **label) == 4


def test_vllms_names_can_be_left_out(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), vllm_metrics=False)
    try:
        names = Scrape(server.url).names
        assert any(name.startswith("quire_") for name in names)
        assert not any(name.startswith("vllm:") for name in names)
    finally:
        server.stop()


def test_no_key_is_asked_for_and_nothing_of_anybodys_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[alice]\nkey = "sk-alice-0123456789"\nrequests_per_minute = 1\n')
    path.chmod(0o600)
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), keys=read_keys(str(path)))
    try:
        headers = {"authorization": "Bearer sk-alice-0123456789"}
        codes = [http.post(server.url + COMPLETIONS, json={"prompt": [1]}, headers=h).status_code for h in ({}, headers, headers)]
        assert codes == [401, 200, 429]
        seen = Scrape(server.url)
        assert seen.by("quire_requests_rejected_total", "reason") == {"invalid_api_key": 1, "rate_limit_exceeded": 1}
        assert "alice" not in seen.text
    finally:
        server.stop()


def test_counters_never_go_back_when_engines_die(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    process = Process("--kv-memory", "32MiB", "--max-num-seqs", "8", environment=gate.environment, stop_after=500)
    try:
        complete(process.url, prompt="import os\n", max_tokens=20)
        before = Scrape(process.url)
        assert before("quire_steps_total") > 0
        assert before("quire_flops_total") > 2 * 20 * 4e6, "at least two operations for each of some million parameters and token"
        assert before("quire_read_bytes_total") > before("quire_steps_total") * 4e6
        assert "quire_machine_flops_per_second" not in before.names, "it was not asked for"
        stop, scrapes = threading.Event(), [before]

        def watch() -> None:
            while not stop.wait(0.02):
                scrapes.append(Scrape(process.url))

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor() as clients:
            streams: list[Future[Any]] = []
            process.ask_while_stopped(
                lambda: streams.extend(clients.submit(complete, process.url, prompt=[i] * 30, max_tokens=600) for i in range(4)), 4
            )
            steps = before("quire_steps_total")
            wait_until(lambda: scrapes[-1]("quire_steps_total") > steps, "its steps were seen")
            with gate.closed():
                os.kill(process.engine_pid, signal.SIGKILL)
                wait_until(lambda: scrapes[-1]("quire_engine_up") == 0, "the death was seen")
            process.go_on_until(lambda: all(stream.done() for stream in streams))
            for stream in streams:
                assert stream.result(DEADLINE_S)["usage"]["completion_tokens"] == 600
        stop.set()
        watcher.join()
        scrapes.append(Scrape(process.url))
        for earlier, later in pairwise(scrapes):
            assert earlier.counters.keys() <= later.counters.keys()
            for key, value in earlier.counters.items():
                assert later.counters[key] >= value, key
        away = next(seen for seen in scrapes if seen("quire_engine_up") == 0)
        assert away("quire_sequences_running") == away("quire_kv_blocks", state="owned") == 0
        assert away("quire_sequences_waiting_by_reason", reason="engine") == away("quire_sequences_waiting") == 4
        last = scrapes[-1]
        assert (last("quire_engine_restarts_total"), last("quire_requests_received_total")) == (1, 5)
        assert last("quire_generation_tokens_total") == 20 + 4 * 600, "nothing is counted twice"
        assert last("quire_prompt_tokens_total") == before("quire_prompt_tokens_total") + 4 * 30
        assert last("quire_time_to_first_token_seconds_count") == 5
        assert last("quire_positions_computed_total") > 4 * 600
    finally:
        process.kill()
