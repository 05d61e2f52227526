"""The dashboard and the alerts ask for metrics that there are, with labels that these have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.config import ServerConfig
from server.harness import Process, http, wait_clean
from server.scraping import Scrape

DEPLOY = Path(__file__).parents[2] / "deploy"
NAME = re.compile(r"\b(quire_\w+|vllm:\w+)(\{[^}]*\})?")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
FROM_PROMETHEUS = {"instance", "job"}


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "quire.json").read_text(encoding="utf-8"))


def dashboard_queries() -> Iterator[str]:
    board = dashboard()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for annotation in board["annotations"]["list"]:
        yield annotation["expr"]


def alert_queries() -> Iterator[str]:
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.strip().startswith("expr:"):
            yield line.partition("expr:")[2].strip()


def test_an_engine_that_is_stuck_is_told_before_it_is_replaced() -> None:
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    alert = text[text.index("QuireEngineIsStuck") :].partition("- alert")[0]
    found = re.search(r"\[(\d+)(s|m)\].*\n\s*for: (\d+)(s|m)", alert)
    assert found
    seconds = {"s": 1, "m": 60}
    takes = int(found[1]) * seconds[found[2]] + int(found[3]) * seconds[found[4]]
    assert takes + 15 < ServerConfig().engine_timeout, "and the time between two looks"


@pytest.fixture(scope="module")
def seen() -> Iterator[Scrape]:
    process = Process("--kv-memory", "16MiB", "--measure-limits")
    try:
        assert http.post(process.url + "/v1/completions", json={"prompt": "a", "max_tokens": 4}).status_code == 200
        assert http.post(process.url + "/v1/completions", json={"prompt": "a", "max_tokens": 0, "n": 0}).status_code == 400
        wait_clean(process.url)
        yield Scrape(process.url)
    finally:
        process.kill()


@pytest.mark.parametrize("query", [*dashboard_queries(), *alert_queries()])
def test_every_query_finds_its_metrics(seen: Scrape, query: str) -> None:
    found = NAME.findall(query)
    assert found
    for name, selector in found:
        assert name in seen.names, query
        samples = [dict(labels) for sample, labels in seen.samples if sample == name]
        for label in LABEL.findall(selector):
            assert label in FROM_PROMETHEUS or all(label in labels for labels in samples), (query, label)
    for labels in re.findall(r"\bby \(([^)]*)\)", query):
        for label in labels.replace(" ", "").split(","):
            known = {key for sample, pairs in seen.samples for key, _ in pairs if any(sample == name for name, _ in found)}
            assert label in FROM_PROMETHEUS | known, (query, label)
    assert query.count("(") == query.count(")")


def test_every_group_of_metrics_is_on_the_dashboard(seen: Scrape) -> None:
    """What is exported and shown nowhere is either missing there or not worth exporting."""
    shown = {name for query in (*dashboard_queries(), *alert_queries()) for name, _ in NAME.findall(query)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in seen.names if name.startswith("quire_")}
    assert ours - shown == {
        "quire_info", "quire_requests_received_total", "quire_sequences_in_flight", "quire_kv_pool_blocks", "quire_kv_block_tokens",
        "quire_kv_block_groups",
        "quire_kv_largest_free_run_blocks", "quire_request_prefill_seconds", "quire_request_decode_seconds",
        "quire_request_inference_seconds", "quire_request_time_per_output_token_seconds", "quire_request_max_tokens",
    }  # fmt: skip


def test_the_machine_was_measured(seen: Scrape) -> None:
    assert seen("quire_machine_read_bytes_per_second") > 1e8
    assert seen("quire_machine_flops_per_second") > 1e8


def test_the_dashboard_is_one() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert {panel["type"] for panel in board["panels"]} == {"row", "stat", "timeseries"}
    for panel in board["panels"]:
        assert panel["type"] == "row" or panel["description"], panel["title"]
    assert any(variable["query"] == "label_values(quire_info, instance)" for variable in board["templating"]["list"])
