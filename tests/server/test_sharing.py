"""Samples, beams and the prefix cache over HTTP: what is computed once, who shares it, what is returned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from quire import LLM, SamplingParams
from quire.server.calls.salts import Salts
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Process, Server, events, health, http, raw_request, wait_clean, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "def fibonacci(n):\n"


@pytest.fixture(scope="module")
def client(real: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_memory="32MiB")


def ids(count: int, start: int = 1) -> list[int]:
    """A prompt of ``count`` tokens that shares its beginning with no other ``start``."""
    return [(start * 100 + i * 7) % 4000 for i in range(count)]


def post(server: Server, path: str = COMPLETIONS, **fields: Any) -> Any:
    answer = http.post(server.url + path, json={"ignore_eos": True} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cost(server: Server, **fields: Any) -> tuple[int, int]:
    """(positions computed, cached tokens) of one request, alone."""
    wait_clean(server.url)
    before = server.engine.stats().tokens_computed
    answer = post(server, max_tokens=2, **fields)
    return server.engine.stats().tokens_computed - before, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


# ---- n and best_of


@pytest.mark.parametrize("fields", [{"n": 3}, {"n": 1, "best_of": 3}], ids=["n", "best_of"])
def test_the_prompt_of_several_samples_is_computed_once(fake: Server, fields: dict[str, Any]) -> None:
    prompt = ids(100, 3 if "best_of" in fields else 2)
    before = fake.engine.stats()
    answer = post(fake, prompt=prompt, max_tokens=10, seed=1, **fields)
    after = fake.engine.stats()
    assert len(answer["choices"]) == fields["n"]
    assert answer["usage"]["prompt_tokens"] == 100
    assert answer["usage"]["completion_tokens"] == 30
    # The last prompt position gives each sample its first token.
    assert after.tokens_computed - before.tokens_computed == 100 + 2 + 3 * 9
    assert after.tokens_sampled - before.tokens_sampled == 30


def test_best_of_returns_those_with_the_highest_mean_logprob(fake: Server) -> None:
    for path, prompt in ((COMPLETIONS, {"prompt": [ids(5), ids(20, 4)]}), (CHAT, {"messages": [{"role": "user", "content": "Hi"}]})):
        fields = {"max_tokens": 12, "seed": 4, "return_token_ids": True, "stop": ["e", "("]} | prompt
        reported: dict[str, Any] = {"logprobs": True} if path == CHAT else {"logprobs": 0}

        def mean(choice: Any) -> float:
            found = choice["logprobs"]
            values = [entry["logprob"] for entry in found["content"]] if "content" in found else found["token_logprobs"]
            return sum(values) / len(values)

        every = post(fake, path, n=5, **reported, **fields)
        best = post(fake, path, n=2, best_of=5, **fields)
        asked = post(fake, path, n=2, best_of=5, **reported, **fields)
        for number in range(len(every["choices"]) // 5):
            samples = every["choices"][number * 5 : number * 5 + 5]
            expected = sorted(samples, key=lambda choice: -mean(choice))[:2]
            got = best["choices"][number * 2 : number * 2 + 2]
            assert [choice["token_ids"] for choice in got] == [choice["token_ids"] for choice in expected]
            assert all(choice["logprobs"] is None for choice in got)
            with_logprobs = asked["choices"][number * 2 : number * 2 + 2]
            assert [choice["logprobs"] for choice in with_logprobs] == [choice["logprobs"] for choice in expected]
        assert len({len(choice["token_ids"]) for choice in every["choices"]}) > 1, "means and sums rank them differently"
        assert [choice["index"] for choice in best["choices"]] == list(range(len(best["choices"])))
        assert best["usage"] == every["usage"] | {"prompt_tokens_details": best["usage"]["prompt_tokens_details"]}


def test_best_of_is_that_of_the_offline_api(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=12, temperature=1, top_p=1, seed=5, n=2, best_of=6)
    (offline,) = llm.generate(PROMPT, SamplingParams(max_tokens=12, seed=5, n=2, best_of=6))
    assert [choice.text for choice in answer.choices] == [choice.text for choice in offline.outputs]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == offline.usage.completion_tokens
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(model="embedded", messages=messages, max_tokens=4, seed=5, n=1, extra_body={"best_of": 3})
    assert len(chat.choices) == 1
    same = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=8, seed=5, n=2, best_of=2, stream=True)
    assert {chunk.choices[0].index for chunk in same} == {0, 1}, "nothing is chosen, so it may be streamed"


# ---- beams


def test_beams_are_those_of_the_offline_api(client: openai.OpenAI, llm: LLM) -> None:
    search = {"beam_width": 4, "length_penalty": 0.6, "early_stopping": True}
    (offline,) = llm.generate(PROMPT, SamplingParams(n=3, max_tokens=16, **search))
    expected = [(choice.text, choice.finish_reason) for choice in offline.outputs]
    assert len(set(expected)) == 3
    fields: dict[str, Any] = {"model": "embedded", "prompt": PROMPT, "max_tokens": 16, "n": 3, "extra_body": search}
    answer = client.completions.create(**fields)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in offline.outputs)
    texts = ["", "", ""]
    for chunk in client.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [text for text, _ in expected]


def test_beams_in_the_names_of_vllm(client: openai.OpenAI, llm: LLM) -> None:
    """The width is n or best_of there, temperature 0 goes with it, and the model's own temperature is not mixed in."""
    (offline,) = llm.generate(PROMPT, SamplingParams(use_beam_search=True, n=2, best_of=4, max_tokens=12))
    fields: dict[str, Any] = {"model": "embedded", "prompt": PROMPT, "max_tokens": 12, "n": 2}
    for more in ({}, {"temperature": 0}, {"temperature": 1.0}):
        answer = client.completions.create(**fields, **more, best_of=4, extra_body={"use_beam_search": True})
        assert [choice.text for choice in answer.choices] == [choice.text for choice in offline.outputs]
    logprobs = client.completions.create(**fields, best_of=4, logprobs=0, extra_body={"use_beam_search": True}).choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or ()) == len(offline.outputs[0].token_ids)
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = {"model": "embedded", "messages": messages, "max_tokens": 12, "n": 2, "extra_body": {"use_beam_search": True}}
    whole = client.chat.completions.create(**chat)
    assert len({choice.message.content for choice in whole.choices}) == 2
    contents = ["", ""]
    for chunk in client.chat.completions.create(**chat, stream=True):
        contents[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert contents == [choice.message.content for choice in whole.choices]


def test_beams_beyond_the_rows_are_refused_before_a_stream_begins(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), max_num_seqs=2)
    for stream in (False, True):
        answer = http.post(server.url + COMPLETIONS, json={"prompt": "a", "beam_width": 3, "max_tokens": 2, "stream": stream})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "beam_width"
        assert "3 beams > --max-num-seqs 2" in answer.json()["error"]["message"]
    server.stop()


def test_a_hang_up_during_a_beam_search_frees_everything(fake: Server) -> None:
    fake.backend.delay_s = 0.01
    try:
        with raw_request(fake.port, COMPLETIONS, {"prompt": "a", "beam_width": 3, "n": 2, "max_tokens": 400, "stream": True}):
            wait_until(lambda: health(fake.url).get("running") == 3, "the beams run")
        wait_clean(fake.url)
    finally:
        fake.backend.delay_s = 0.0
    assert fake.client.in_flight == 0
    fake.engine.check()


# ---- the prefix cache


def test_cached_tokens_grow_from_turn_to_turn(client: openai.OpenAI) -> None:
    """A conversation, as an agent has it: each turn repeats all before it. A salt of its own makes the first one cold."""
    messages: Any = [{"role": "system", "content": "You complete code. " * 8}, {"role": "user", "content": "import os\n"}]
    cached, lengths = [], []
    for _ in range(3):
        answer = client.chat.completions.create(model="embedded", messages=messages, max_tokens=20, extra_body={"cache_salt": "turns"})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        lengths.append(answer.usage.prompt_tokens)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}, {"role": "user", "content": "go on\n"}]
    assert cached[0] == 0
    assert lengths[0] - 16 <= cached[1] <= cached[2]
    assert cached[2] >= lengths[1] - 16


def test_the_second_time_everything_but_the_last_token_is_there(fake: Server) -> None:
    prompt = ids(100, 5)
    computed, cached = cost(fake, prompt=prompt)
    assert (computed, cached) == (101, 0)
    computed, cached = cost(fake, prompt=prompt)
    assert cached == 99
    assert computed <= 2 + 1  # the last prompt token, the first new one
    assert cost(fake, prompt=ids(100, 6)) == (101, 0)


def test_every_usage_says_what_was_cached(fake: Server) -> None:
    fields = {"prompt": [ids(40, 7), ids(60, 8)], "n": 2, "max_tokens": 3}
    post(fake, **fields)
    whole = post(fake, **fields)["usage"]
    assert whole["prompt_tokens_details"] == {"cached_tokens": 39 + 59}, "each prompt counts once, whatever n"
    assert whole["prompt_tokens"] == 100
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    found = events(http.post(fake.url + COMPLETIONS, json={"ignore_eos": True} | fields | options).text)
    assert found[-2]["usage"] == whole
    assert all("cached_tokens" in event["usage"]["prompt_tokens_details"] for event in found[:-1])
    beams = post(fake, prompt=ids(40, 7), beam_width=2, n=2, max_tokens=2)["usage"]
    assert beams["prompt_tokens_details"] == {"cached_tokens": 39}


def test_two_salts_share_nothing(fake: Server) -> None:
    """Not with each other, and not with those without a salt: the second one does all the work of the first."""
    prompt = ids(100, 9)
    cold = cost(fake, prompt=prompt, cache_salt="alice")
    assert cold == (101, 0)
    for salt in ("bob", None, "alic", "alice "):
        assert cost(fake, prompt=prompt, cache_salt=salt) == cold
    assert cost(fake, prompt=prompt, cache_salt="alice")[1] == 99
    assert cost(fake, prompt=prompt)[1] == 99
    messages = [{"role": "user", "content": "the same words " * 10}]
    seen = [
        post(fake, CHAT, messages=messages, max_tokens=1, cache_salt=salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("x", "y", "x")
    ]
    assert seen[:2] == [0, 0]
    assert seen[2] > 0


def test_a_client_can_not_choose_the_raw_salt() -> None:
    one, other = Salts(), Salts()
    assert one.derive(None) == b""
    assert one.derive("a") == one.derive("a") != one.derive("b")
    assert one.derive("a") != other.derive("a"), "another server process, another secret"
    assert len({one.derive("bc", b"a"), one.derive("c", b"ab"), one.derive(None, b"abc"), one.derive("abc"), b""}) == 5
    assert all(word not in one.derive("alice", b"tenant") for word in (b"alice", b"tenant"))


def test_no_prefix_caching(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), prefix_caching=False)
    assert cost(server, prompt=ids(50)) == cost(server, prompt=ids(50)) == (51, 0)
    server.stop()


def test_a_wish_to_keep_a_prompt_is_heard(tokenizer: Tokenizer) -> None:
    """Traffic that fills the pool twice pushes out one prompt, and not the other."""
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size, num_blocks=64))
    kept, plain = ids(160, 11), ids(90, 12)
    cost(server, prompt=kept, cache_retention={"priority": 100, "seconds": 600})
    cost(server, prompt=plain)
    for number in range(6):
        assert cost(server, prompt=ids(300, 13 + number))[1] == 0
    assert cost(server, prompt=plain)[1] == 0
    assert cost(server, prompt=kept)[1] == 159
    server.stop()
