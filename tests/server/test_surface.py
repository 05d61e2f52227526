"""The rest of the request surface: timings, ids, truncation, rendering, and what the server says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from server.harness import Process, Server, events, http, named_events

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n"
HELLO = [{"role": "user", "content": "import os\n"}]
REQUESTS: list[tuple[str, dict[str, Any]]] = [(COMPLETIONS, {"prompt": PROMPT}), (CHAT, {"messages": HELLO})]
LLAMA_CPP = {"cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_n", "predicted_ms",
             "predicted_per_token_ms", "predicted_per_second"}  # fmt: skip
VLLM = {"time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"}


def post(url: str, path: str, **fields: Any) -> Any:
    answer = http.post(url + path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check_timings(answer: dict[str, Any], predicted: int) -> None:
    timings, metrics = answer["timings"], answer["metrics"]
    assert set(timings) == LLAMA_CPP | {"queue_ms"}
    assert set(metrics) == VLLM
    assert timings["predicted_n"] == predicted
    assert all(value >= 0 for value in [*timings.values(), *metrics.values()])
    assert metrics["time_to_first_token_ms"] == pytest.approx(timings["queue_ms"] + timings["prompt_ms"], abs=0.01)
    if predicted > 10:
        assert metrics["tokens_per_second"] == timings["predicted_per_second"]
        took = timings["predicted_ms"] > 0  # else a busy front has read all tokens at once
        assert (metrics["tokens_per_second"] > 0, metrics["mean_itl_ms"] > 0) == (took, took)


@pytest.mark.parametrize(("path", "fields"), REQUESTS, ids=["completions", "chat"])
def test_timings_and_cached_tokens(real: Process, path: str, fields: dict[str, Any]) -> None:
    fields = fields | {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
    first, second = post(real.url, path, **fields), post(real.url, path, **fields)
    for answer in (first, second):
        check_timings(answer, 12)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert answer["timings"]["cache_n"] == cached
        assert answer["timings"]["prompt_n"] == answer["usage"]["prompt_tokens"] - cached
    assert second["timings"]["cache_n"] == second["usage"]["prompt_tokens"] - 1
    assert second["choices"] == first["choices"]
    for options, last in ((None, "reason"), ({"include_usage": True}, "usage")):
        chunks = events(http.post(real.url + path, json=fields | {"stream": True, "stream_options": options}).text)[:-1]
        assert [chunk for chunk in chunks if "timings" in chunk] == chunks[-1:], "in the last chunk only"
        check_timings(chunks[-1], 12)
        assert (chunks[-1]["choices"] == []) == (last == "usage")
        if last == "reason":
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_timings_of_responses_and_messages(real: Process) -> None:
    """At the end of the answer, and of the stream: where the usage is."""
    ask = {"input": "Once upon a time", "max_output_tokens": 24, "temperature": 0}
    answer = post(real.url, "/v1/responses", **ask)
    check_timings(answer, answer["usage"]["output_tokens"])
    last = named_events(http.post(real.url + "/v1/responses", json=ask | {"stream": True}).text)[-1]["response"]
    check_timings(last, last["usage"]["output_tokens"])
    assert last["timings"]["cache_n"] == last["usage"]["input_tokens_details"]["cached_tokens"] > 0

    ask = {"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 24, "temperature": 0, "model": answer["model"]}
    message = post(real.url, "/v1/messages", **ask)
    check_timings(message, message["usage"]["output_tokens"])
    assert message["timings"]["prompt_n"] == message["usage"]["input_tokens"]
    found = named_events(http.post(real.url + "/v1/messages", json=ask | {"stream": True}).text)
    assert [event["type"] for event in found if "timings" in event] == ["message_delta"]
    check_timings(found[-2], found[-2]["usage"]["output_tokens"])


@pytest.mark.parametrize(("path", "fields"), REQUESTS, ids=["completions", "chat"])
def test_request_ids(real: Process, path: str, fields: dict[str, Any]) -> None:
    prefix = "cmpl-" if path == COMPLETIONS else "chatcmpl-"
    fields = fields | {"max_tokens": 1}
    answer = http.post(real.url + path, json=fields | {"request_id": "mine"}, headers={"x-request-id": "other"})
    assert (answer.json()["id"], answer.headers["x-request-id"]) == (prefix + "mine", "mine")
    answer = http.post(real.url + path, json=fields, headers={"x-request-id": "header"})
    assert (answer.json()["id"], answer.headers["x-request-id"]) == (prefix + "header", "header")
    answers = [http.post(real.url + path, json=fields) for _ in range(2)]
    assert len({answer.json()["id"] for answer in answers} | {answer.headers["x-request-id"] for answer in answers}) == 4
    stream = http.post(real.url + path, json=fields | {"request_id": "s", "stream": True})
    assert {event["id"] for event in events(stream.text)[:-1]} == {prefix + "s"}
    assert stream.headers["x-request-id"] == "s"


def test_the_same_id_twice_at_the_same_time(fake: Server) -> None:
    """Ids are the clients' business: two may choose the same, and both get their answers."""
    from concurrent.futures import ThreadPoolExecutor

    from server.harness import wait_until

    fake.backend.go.clear()
    with ThreadPoolExecutor(2) as clients:
        calls = [clients.submit(post, fake.url, COMPLETIONS, prompt=[[i, 2]], max_tokens=3, request_id="twin") for i in (1, 2)]
        try:
            wait_until(lambda: fake.client.in_flight == 2, "both run")
        finally:
            fake.backend.go.set()
        first, second = (call.result() for call in calls)
    assert first["id"] == second["id"] == "cmpl-twin"
    assert first["choices"] != second["choices"]


def test_truncation(real: Process) -> None:
    ids = http.post(real.url + "/tokenize", json={"prompt": PROMPT}).json()["tokens"]

    def kept(path: str = COMPLETIONS, **fields: Any) -> list[int]:
        answer = post(real.url, path, **{"max_tokens": 2, "return_token_ids": True, **fields})
        found: list[int] = answer["prompt_token_ids"] if path == CHAT else answer["choices"][0]["prompt_token_ids"]
        return found

    assert kept(prompt=PROMPT) == kept(prompt=PROMPT, truncate_prompt_tokens=100) == ids
    assert kept(prompt=PROMPT, truncate_prompt_tokens=5) == ids[-5:]
    assert kept(prompt=[ids], truncate_prompt_tokens=5, truncation_side="left") == ids[-5:]
    assert kept(prompt=PROMPT, truncate_prompt_tokens=5, truncation_side="right") == ids[:5]
    assert kept(prompt=PROMPT, truncation_side="right") == ids, "a side alone cuts nothing"
    long = ids * 200
    assert kept(prompt=[long], truncate_prompt_tokens=-1, max_tokens=48) == long[-2000:]
    assert kept(prompt=[long], truncate_prompt_tokens=-1, max_tokens=None, ignore_eos=True) == long[-2032:], "16 is the default"
    whole = kept(CHAT, messages=HELLO)
    assert kept(CHAT, messages=HELLO, truncate_prompt_tokens=3) == whole[-3:]
    echoed = post(real.url, COMPLETIONS, prompt=PROMPT, truncate_prompt_tokens=5, max_tokens=0, echo=True)["choices"][0]["text"]
    assert PROMPT.endswith(echoed)
    assert len(echoed) < len(PROMPT)


def test_render(real: Process) -> None:
    """What a request would run, and the errors that it would get, without running it."""
    ids = http.post(real.url + "/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    (one,) = post(real.url, COMPLETIONS + "/render", prompt=PROMPT, max_tokens=5, temperature=0.5, stop="x", request_id="r")
    assert one["token_ids"] == ids
    assert (one["request_id"], one["model"], one["stream"]) == ("cmpl-r-0", "embedded", False)
    params = one["sampling_params"]
    assert (params["max_tokens"], params["temperature"], params["stop"]) == (5, 0.5, ["x"])
    two = post(real.url, COMPLETIONS + "/render", prompt=[ids, ids[:2]])
    assert [each["token_ids"] for each in two] == [ids, ids[:2]]
    said = post(real.url, CHAT + "/render", messages=HELLO, stream=True)
    assert said["token_ids"] == http.post(real.url + "/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert said["stream"] is True
    for path, body, param in ((COMPLETIONS, {"prompt": [[1] * 3000]}, "prompt"), (CHAT, {"messages": []}, "messages")):
        refused, run = (http.post(real.url + path + end, json=body) for end in ("/render", ""))
        assert refused.status_code == run.status_code == 400
        assert refused.json() == run.json()
        assert refused.json()["error"]["param"] == param


def test_what_the_server_says_of_itself(real: Process) -> None:
    info = http.get(real.url + "/tokenizer_info").json()
    assert {"bos_token", "eos_token", "pad_token", "chat_template", "tokenizer_class"} <= set(info)
    assert isinstance(info["eos_token"], str)
    assert "messages" in info["chat_template"]
    assert http.post(real.url + "/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"] == [
        info["eos_token_id"]
    ]
    for path in ("/model_info", "/get_model_info"):
        assert http.get(real.url + path).json()["model_path"] == "embedded"
    for path in ("/server_info", "/get_server_info"):
        server = http.get(real.url + path).json()
        assert server["max_total_num_tokens"] > 1000
        assert (server["max_running_requests"], server["tp_size"]) == (32, 1)
        assert "/" not in str(server), "no path"
    assert http.get(real.url + "/load").json() == {"server_load": 0}
    assert http.get(real.url + "/ping").status_code == 200
