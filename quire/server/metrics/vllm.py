"""The metrics under the names of vLLM, with its label ``model_name``: what routers, autoscalers and dashboards look for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from quire.server.metrics.families import Metric, Value

ALIASES = (
    ("num_requests_running", "quire_sequences_running"),
    ("num_requests_waiting", "quire_sequences_waiting"),
    ("kv_cache_usage_perc", "quire_kv_usage_ratio"),
    ("gpu_cache_usage_perc", "quire_kv_usage_ratio"),  # vLLM's name until 2025, which production-stack reads
    ("prefix_cache_queries", "quire_prompt_tokens"),
    ("prefix_cache_hits", "quire_prompt_tokens_cached"),
    ("gpu_prefix_cache_queries", "quire_prompt_tokens"),
    ("gpu_prefix_cache_hits", "quire_prompt_tokens_cached"),
    ("prompt_tokens", "quire_prompt_tokens"),
    ("prompt_tokens_cached", "quire_prompt_tokens_cached"),
    ("generation_tokens", "quire_generation_tokens"),
    ("request_success", "quire_requests_finished"),
    ("estimated_flops_per_gpu", "quire_flops"),
    ("estimated_read_bytes_per_gpu", "quire_read_bytes"),
    ("time_to_first_token_seconds", "quire_time_to_first_token_seconds"),
    ("inter_token_latency_seconds", "quire_inter_token_latency_seconds"),
    ("time_per_output_token_seconds", "quire_inter_token_latency_seconds"),  # vLLM's name until 2025
    ("request_time_per_output_token_seconds", "quire_request_time_per_output_token_seconds"),
    ("e2e_request_latency_seconds", "quire_request_seconds"),
    ("request_queue_time_seconds", "quire_request_queue_seconds"),
    ("request_prefill_time_seconds", "quire_request_prefill_seconds"),
    ("request_decode_time_seconds", "quire_request_decode_seconds"),
    ("request_inference_time_seconds", "quire_request_inference_seconds"),
    ("request_prompt_tokens", "quire_request_prompt_tokens"),
    ("request_generation_tokens", "quire_request_generation_tokens"),
    ("request_params_n", "quire_request_samples"),
    ("request_params_max_tokens", "quire_request_max_tokens"),
    ("request_num_preemptions", "quire_request_preemptions"),
)
"""(name after ``vllm:``, the metric that it is)"""


def aliases(metrics: Iterable[Metric], model: str) -> Iterator[Metric]:
    """Those of ``metrics`` that vLLM has a name for."""
    known = {metric.name: metric for metric in metrics}
    label = {"model_name": model}
    for name, ours in ALIASES:
        if (metric := known.get(ours)) is not None:
            samples: list[tuple[dict[str, str], Value]] = [({**label, **labels}, value) for labels, value in metric.samples]
            yield Metric(metric.kind, f"vllm:{name}", metric.help, [*samples])
    if "quire_preemptions" in known:
        total = sum(_values(known["quire_preemptions"]).values())
        yield Metric("counter", "vllm:num_preemptions", known["quire_preemptions"].help, [(label, total)])
        (size,), (blocks,) = (_values(known[name]).values() for name in ("quire_kv_block_tokens", "quire_kv_pool_blocks"))
        sizes = {"block_size": f"{size:g}", "num_gpu_blocks": f"{blocks:.0f}"}
        yield Metric("gauge", "vllm:cache_config_info", "1; the labels say how the KV pool is cut", [({**label, **sizes}, 1.0)])
    refused = _values(known["quire_requests_rejected"]).get("queue_full", 0.0)
    yield Metric("counter", "vllm:admission_rejections", "requests that were refused since too many waited", [(label, refused)])


def _values(metric: Metric) -> dict[str, float]:
    """The last label's value → the sample's."""
    return {(list(labels.values()) or [""])[-1]: value for labels, value in metric.samples if isinstance(value, int | float)}
