"""Some of benchmarks/fuzz_api.py: requests made up from the server's own OpenAPI document (make test-fuzz tries 20,000)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quire.errors import QuireError
from quire.sampling_params import SamplingParams
from quire.server.openapi import LIMITS
from server.harness import Server, http

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package


def test_a_few_hundred_made_up_requests() -> None:
    pytest.importorskip("schemathesis")
    import fuzz_api
    import serving_process

    with serving_process.serving(*fuzz_api.ARGUMENTS) as server:
        engine = server.engine_pid()
        report = fuzz_api.fuzz(server, 150, seed=1)
        assert report.cases >= 150
        assert not fuzz_api.check(server, report, engine)


def test_the_documents_limits_are_those_that_are_checked(fake: Server) -> None:
    """On both sides of each."""
    for name, (low, high) in LIMITS.items():
        fields = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs"}
        if name in ("priority", "timeout"):
            for value, status in ((low, 200), (high, 200), (low - 1, 400), (high + 1, 400)):
                body = {"prompt": "a", "max_tokens": 1, name: 30 if name == "timeout" and value == low else value}
                assert http.post(fake.url + "/v1/completions", json=body).status_code == status, (name, value)
            continue
        more = {
            "n": {"best_of": high},
            "best_of": {},
            "length_penalty": {"beam_width": 2, "temperature": 0},
            "min_tokens": {"max_tokens": None},
        }
        params = {fields.get(name, name): 0, **more.get(name, {})}
        key = fields.get(name, name)
        least = 1e-9 if name == "top_p" else low  # 0 itself would keep no token
        for value in (least, high):
            SamplingParams(**(params | ({"n": 1} if name == "best_of" else {}) | {key: value}))
        for value in (low - 1, high + 1):
            with pytest.raises(QuireError):
                SamplingParams(**(params | {key: value}))
