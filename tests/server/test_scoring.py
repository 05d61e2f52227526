"""What the model says of prompts: echo with logprobs, prompt_logprobs, on a real server."""

from __future__ import annotations

import os
import random
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from server.harness import PacedBackend, Process, Server, events, http, is_gone, wait_clean, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n"


def post(url: str, path: str, **fields: Any) -> Any:
    answer = http.post(url + path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def harness_request(prompts: list[list[int]]) -> dict[str, Any]:
    """As lm-evaluation-harness's ``local-completions`` sends it."""
    return {"model": "embedded", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def harness_answer(choice: dict[str, Any], context_length: int) -> tuple[float, bool]:
    """What it makes of a choice: the continuation's log-probability, and whether greedy decoding would have said it."""
    logprobs = choice["logprobs"]
    values, tops = logprobs["token_logprobs"][context_length:-1], logprobs["top_logprobs"][context_length:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def greedy_continuation(url: str, tokens: list[int], count: int) -> dict[str, Any]:
    choice: dict[str, Any] = post(
        url, COMPLETIONS, prompt=tokens, max_tokens=count, temperature=0, logprobs=1, return_token_ids=True, ignore_eos=True
    )["choices"][0]
    return choice


def test_the_contract_of_lm_evaluation_harness(real: Process) -> None:
    rng = random.Random(4)
    contexts = [[rng.randrange(300, 4000) for _ in range(length)] for length in (1, 5, 40, 200)]
    made = [greedy_continuation(real.url, context, 6) for context in contexts]
    right = [context + choice["token_ids"] for context, choice in zip(contexts, made, strict=True)]
    wrong = [[*tokens[:-1], (tokens[-1] + 1) % 4000] for tokens in right]
    answer = post(real.url, COMPLETIONS, **harness_request(right + wrong))
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len(choices) == 8
    for i, (context, choice) in enumerate(zip(contexts * 2, choices, strict=True)):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(context) + 6 + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for token, value, top in zip(logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert top[token] == value
        total, greedy = harness_answer(choice, len(context))
        assert greedy == (i < 4), "it is the greedy continuation, and the same with another last token is not"
        if i < 4:
            assert logprobs["token_logprobs"][len(context) : -1] == made[i]["logprobs"]["token_logprobs"], "as when it was generated"
            assert total > harness_answer(choices[i + 4], len(context))[0]
    assert answer["usage"]["prompt_tokens"] == 2 * sum(len(tokens) for tokens in right)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "what is scored is computed"


def test_the_legacy_form_without_output(real: Process) -> None:
    """max_tokens 0: the prompt alone, in a text whose offsets fit."""
    choice = post(real.url, COMPLETIONS, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    logprobs = choice["logprobs"]
    begin, *tokens = logprobs["tokens"]
    assert begin == "<|endoftext|>", "what the tokenizer puts before every text has no place in it"
    assert "".join(tokens) == PROMPT
    for token, offset in zip(tokens, logprobs["text_offset"][1:], strict=True):
        assert PROMPT.startswith(token, offset)
    assert logprobs["text_offset"][:2] == [0, 0]
    assert {len(top) for top in logprobs["top_logprobs"][1:]} == {2, 3}, "two, and the token itself where it is not one of them"
    plain = post(real.url, COMPLETIONS, prompt=PROMPT, max_tokens=0, echo=True)
    assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == (PROMPT, None)
    assert plain["usage"]["completion_tokens"] == 0
    full = post(real.url, COMPLETIONS, prompt=[[100] * 2048], max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert len(full["logprobs"]["tokens"]) == 2048, "all of the context"


def test_echo_in_a_stream(real: Process) -> None:
    """Every choice begins with the prompt and its log-probabilities, whichever of them has computed it."""
    fields = {"prompt": [PROMPT, "import os\n"], "n": 2, "max_tokens": 8, "echo": True, "logprobs": 1, "seed": 3, "ignore_eos": True}
    whole = post(real.url, COMPLETIONS, **fields)["choices"]
    found = events(http.post(real.url + COMPLETIONS, json=fields | {"stream": True}).text)
    joined: dict[int, Any] = {}
    for event in found[:-1]:
        for choice in event["choices"]:
            so_far = joined.setdefault(choice["index"], {"text": ""} | {name: [] for name in whole[0]["logprobs"]})
            so_far["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                so_far[name] += values
    for choice in whole:
        assert joined[choice["index"]] == {"text": choice["text"], **choice["logprobs"]}


def test_prompt_logprobs(real: Process) -> None:
    """vLLM's field: by token id, with rank; the same numbers as echo reports, in both APIs."""
    echoed = post(real.url, COMPLETIONS, prompt=PROMPT, max_tokens=1, echo=True, logprobs=3, prompt_logprobs=1, return_token_ids=True)
    choice = echoed["choices"][0]
    ids = choice["prompt_token_ids"]
    assert choice["prompt_logprobs"][0] is None
    values = choice["logprobs"]["token_logprobs"]
    for i, entry in enumerate(choice["prompt_logprobs"][1:], start=1):
        own = entry[str(ids[i])]
        assert own["logprob"] == values[i]
        assert own["decoded_token"] == choice["logprobs"]["tokens"][i]
        assert len(entry) == (1 if own["rank"] == 1 else 2)
        assert min(other["rank"] for other in entry.values()) == 1
    messages = [{"role": "user", "content": "import os\n"}]
    said = post(real.url, CHAT, messages=messages, max_tokens=2, prompt_logprobs=0, return_token_ids=True, n=2)
    assert len(said["prompt_logprobs"]) == len(said["prompt_token_ids"])
    again = post(real.url, COMPLETIONS, prompt=said["prompt_token_ids"], max_tokens=0, echo=True, logprobs=0)
    own = [entry and entry[str(i)]["logprob"] for i, entry in zip(said["prompt_token_ids"], said["prompt_logprobs"], strict=True)]
    assert own == again["choices"][0]["logprobs"]["token_logprobs"]


def test_tokens_by_their_ids(real: Process) -> None:
    fields: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = post(real.url, COMPLETIONS, prompt=PROMPT, echo=True, logprobs=1, **fields)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["prompt_token_ids"] + choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"][1:] for name in top)
    said = post(real.url, CHAT, messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=2, **fields)["choices"][0]
    assert [entry["token"] for entry in said["logprobs"]["content"]] == [f"token_id:{i}" for i in said["token_ids"]]


def test_a_cached_prompt_is_scored_whole_and_found_by_others(real: Process) -> None:
    """What is scored is computed by its own request, and what it computed is found by the next one that is not."""
    prompt = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n" * 4
    scored = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    cold = post(real.url, COMPLETIONS, **scored)
    warm = post(real.url, COMPLETIONS, **scored)
    assert warm["choices"] == cold["choices"]
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    plain = post(real.url, COMPLETIONS, prompt=prompt, max_tokens=1)["usage"]
    assert plain["prompt_tokens_details"]["cached_tokens"] == plain["prompt_tokens"] - 1


def test_scores_survive_the_engines_death(real: Process) -> None:
    """Prompts in small chunks, among streams, in an engine that is killed while it works on them: the same numbers."""
    process = Process("--kv-memory", "16MiB", "--max-num-batched-tokens", "16", "--max-num-seqs", "8", stop_after=50)
    try:
        rng = random.Random(9)
        prompts = [[rng.randrange(300, 4000) for _ in range(400)] for _ in range(4)]
        bodies = [harness_request([prompt]) for prompt in prompts]
        bodies.append({"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "temperature": 0, "echo": True, "logprobs": 0})
        alone = [post(real.url, COMPLETIONS, **body)["choices"] for body in bodies]
        vector = post(real.url, "/v1/embeddings", input=[prompts[0]], pooling="mean")["data"]
        with ThreadPoolExecutor(16) as clients:
            calls: list[Future[Any]] = []

            def ask() -> None:
                calls.extend(clients.submit(post, process.url, COMPLETIONS, **body) for body in bodies)
                calls.append(clients.submit(post, process.url, "/v1/embeddings", input=[prompts[0]], pooling="mean"))

            process.ask_while_stopped(ask, len(bodies) + 1)
            for _ in range(2):
                engine = process.wait_stopped()
                os.kill(engine, signal.SIGKILL)
                wait_until(lambda engine=engine: is_gone(engine), "it is dead")
            process.go_on()
            *together, pooled = [call.result() for call in calls]
        assert [answer["choices"] for answer in together] == alone
        assert pooled["data"] == vector
        wait_clean(process.url)
    finally:
        process.kill()


def test_a_prompt_whose_logits_are_not_numbers_fails_alone(fake: Server) -> None:
    backend = fake.backend
    backend.go.clear()
    try:
        with ThreadPoolExecutor(2) as clients:
            bad = clients.submit(
                http.post, fake.url + COMPLETIONS, json={"prompt": [[1, 2, 3]], "max_tokens": 0, "echo": True, "logprobs": 0}
            )
            wait_until(lambda: fake.client.in_flight == 1, "it runs")
            backend.fail_rows = {0}
            backend.go.set()
            answer = bad.result()
    finally:
        backend.fail_rows = set()
        backend.go.set()
    assert answer.status_code == 500
    assert "not finite" in answer.json()["error"]["message"]
    assert http.post(fake.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200
    wait_clean(fake.url)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_that_is_not_finite_fails_alone(fake: Server, pooling: str) -> None:
    assert isinstance(fake.backend, PacedBackend)
    fake.backend.fail_rows = set(range(64))
    try:
        answer = http.post(fake.url + "/v1/embeddings", json={"input": "a b c", "pooling": pooling})
    finally:
        fake.backend.fail_rows = set()
    assert answer.status_code == 500
    assert "not finite" in answer.json()["error"]["message"]
    assert http.post(fake.url + "/v1/embeddings", json={"input": "a b c", "pooling": pooling}).status_code == 200
    wait_clean(fake.url)
