"""lm-evaluation-harness, ``local-completions``: log-likelihoods from the server's echo and logprobs, exact to the last bit."""

from __future__ import annotations

from typing import Any

import pytest

from server.harness import Process, http

completions = pytest.importorskip("lm_eval.models.openai_completions", reason="make test-clients installs it", exc_type=ImportError)
instances = pytest.importorskip("lm_eval.api.instance", exc_type=ImportError)
CONTEXT = "def add(a, b):\n    return"


@pytest.fixture(scope="module", params=[1, 4], ids=["one at a time", "batches"])
def harness(server: Process, request: pytest.FixtureRequest) -> Any:
    return completions.LocalCompletionsAPI(
        model="embedded", base_url=server.url + "/v1/completions", tokenizer_backend="remote", tokenized_requests=True,
        batch_size=request.param, max_length=512, max_retries=1,
    )  # fmt: skip


def ids_of(server: Process, text: str) -> list[int]:
    """As the harness sends a text: without a token that begins it, unless it is told to (add_bos_token)."""
    ids: list[int] = http.post(server.url + "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    return ids


def likelihoods(harness: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    made = [instances.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found: list[tuple[float, bool]] = harness.loglikelihood(made, disable_tqdm=True)
    return found


def test_loglikelihood(server: Process, harness: Any) -> None:
    """The model's own greedy continuation is greedy to the harness too, and another one is neither greedy nor as likely."""
    body = {"prompt": ids_of(server, CONTEXT), "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    greedy = http.post(server.url + "/v1/completions", json=body).json()["choices"][0]["text"]
    found = likelihoods(harness, [(CONTEXT, greedy), (CONTEXT, " zebra zebra zebra"), ("x = [1, 2", ", 3]"), (CONTEXT, greedy)])
    assert found[0] == found[3]
    assert found[0][1] is True
    assert found[1][1] is False
    assert found[1][0] < found[0][0] < 0


def test_sums_are_those_of_the_server(server: Process, harness: Any) -> None:
    continuation = " a + b\n"
    context, whole = ids_of(server, CONTEXT), ids_of(server, CONTEXT + continuation)
    body = {"prompt": whole, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    told = http.post(server.url + "/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
    ((value, _),) = likelihoods(harness, [(CONTEXT, continuation)])
    assert value == sum(told[len(context) : -1])


def test_rolling(harness: Any) -> None:
    made = [instances.Instance("loglikelihood_rolling", {}, (CONTEXT * 8,), 0)]
    (value,) = harness.loglikelihood_rolling(made, disable_tqdm=True)
    assert value < 0


def test_generate_until(harness: Any) -> None:
    made = [instances.Instance("generate_until", {}, (CONTEXT, {"until": ["\n"], "max_gen_toks": 24, "temperature": 0}), 0)]
    (text,) = harness.generate_until(made, disable_tqdm=True)
    assert "\n" not in text
