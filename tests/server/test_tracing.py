"""--otlp-endpoint: spans arrive at a collector, and a collector that does not answer harms nobody."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server.harness import Process, http, raw_request, wait_clean
from server.test_serve import one_line, run

COMPLETIONS = "/v1/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """As much of an OpenTelemetry collector as an exporter meets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                message = ExportTraceServiceRequest.FromString(body)
                for batch in message.resource_spans:
                    collector.resources.append({a.key: value(a.value) for a in batch.resource.attributes})
                    for scope in batch.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def value(wire: AnyValue) -> Any:
    kind = wire.WhichOneof("value")
    return [value(v) for v in wire.array_value.values] if kind == "array_value" else getattr(wire, str(kind))


@contextmanager
def collected() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


def test_a_span_for_each_request() -> None:
    with collected() as collector:
        process = Process("--kv-memory", "16MiB", "--otlp-endpoint", collector.url, stop_after=100)
        try:
            before = time.time_ns()
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            body = {"prompt": ["import os\n", "def f():"], "max_tokens": 8, "ignore_eos": True, "temperature": 0.5, "seed": 1}
            usage = http.post(process.url + COMPLETIONS, json=body, headers=headers).json()["usage"]
            after = time.time_ns()
            assert http.post(process.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 2, "n": 2}).status_code == 200
            with raw_request(process.port, COMPLETIONS, {"prompt": "b", "max_tokens": 2000, "stream": True, "ignore_eos": True}) as gone:
                assert gone.recv(1)
                engine = process.wait_stopped()
            os.kill(engine, signal.SIGCONT)
            wait_clean(process.url)
            code, err = process.stop()  # sends what it still has
            assert (code, err) == (0, "")
        finally:
            process.kill()
        assert all(resource["service.name"] == "quire" for resource in collector.resources)
        spans = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
        assert len(spans) == 4
        first, second, other, gone_span = spans
        for span in (first, second):
            assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
            assert span.kind == Span.SPAN_KIND_SERVER
            assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= after
            assert [event.name for event in span.events] == ["first_token"]
            assert span.start_time_unix_nano <= span.events[0].time_unix_nano <= span.end_time_unix_nano
        assert other.trace_id.hex() != TRACE
        assert not other.parent_span_id
        said = [{a.key: value(a.value) for a in span.attributes} for span in spans]
        assert said[0]["gen_ai.usage.input_tokens"] + said[1]["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        for attributes in said[:2]:
            assert attributes["gen_ai.request.model"] == "embedded"
            assert attributes["gen_ai.usage.output_tokens"] == 8
            assert attributes["gen_ai.request.temperature"] == 0.5
            assert attributes["gen_ai.request.max_tokens"] == 8
            assert attributes["gen_ai.response.finish_reasons"] == ["length"]
            parts = [attributes[f"gen_ai.latency.time_in_{part}"] for part in ("queue", "model_prefill", "model_decode")]
            assert all(part >= 0 for part in parts)
            assert sum(parts) <= attributes["gen_ai.latency.e2e"] + 1e-6
            assert attributes["gen_ai.latency.time_to_first_token"] <= attributes["gen_ai.latency.e2e"]
        assert (said[2]["gen_ai.request.n"], said[2]["gen_ai.usage.num_sequences"]) == (2, 2)
        assert said[3]["gen_ai.response.finish_reasons"] == ["abort"]
        assert gone_span.status.code == Status.STATUS_CODE_UNSET


def test_a_collector_that_never_answers_holds_up_nobody() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        process = Process("--kv-memory", "16MiB", "--otlp-endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        try:
            for _ in range(20):
                assert http.post(process.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).status_code == 200
            code, err = process.stop()
            assert code == 0
            assert "Traceback" not in err
            assert "traces could not be sent" in err
        finally:
            process.kill()


def test_lost_traces_are_a_line_in_the_log() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1/traces"
        process = Process("--kv-memory", "16MiB", "--otlp-endpoint", endpoint)
        try:
            assert http.post(process.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).status_code == 200
            assert process.process.stderr is not None
            line = process.process.stderr.readline()
            assert f"1 traces could not be sent to {endpoint}, and are lost" in line
        finally:
            process.kill()


def test_what_is_no_url_is_refused_at_once() -> None:
    code, _, err = run("--otlp-endpoint", "localhost:4317")
    assert code == 2
    assert "http://localhost:4318/v1/traces" in one_line(err)
