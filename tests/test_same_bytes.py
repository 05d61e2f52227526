"""Same bytes: a request's tokens and log-probabilities depend on model, prompt, parameters and seed, and on nothing else.

The same requests (greedy, sampled, several samples, beams; prompts that share beginnings) run under {block size} x {chunk
budget} x {batch mix} x {prefix cache cold, warm, off} x {admission policy} x {forced preemption, swapped or recomputed} x
{threads} x {speculation on, off, with guesses that are right up to anywhere}, on every instruction set that this machine has,
and are compared bit for bit with requests that run alone, with nothing guessed and nothing to be found in a cache. So do
quantized weights, on the other instruction sets under a part of it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import running
from quire.backends.cpu import _native as native
from quire.core.sequence import Request
from quire.models.weights import resolve_model
from quire.sampling_params import SamplingParams
from sample_gguf import embedded_gguf

FIXTURES = Path(__file__).parent / "fixtures" / "golden"
MODELS = ["embedded", "mistral", "qwen3", "mixtral", "glm4-moe", "ernie4-5-moe", "gpt-oss", "gpt2", "opt"]
"""The embedded model, and tiny ones with a sliding window, head norms, experts (also with shared ones, and with a layer without),
attention sinks, learned positions and biases."""

VARIANTS: dict[str, dict[str, Any]] = {
    "all together": {},
    "three at a time": {"max_num_seqs": 3},
    "chunks of 1": {"max_num_batched_tokens": 1, "max_num_seqs": 3},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 33": {"max_num_batched_tokens": 33, "block_size": 4},
    "block size 4": {"block_size": 4},
    "block size 8": {"block_size": 8},
    "block size 32": {"block_size": 32, "max_num_batched_tokens": 50},
    "block size 128": {"block_size": 128},
    "one thread": {"threads": 1},
    "three threads": {"max_num_batched_tokens": 61},  # set_num_threads: --threads takes no more than the machine's cores
    "NaN in fresh blocks": {"kv_debug": True, "block_size": 16, "max_num_batched_tokens": 40},
    "no cache": {"prefix_caching": False},
    "no cache, block size 4": {"prefix_caching": False, "block_size": 4, "max_num_batched_tokens": 19},
    "no speculation": {"speculation": "off"},
}
WARM = ["all together", "chunks of 7", "block size 4", "block size 8", "block size 32", "block size 128", "NaN in fresh blocks"]
"""Run a second time on the same engine: everything is found, the last tokens of most prompts in partly matching blocks."""

SQUEEZED: dict[str, dict[str, Any]] = {
    "watermark": {"admission": "watermark"},
    "no-evict": {"admission": "no-evict"},
    "past-future": {"admission": "past-future"},
    "swap": {"admission": "watermark", "swap_memory": "64MiB"},
    "no cache": {"admission": "watermark", "prefix_caching": False},
    "swap, no cache, block size 4": {"admission": "watermark", "swap_memory": "64MiB", "prefix_caching": False, "block_size": 4},
    "NaN in fresh blocks": {"admission": "watermark", "kv_debug": True, "swap_memory": "1MiB"},
}
"""In a pool that holds just the largest request."""

GUESSED: dict[str, dict[str, Any]] = {
    "all together": {"speculation_positions": 64},
    "three at a time, block size 4": {"max_num_seqs": 3, "block_size": 4},
    "chunks of 7, NaN in fresh blocks": {"max_num_batched_tokens": 7, "kv_debug": True, "block_size": 8},
    "no cache": {"prefix_caching": False, "max_num_seqs": 3, "block_size": 32},
}
"""With drafts made from the reference: right, or wrong from some token on."""


POOL_TOKENS = 16_384
"""Several times what all requests need together: ``check()`` after each step looks at every block."""


def folder_of(model: str) -> Path:
    if model == "embedded":
        return resolve_model("embedded")
    found = sorted(FIXTURES.glob(f"{model}*"))
    assert found, f"no fixture for {model}"
    return found[0]


def requests_for(vocab_size: int, context: int, eos: tuple[int, ...]) -> list[Request]:
    """Greedy, sampled and searched requests of many lengths, with every sampling parameter in use somewhere."""
    rng = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "n": 2},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {3: 4.0, 5: -100.0}},
        {"temperature": 0.0, "min_tokens": 6, "logprobs": 0},
        {"temperature": 1.0, "n": 1, "best_of": 3},
        {"beam_width": 3, "n": 2, "length_penalty": 0.7, "max_tokens": 9, "logprobs": 0},
    ]
    shared = [rng.randrange(vocab_size) for _ in range(600)]
    requests = []
    for i in range(16):
        # One is longer than the positions after which attention merges partial results.
        length = min(600 if i == 3 else rng.choice([1, 2, 15, 16, 17, 40, 63, 64, 65, 130]), context - 40)
        prompt = [rng.randrange(vocab_size) for _ in range(length)]
        if i % 3 == 0:  # the same beginning, up to somewhere in a block
            common = max(1, length - i // 2)
            prompt[:common] = shared[:common]
        params = SamplingParams(**{"logprobs": 3, "max_tokens": rng.randrange(8, 24), **kinds[i % len(kinds)]})
        requests.append(Request(f"r{i}", prompt, params, seed=1000 + i, eos_token_ids=eos))
    requests.append(replace(requests[3], request_id="twin"))  # arrives with its equal
    return requests + scored(requests)


def scored(requests: list[Request]) -> list[Request]:
    """Requests for what the model says of prompts: of one whose beginning others share, with and without tokens to generate, with two
    samples that share it; and pooled. They compute what they score, whatever a cache holds."""
    nothing = SamplingParams(max_tokens=0)
    long, short = requests[3], requests[9]
    return [
        replace(long, request_id="scored", params=replace(long.params, prompt_logprobs=2, max_tokens=4)),
        replace(short, request_id="scored-twice", params=replace(short.params, n=2, best_of=None, prompt_logprobs=0)),
        replace(long, request_id="mean", params=nothing, pooling="mean"),
        replace(long, request_id="last", params=nothing, pooling="last"),
    ]


# The portable kernels are slow, and the small models take every path through them.
# With VNNI only the linears of quantized weights differ from those of AVX-512, with BF16 only those of bfloat16.
ISAS = [isa for isa in native.available_isas() if isa not in ("avx512vnni", "avx512bf16")]
PAIRS = [(model, isa) for model in MODELS for isa in ISAS if (model, isa) != ("embedded", "portable")]

QUICK = ["three at a time", "chunks of 7", "chunks of 33", "one thread", "three threads"]
PAIRED = next((isa for isa in native.available_isas() if isa == "avx512bf16"), native.available_isas()[0])
WIDTHS: list[tuple[str, str, dict[str, Any]]] = [
    *[(model, PAIRED, {"dtype": "bfloat16"}) for model in ("embedded", "opt-post-norm", "gemma3")],
    ("embedded", native.available_isas()[0], {"quantize": "int8"}),
    *[("embedded", isa, {"quantize": "int4"}) for isa in native.available_isas() if isa not in ("portable", "avx512bf16")],
    # Widths that are no multiple of anything.
    *[("opt-post-norm", isa, {"quantize": "int8"}) for isa in native.available_isas() if isa != "avx512bf16"],
]


@pytest.mark.parametrize(("model", "isa"), PAIRS)
def test_outputs_do_not_depend_on_anything_else(model: str, isa: str) -> None:
    compare(folder_of(model), isa, {}, list(VARIANTS), list(SQUEEZED))


@pytest.mark.parametrize(
    ("model", "isa", "options"), WIDTHS, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value
)
def test_nor_do_those_of_narrower_weights(model: str, isa: str, options: dict[str, Any]) -> None:
    # Blocks, caches and admission don't know what linears are made of: with int8 they are varied in full, on the best instruction set.
    whole = isa == native.available_isas()[0] and options == {"quantize": "int8"}
    compare(folder_of(model), isa, options, list(VARIANTS) if whole else QUICK, list(SQUEEZED) if whole else ["swap"])


@pytest.mark.parametrize("isa", [isa for isa in native.available_isas() if isa in (native.available_isas()[0], "avx2")])
def test_nor_do_those_of_a_quantized_file(tmp_path: Path, isa: str) -> None:
    """Its linears have several kinds, some with offsets, and some are two side by side."""
    compare(embedded_gguf(tmp_path / "a.gguf", "mixed"), isa, {}, QUICK, ["swap"])


def compare(folder: Path, isa: str, base: dict[str, Any], variants: list[str], squeezed: list[str]) -> None:
    """``base``: options that all runs share."""
    before = native.isa()
    native.set_isa(isa)
    try:
        engine = running.open_engine(folder, max_num_seqs=3, prefix_caching=False, speculation="off", **base)
        spec, context = engine.backend.spec, engine.limits.max_model_len
        base = base | {"kv_memory": str(min(16 << 20, POOL_TOKENS * spec.kv_bytes_per_token("float16")))}
        requests = requests_for(spec.vocab_size, context, spec.eos_token_ids)
        reference: dict[tuple[str, int], running.Output] = {}
        for request in requests:
            reference |= running.run(engine, [request]).outputs
        assert len(reference) == sum(r.params.n if r.params.use_beam_search else r.params.num_sequences for r in requests)
        for request in requests:
            found = reference[request.request_id, 0]
            assert (found.vector is not None) == (request.pooling is not None)
            if request.params.prompt_logprobs is not None:
                assert len(found.prompt_logprobs or ()) == len(request.prompt_token_ids) - 1

        for name in variants:
            engine = running.open_engine(folder, **base, **VARIANTS[name])
            if name == "three threads":
                native.set_num_threads(3)
            assert running.run(engine, requests).outputs == reference, name
            if name in WARM:
                cold = engine.stats().kv.counters.hit_tokens
                assert running.run(engine, requests).outputs == reference, f"{name}, warm"
                prompts = sum(len(r.prompt_token_ids) for r in requests if not r.scored())
                assert engine.stats().kv.counters.hit_tokens - cold > 0.9 * prompts or any(spec.windows)
        shuffled = random.Random(1).sample(requests, len(requests))
        assert running.run(running.open_engine(folder, **base), shuffled).outputs == reference, "another order of arrival"

        drafted = right = 0
        for name, options in GUESSED.items():
            engine = running.open_engine(folder, **base, **options)
            guessed = running.run(engine, requests, preempt_every=9, outputs_to_guess=reference)
            assert guessed.outputs == reference, f"guessed, {name}"
            drafted += guessed.stats.tokens_drafted
            right += guessed.stats.tokens_accepted
        assert 100 < right < 0.9 * drafted, "there were no guesses to speak of"

        longest = max(running.positions(r) for r in requests)
        for name in squeezed:
            options = {**base, **SQUEEZED[name]}
            tiny = -(-longest // 16) * 16 * spec.kv_bytes_per_token("float16")
            context = max(len(r.prompt_token_ids) + (r.params.max_tokens or 0) for r in requests)
            engine = running.open_engine(folder, **options | {"kv_memory": str(tiny), "max_model_len": context})
            run = running.run(engine, requests, preempt_every=5)
            assert run.outputs == reference, f"squeezed, {name}"
            assert run.stats.preemptions > 0
            assert run.stats.kv.counters.blocks_swapped_in > 0 or "swap_memory" not in options
    finally:
        native.set_isa(before)


KV_TYPES = [("qwen3", "bfloat16"), ("qwen3", "int8"), ("mistral", "int8"), ("embedded", "float32"), ("embedded", "int8")]


@pytest.mark.parametrize(("model", "kv_dtype"), KV_TYPES)
def test_whatever_the_cache_holds(model: str, kv_dtype: str) -> None:
    """The other KV types, under the variants in which blocks are filled, copied, found and swapped in other ways."""
    folder = folder_of(model)
    engine = running.open_engine(folder, max_num_seqs=3, prefix_caching=False, kv_dtype=kv_dtype)
    spec, context = engine.backend.spec, engine.limits.max_model_len
    requests = requests_for(spec.vocab_size, context, spec.eos_token_ids)
    reference: dict[tuple[str, int], running.Output] = {}
    for request in requests:
        reference |= running.run(engine, [request]).outputs
    for name in ("all together", "chunks of 33", "NaN in fresh blocks"):
        engine = running.open_engine(folder, **VARIANTS[name], kv_dtype=kv_dtype)
        for turn in ("cold", "warm"):
            assert running.run(engine, requests).outputs == reference, f"{name}, {turn}"
    tiny = -(-max(running.positions(r) for r in requests) // 16) * 16 * spec.kv_bytes_per_token(kv_dtype)
    context = max(len(r.prompt_token_ids) + (r.params.max_tokens or 0) for r in requests)
    options = {**SQUEEZED["swap"], "kv_memory": str(tiny), "max_model_len": context, "kv_dtype": kv_dtype}
    squeezed = running.run(running.open_engine(folder, **options), requests, preempt_every=5)
    assert squeezed.outputs == reference, "squeezed"
    assert squeezed.stats.kv.counters.blocks_swapped_in > 0


def test_a_seed_decides_and_only_where_it_should() -> None:
    engine = running.open_engine(folder_of("embedded"))
    prompt = [5, 6, 7]

    def tokens(seed: int, **params: Any) -> list[int]:
        request = Request("a", prompt, SamplingParams(max_tokens=12, ignore_eos=True, **params), seed)
        return running.run(engine, [request]).outputs[("a", 0)].token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(1, temperature=0.0) == tokens(2, temperature=0.0)
