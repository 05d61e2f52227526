"""Traces: one span for each request, to an OpenTelemetry collector, under its caller's span where the call says which that is.

A span is made when its request has ended, out of what the meter has noted, and is handed to a thread that sends spans in batches.
No request waits for a collector, and none fails by one: spans that can't be sent are dropped, and the log says so.

Attributes are those of the semantic conventions for generative AI, and vLLM's for latencies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from quire import __version__
from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.logs import ThrottledLog
from quire.server.metrics.meter import RequestRecord

if TYPE_CHECKING:  # the engine is started before the HTTP stack is imported
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

    from quire.server.http.keys import App, Receive, Scope, Send

EXPORT_TIMEOUT_S = 5
DELAY_MS = 1000
"""Spans are sent at least so often."""
CLOSE_S = 3.0
"""At the end: so long the last spans have."""
MOST_WAITING = 2048
"""Spans that wait to be sent; what is more is dropped."""
CARRIED = (b"traceparent", b"tracestate")


class Tracer:
    """Raises ConfigError where the endpoint is no URL, or OpenTelemetry is not installed."""

    def __init__(self, endpoint: str, model: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"--otlp-endpoint {endpoint!r} is no URL: write for example http://localhost:4318/v1/traces", param="otlp_endpoint"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError:
            raise ConfigError("--otlp-endpoint needs OpenTelemetry: pip install 'quire[otel]'", param="otlp_endpoint") from None
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it would log a traceback for each failure
        self._model = model
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "quire", "service.version": __version__}), shutdown_on_exit=False
        )
        self._endpoint, self._warn = endpoint, ThrottledLog(logging.getLogger("quire.server")).warning
        self._made = 0
        self._told = 0
        """Of them, those that were sent, or of which the log says that they were not."""
        exporter = self._tolerant(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S))
        self._provider.add_span_processor(BatchSpanProcessor(exporter, MOST_WAITING, schedule_delay_millis=DELAY_MS))
        self._tracer = self._provider.get_tracer("quire", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._carrier: ContextVar[dict[str, str] | None] = ContextVar("quire-trace", default=None)

    def around(self, app: App) -> App:
        """``app``, with the trace that a call belongs to known to the requests that it makes."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                found = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in CARRIED}
                self._carrier.set(found or None)
            await app(scope, receive, send)

        return traced

    def begun(self, record: RequestRecord) -> None:
        """A request of the call that runs now was queued."""
        record.trace = self._carrier.get()

    def ended(self, record: RequestRecord, now: float) -> None:
        """``now``: of the record's clock."""
        from opentelemetry.trace import SpanKind, StatusCode

        epoch = time.time_ns() - int(now * 1e9)
        parent = None if record.trace is None else self._propagator.extract(record.trace)
        span = self._tracer.start_span(
            "llm_request",
            parent,
            SpanKind.SERVER,
            attributes=self._attributes(record, now),
            start_time=epoch + int(record.arrived * 1e9),
        )
        if record.generated:
            span.add_event("first_token", timestamp=epoch + int(record.first_output * 1e9))
        if record.finished_reason == "error":
            span.set_status(StatusCode.ERROR)
        span.end(epoch + int(now * 1e9))
        self._made += 1
        if (lost := self._made - self._told - 2 * MOST_WAITING) > 0:  # as many are being sent at most
            self._told += lost
            self._warn(f"traces are made faster than {self._endpoint} takes them, and some are lost")

    def close(self) -> None:
        """Send what is left, if that is possible soon."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_S)
        if (lost := self._made - self._told) > 0:
            logging.getLogger("quire.server").warning("%d traces could not be sent to %s before the end", lost, self._endpoint)

    def _tolerant(self, exporter: SpanExporter) -> SpanExporter:
        """``exporter``, whose failures are a line in the log."""
        from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

        tracer = self

        class Tolerant(SpanExporter):
            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                try:
                    result = exporter.export(spans)
                except Exception as e:
                    result = SpanExportResult.FAILURE
                    logging.getLogger("quire.server").debug("%r", e)
                if result is not SpanExportResult.SUCCESS:
                    tracer._warn(f"{len(spans):,} traces could not be sent to {tracer._endpoint}, and are lost")
                tracer._told += len(spans)
                return result

            def shutdown(self) -> None:
                exporter.shutdown()

        return Tolerant()

    def _attributes(self, record: RequestRecord, now: float) -> dict[str, Any]:
        request, params = record.request, record.request.params
        found: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": request.request_id,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.n": params.n,
            "gen_ai.response.finish_reasons": [record.finished_reason],
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.output_tokens": record.generated,
            "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.completion_tokens": record.generated,
            "gen_ai.usage.cached_tokens": record.cached,
            "gen_ai.usage.num_sequences": params.num_outputs,
            "gen_ai.latency.e2e": now - record.arrived,
            "quire.preemptions": record.preemptions,
        }
        if params.max_tokens is not None:
            found["gen_ai.request.max_tokens"] = params.max_tokens
        if record.first_output:
            found["gen_ai.latency.time_in_queue"] = record.queued_s or 0.0
            if record.generated:
                found["gen_ai.latency.time_to_first_token"] = record.first_output - record.arrived
            found["gen_ai.latency.time_in_model_prefill"] = record.prefill_s
            found["gen_ai.latency.time_in_model_decode"] = record.decode_s
            found["gen_ai.latency.time_in_model_inference"] = record.prefill_s + record.decode_s
        return found


def open_tracer(config: ServerConfig, model: str) -> Tracer | None:
    """As the configuration says; None where it asks for none. Raises ConfigError."""
    return None if config.otlp_endpoint is None else Tracer(config.otlp_endpoint, model)
