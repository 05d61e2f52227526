"""Requests made up from the server's own OpenAPI document: none may fail inside, lose a block, or end the engine.

    python benchmarks/fuzz_api.py [--cases 20000] [--seed 0]

Needs schemathesis. Half of the cases follow the document (and of those half again have few of the optional fields, so that they get
past the checks), half break it. An answer must have a status and a type that the document names, and no 5xx. A failure prints
the request as a curl line.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from serving_process import ServeProcess, serving

ARGUMENTS = ("--kv-memory", "16MiB", "--max-model-len", "64", "--max-num-seqs", "16")
"""A short context bounds what a case costs."""
ENDLESS = "/page/events"
BATCH = 40
MAX_GROWTH_MIB = 48
INSIDE = ("Traceback", "site-packages", "internal error", "object at 0x", "/quire/")


@dataclass
class Report:
    cases: int = 0
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(operation, status) → how often."""
    failures: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    """Of both processes, now and then."""


def fuzz(server: ServeProcess, cases: int, seed: int) -> Report:
    """At least ``cases`` requests. What is wrong is in the report."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path=ENDLESS)
    found: list[Any] = list(schema.get_all_operations())
    operations = [result.ok() for result in found]
    report, turn = Report(), 0
    while report.cases < cases and len(report.failures) < 20:
        for operation in operations:
            has_body = bool(list(operation.body))
            for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
                batch = BATCH if has_body else 2
                _batch(operation, mode, min(batch, max(2, cases // 40)), seed * 1_000_003 + turn, server, report)
        turn += 1
        report.memory.append(server.memory())
        print(f"\r{report.cases:,} of {cases:,} cases, {len(report.failures)} failures ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return report


def _batch(operation: Any, mode: GenerationMode, count: int, seed: int, server: ServeProcess, report: Report) -> None:
    rng = random.Random(seed)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and rng.random() < 0.5:
            _thin(case.body, rng)
        response = case.call(base_url=server.url, timeout=60)
        report.cases += 1
        report.answers[operation.label, response.status_code] += 1
        if wrong := _wrong(operation, case, response):
            report.failures.append(f"{operation.label}: {wrong}\n  {case.as_curl_command()[:2000]}\n  {response.text[:500]}")
            print(f"\nWRONG: {report.failures[-1]}", file=sys.stderr, flush=True)

    with contextlib.suppress(Unsatisfiable):  # nothing to break: it takes no input
        one()


def _thin(body: dict[str, Any], rng: random.Random) -> None:
    """Leave most of the optional fields out, the model's name first."""
    for name in list(body):
        if name not in ("prompt", "messages", "input", "tokens", "max_tokens") and (name == "model" or rng.random() < 0.85):
            del body[name]


def _wrong(operation: Any, case: Any, response: Any) -> str | None:
    """What is wrong with an answer."""
    status = response.status_code
    if status >= 500:
        return f"status {status}"
    documented = operation.definition.raw["responses"]
    if str(status) not in documented:
        return f"status {status} is not in the document, which has {', '.join(documented)}"
    kind = response.headers.get("content-type", [""])[0].split(";")[0]
    known = documented[str(status)].get("content", {})
    if known and kind not in known:
        return f"content type {kind} is not in the document, which has {', '.join(known)}"
    if status < 400:
        return None  # what a model writes may be a traceback
    asked = str(case.body) + str(case.query) + str(case.path_parameters) + str(case.headers)
    for word in INSIDE:  # a request that says it may be told so: hypothesis takes words for its requests from this file too
        if word in response.text and word not in asked:
            return f"it tells of the inside: {word}"
    return None


def check(server: ServeProcess, report: Report, engine: int | None) -> list[str]:
    """What is wrong with the server after it."""
    wrong = list(report.failures)
    if not server.wait_clean():
        wrong.append(f"blocks were lost: {server.health()}")
    if server.health().get("engine_restarts") != 0 or server.engine_pid() != engine:
        wrong.append("the engine was started again")
    settled = report.memory[len(report.memory) // 3 :]
    growth = {name: settled[-1][name] - first for name, first in settled[0].items()}
    return wrong + [f"{name} grew by {mib:.0f} MiB in the last two thirds" for name, mib in growth.items() if mib > MAX_GROWTH_MIB]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with serving(*ARGUMENTS) as server:
        engine = server.engine_pid()
        report = fuzz(server, args.cases, args.seed)
        wrong = check(server, report, engine)
    print(f"{report.cases:,} cases in {time.monotonic() - started:.0f} s")
    for label in sorted({label for label, _ in report.answers}):
        found = {status: n for (name, status), n in sorted(report.answers.items()) if name == label}
        print(f"  {label:45} " + "  ".join(f"{status}: {n:,}" for status, n in found.items()))
    for name in report.memory[0]:
        first, last = report.memory[len(report.memory) // 3][name], report.memory[-1][name]
        print(f"  {name:12} {first:7.1f} MiB after a third, {last:7.1f} MiB at the end")
    for line in wrong:
        print(f"WRONG: {line}")
    print("nothing is wrong" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
