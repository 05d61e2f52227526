"""GET /metrics: Prometheus' text format, or OpenMetrics where it is accepted. Made when it is asked for, out of plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response

from quire.errors import QuireError
from quire.server.context import Context, context_of
from quire.server.metrics.families import Metric, families
from quire.server.metrics.histogram import Histogram
from quire.server.metrics.vllm import aliases

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
FRESH_S = 0.5
"""So long the engine may take to say what it has counted; what it said last has to do then."""


async def metrics(request: Request) -> Response:
    from prometheus_client import CollectorRegistry, ProcessCollector, exposition
    from prometheus_client.openmetrics import exposition as openmetrics

    context = context_of(request)
    with suppress(QuireError):
        await context.client.stats(FRESH_S)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(context))
    ProcessCollector(registry=registry)
    if "application/openmetrics-text" in request.headers.get("accept", ""):
        # Every name here is plain; other escapings write vllm_ for vllm: (prometheus_client 0.26).
        write: Any = openmetrics.generate_latest
        body, content_type = write(registry, escaping=openmetrics.ALLOWUTF8), OPENMETRICS
    else:
        body, content_type = exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4
    return Response(body, headers={"content-type": content_type})


class _Snapshot:
    """What prometheus_client calls a collector."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterator[Family]:
        context = self._context
        ours = list(families(context.client, context.model, context.cost, context.machine_limits))
        yield from map(_family, ours)
        if context.config.vllm_metrics:
            yield from map(_family, aliases(ours, context.model))


def _family(metric: Metric) -> Family:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    names = list(metric.samples[0][0]) if metric.samples else []
    if metric.kind == "histogram":
        histograms = HistogramMetricFamily(metric.name, metric.help, labels=names)
        for labels, value in metric.samples:
            assert isinstance(value, Histogram)
            histograms.add_metric(list(labels.values()), value.buckets(), value.sum)
        return histograms
    family = (GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily)(metric.name, metric.help, labels=names)
    for labels, value in metric.samples:
        assert not isinstance(value, Histogram)
        family.add_metric(list(labels.values()), value)
    return family
