"""Reads /metrics as Prometheus does."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from server.harness import http

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Scrape:
    """Every sample of a server, by its name and labels."""

    def __init__(self, url: str, *, accept: str = "") -> None:
        answer = http.get(f"{url}/metrics", headers={"accept": accept} if accept else {})
        assert answer.status_code == 200, answer.text
        self.content_type = answer.headers["content-type"]
        self.text = answer.text
        parse = openmetrics.text_string_to_metric_families if accept == OPENMETRICS else text_string_to_metric_families
        self.families = {family.name: family for family in parse(answer.text)}
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]

    def by(self, name: str, label: str) -> Mapping[str, float]:
        return {dict(labels)[label]: value for (sample, labels), value in self.samples.items() if sample == name}

    @property
    def counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Everything that may only grow."""
        grows = ("_total", "_count", "_sum", "_bucket")
        return {key: value for key, value in self.samples.items() if key[0].endswith(grows)}

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.samples}
