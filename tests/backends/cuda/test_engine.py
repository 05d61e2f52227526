"""The whole engine on ``--device torch-cpu``, or on a GPU (see conftest.py), against what transformers and the CPU backend say."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import running
from quire.backends.cuda import steps
from quire.backends.cuda.graphs import Graphs
from quire.backends.memory import kv_layout
from quire.core.sequence import Request
from quire.models.weights import load_model, load_spec, resolve_model
from quire.sampling_params import SamplingParams

GOLDEN = sorted(folder.parent for folder in (Path(__file__).parents[2] / "fixtures" / "golden").glob("*/golden.npz"))
GROUPED = [folder for folder in GOLDEN if folder.name in ("gemma3", "gpt-oss", "qwen2-windows")]
"""Some of their layers have a window."""
TORCH: dict[str, Any] = {"device": "torch-cpu", "dtype": "float32", "kv_dtype": "float32", "block_size": 16, "kv_debug": True}
OTHER: dict[str, Any] = {"dtype": "float32"} if find_spec("quire.backends.cpu._native") else {**TORCH}
"""Whom it is compared with: the CPU backend, or where that is not built, this one on a CPU."""
if os.environ.get("QUIRE_TEST_DEVICE") == "cuda":
    TORCH |= {"device": "cuda", "max_num_seqs": 16}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def golden(folder: Path) -> tuple[list[int], list[int]]:
    with np.load(folder / "golden.npz") as arrays:
        return arrays["prompt"].tolist(), arrays["tokens"].tolist()


def greedy(name: str, prompt: list[int], count: int) -> Request:
    return Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), seed=0, eos_token_ids=())


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 5, "block_size": 4}, {"speculation": "prompt-lookup", "block_size": 64}, {"cuda_graphs": False}],
    ids=str,
)
def test_greedy_tokens(folder: Path, options: dict[str, Any]) -> None:
    """Chunks and prefix hits too: two more of the same prompt, and one that goes on where the answer ends."""
    prompt, tokens = golden(folder)
    engine = running.open_engine(folder, **{**TORCH, **options})
    found = running.run(engine, [greedy(name, prompt, len(tokens)) for name in "abc"])
    assert all(found.outputs[name, 0].token_ids == tokens for name in "abc")
    half = len(tokens) // 2
    found = running.run(engine, [greedy("d", prompt + tokens[:half], len(tokens) - half)])
    assert found.outputs["d", 0].token_ids == tokens[half:]


class Counted:
    """A linear that notes how many rows it is given."""

    def __init__(self, linear: Any) -> None:
        self.linear, self.rows = linear, []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return self.linear(x)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        self.rows.append(len(x))
        return self.linear.gated(x, activation)


def test_the_last_layer_ends_for_those_who_are_asked_for() -> None:
    """A prompt of 40 in chunks of 16: one position of the last chunk, and none of the others, goes beyond its attention."""
    engine = running.open_engine(GOLDEN[0].parent / "gemma3", **{**TORCH, "max_num_batched_tokens": 16, "cuda_graphs": False})
    first, *_, last = engine.backend.decoder.layers
    first.mlp.up, last.mlp.up = Counted(first.mlp.up), Counted(last.mlp.up)
    running.run(engine, [greedy("a", list(range(1, 41)), 1)])
    assert (first.mlp.up.rows, last.mlp.up.rows) == ([16, 16, 8], [1])


@pytest.mark.parametrize("swap", ["0", "1MiB"])
@pytest.mark.parametrize("folder", [folder for folder in GOLDEN if folder.name in ("gpt2", "granitemoe")], ids=lambda folder: folder.name)
def test_preemption(folder: Path, swap: str) -> None:
    """Four copies in a pool that holds two of them at their full length."""
    prompt, tokens = golden(folder)
    length = len(prompt) + len(tokens)
    memory = 2 * (-(-length // 8)) * 8 * load_spec(folder).kv_bytes_per_token("float32")
    options = {**TORCH, "block_size": 8, "kv_memory": str(memory), "max_model_len": length, "swap_memory": swap, "admission": "watermark"}
    engine = running.open_engine(folder, **options)
    done = running.run(engine, [greedy(name, prompt, len(tokens)) for name in "abcd"], preempt_every=5)
    assert done.stats.preemptions > 0
    assert all(done.outputs[name, 0].token_ids == tokens for name in "abcd")


@pytest.mark.parametrize("folder", GROUPED, ids=lambda folder: folder.name)
@pytest.mark.parametrize("options", [{}, {"swap_memory": "1MiB"}, {"cuda_graphs": False}, {"speculation": "prompt-lookup"}], ids=str)
def test_blocks_that_windows_left_are_handed_out_again(folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four copies in a pool that could not hold one, did the windowed groups keep their blocks; now two of them are there at a time, and
    make way for the others."""
    replays: list[Any] = []
    replay = Graphs.replay

    def watched(self: Graphs, key: tuple[int, bool]) -> Any:
        replays.append(key)
        return replay(self, key)

    monkeypatch.setattr(Graphs, "replay", watched)
    prompt, tokens = golden(folder)
    length, spec = len(prompt) + len(tokens), load_spec(folder)
    layout, fixed = kv_layout(spec, length, 4), {"block_size": 4, "max_model_len": length, "max_num_batched_tokens": 8}
    blocks = layout.groups.blocks(length, 4, 8) * 3 // 2
    assert layout.groups.full * layout.groups.windowed > 0
    assert blocks < layout.groups.width * -(-length // 4)
    memory = blocks * 4 * layout.slots * spec.layer_kv_bytes("float32")
    engine = running.open_engine(folder, **{**TORCH, **fixed, "kv_memory": str(memory), "admission": "watermark", **options})
    assert engine.backend.groups == layout.groups
    assert engine.backend.num_blocks == blocks
    done = running.run(engine, [greedy(name, prompt, len(tokens)) for name in "abcd"], preempt_every=7)
    assert done.stats.preemptions > 0
    assert all(done.outputs[name, 0].token_ids == tokens for name in "abcd")
    assert bool(replays) == ("cuda_graphs" not in options)


def test_a_step_that_brings_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of many known tokens, of which one is computed: their cache is whole."""
    monkeypatch.setattr(steps, "STAGING", 4096)
    prompt = [7 + i % 50 for i in range(1500)]
    engine = running.open_engine("embedded", **{**TORCH, "max_num_batched_tokens": 256, "max_num_seqs": 4})
    found = [running.run(engine, [greedy(name, prompt, 6)]).outputs[name, 0].token_ids for name in "abc"]  # the others find all of it
    assert found[0] == found[1] == found[2]


SAMPLED = [
    SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, n=3, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.0, use_beam_search=True, n=3, max_tokens=8),
    SamplingParams(temperature=0.0, max_tokens=12, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2, logprobs=3),
    SamplingParams(temperature=1.0, max_tokens=6, min_tokens=5, logit_bias={3: 4.0, 7: -9.0}, stop_token_ids=[5, 6], prompt_logprobs=2),
]
CONSTRAINED = [SamplingParams(temperature=1.0, max_tokens=6, allowed_token_ids=[3, 4, 5, 20, 90], ignore_eos=True, logprobs=0)]


@pytest.mark.parametrize("folder", [*GOLDEN, "embedded"], ids=lambda folder: getattr(folder, "name", folder))
def test_every_parameter_as_on_the_cpu_backend(folder: Path | str) -> None:
    """All at once, in chunks: the same tokens, and the same log-probabilities up to rounding."""
    text = folder == "embedded"
    prompt = list(range(100, 141)) if isinstance(folder, str) else golden(folder)[0]
    each = SAMPLED + CONSTRAINED if text else SAMPLED
    requests = [Request(f"{i}", prompt[i:], params, seed=i, eos_token_ids=(2,)) for i, params in enumerate(each)]
    options = {"kv_dtype": "float32", "block_size": 8, "max_num_batched_tokens": 24, "constrained": text}
    here = running.run(running.open_engine(folder, **{**TORCH, **options}), requests).outputs
    there = running.run(running.open_engine(folder, **{**OTHER, **options}), requests).outputs
    assert here.keys() == there.keys()
    for key, expected in there.items():
        found = here[key]
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason), key
        assert_close(found.logprobs, expected.logprobs)
        assert_close(found.prompt_logprobs or [], expected.prompt_logprobs or [])


def assert_close(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.allclose([value for _, value in flat(one)], [value for _, value in flat(other)], atol=1e-4)
        assert [kind for kind, _ in flat(one)] == [kind for kind, _ in flat(other)]


def flat(value: Any) -> list[tuple[Any, float]]:
    """(what must be equal, what must be close) of nested tuples."""
    if isinstance(value, float):
        return [(None, value)]
    if isinstance(value, int | None):
        return [(value, 0.0)]
    return [pair for each in value for pair in flat(each)]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_dtype": "int8"}, {"kv_dtype": "fp8"}, {"quantize": "int8"}, {"quantize": "fp8"}, {"dtype": "bfloat16", "kv_dtype": "bfloat16"},
        {"dtype": "float16", "kv_dtype": "fp8", "quantize": "int8", "swap_memory": "1MiB"},
    ],
    ids=str,
)  # fmt: skip
def test_narrower_numbers_are_close(options: dict[str, Any]) -> None:
    """Log-probabilities of a prompt, by rounded weights and a rounded cache: no further off than rounding explains."""
    prompt = list(range(100, 160))
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    exact, found = (
        running.run(running.open_engine("embedded", **{**TORCH, **each}), [Request("a", prompt, params, 0, ())]).outputs["a", 0]
        for each in ({}, options)
    )
    off = [abs(a[0] - b[0]) for a, b in zip(exact.prompt_logprobs or [], found.prompt_logprobs or [], strict=True)]
    assert max(off) < 1.0
    assert sum(off) / len(off) < (0.25 if "fp8" in options.values() else 0.12)  # e4m3 has 3 bits behind the point


MIXTURE = GOLDEN[0].parent / "granitemoe"


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantized_experts_are_close(quantize: str) -> None:
    """And the router is what it was."""
    prompt, _ = golden(MIXTURE)
    request = Request("a", prompt, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), 0, ())
    exact, narrow = (running.open_engine(MIXTURE, **TORCH, quantize=each) for each in (None, quantize))
    expected, found = (running.run(each, [request]).outputs["a", 0].prompt_logprobs or [] for each in (exact, narrow))
    off = [abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True)]
    assert 0 < sum(off) / len(off) < (0.5 if quantize == "fp8" else 0.1)
    one, other = exact.backend.decoder, narrow.backend.decoder
    assert other.layers[0].mlp.up.element_size() == other.layers[0].mlp.down.element_size() == 1
    assert torch.equal(one.layers[0].mlp.router.weight, other.layers[0].mlp.router.weight)


def test_scores_that_are_corrected_are_not_rounded() -> None:
    """Whatever width other weights have; and corrections are what the file has."""
    folder = MIXTURE.parent / "ernie4-5-moe"
    engine = running.open_engine(folder, **TORCH | {"dtype": "bfloat16"})
    first, second, _ = engine.backend.decoder.layers
    assert first.mlp.up.weight.dtype == second.mlp.up.dtype == second.mlp.shared.up.weight.dtype == torch.bfloat16
    tensors = load_model(folder).tensors
    assert torch.equal(second.mlp.router.weight, torch.tensor(tensors["layers.1.router.weight"]))
    assert torch.equal(second.mlp.choice.correction, torch.tensor(tensors["layers.1.correction.bias"]))
    prompt, tokens = golden(folder)
    found = running.run(engine, [greedy("a", prompt, 8)]).outputs["a", 0].token_ids
    assert found[0] == tokens[0]


@pytest.mark.parametrize("folder", [MIXTURE, MIXTURE.parent / "glm4-moe"], ids=lambda folder: folder.name)
def test_what_experts_take(folder: Path) -> None:
    """Bytes, all experts', of what a step reads; shared ones are always read."""
    spec = load_spec(folder)
    shapes = {name: shape for name, shape in spec.tensor_shapes().items() if len(shape) == 2}
    experts = sum(n * k for name, (n, k) in shapes.items() if ".experts." in name)
    floats = running.open_engine(folder, **TORCH).backend
    assert floats.expert_bytes() == 4 * experts
    biases = sum(n for name, (n, *_) in spec.tensor_shapes().items() if name.endswith((".q.bias", ".k.bias", ".v.bias")))
    linears = [n * k for name, (n, k) in shapes.items() if spec.tied or name != "embed.weight"]
    assert floats.weight_bytes() == 4 * (sum(linears) + biases)
    scales = sum(n for name, (n, _) in shapes.items() if ".experts." in name)
    assert running.open_engine(folder, **TORCH, quantize="int8").backend.expert_bytes() == experts + 4 * scales
    assert running.open_engine("embedded", **TORCH).backend.expert_bytes() == 0


def test_vectors_as_on_the_cpu_backend() -> None:
    prompt = list(range(100, 160))
    for pooling in ("mean", "last"):
        request = Request("a", prompt, SamplingParams(max_tokens=0), 0, (), pooling=pooling)
        here, there = (
            running.run(running.open_engine("embedded", **options), [request]).outputs["a", 0].vector
            for options in ({**TORCH, "max_num_batched_tokens": 17}, {**OTHER, "kv_dtype": "float32"})
        )
        assert here is not None
        assert there is not None
        assert np.allclose(here, there, atol=1e-4)


@pytest.mark.parametrize("taken_by", ["text", "vector", "priority"])
def test_a_vector_whose_row_was_taken_while_a_step_was_on_its_way(taken_by: str) -> None:
    """A prompt for a vector loses its row with a chunk in flight: to another request for text, or for a vector, or by priority."""
    prompt, other = list(range(100, 180)), list(range(300, 340))

    def vector(name: str, tokens: list[int], priority: int = 0) -> Request:
        return Request(name, tokens, SamplingParams(max_tokens=0), seed=0, eos_token_ids=(), pooling="mean", priority=priority)

    def results(engine: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while engine.has_work:
            for output in engine.step():
                if output.vector is not None:
                    found[output.request_id] = output.vector
                elif output.token_ids:
                    found.setdefault(output.request_id, []).extend(output.token_ids)
        return found

    options = {**TORCH, "max_num_batched_tokens": 32, "max_num_seqs": 1, "cuda_graphs": False}
    second = vector("b", other) if taken_by == "vector" else greedy("b", other, 4)
    engine = running.open_engine("embedded", **options)
    engine.add(second)
    expected = results(engine)
    if taken_by == "priority":
        engine.add(vector("a", prompt))
        expected |= results(engine)
    engine = running.open_engine("embedded", **options)
    engine.add(vector("a", prompt, priority=1))
    engine.step()
    if taken_by != "priority":
        engine.abort("a")
    engine.add(second)
    assert results(engine) == expected


@pytest.mark.parametrize("graphs", [True, False])
def test_rows_beside_one_that_guesses(graphs: bool) -> None:
    """Those without a draft are planned into the next step before this one's tokens are read."""
    prompt = list(range(100, 140))
    allowed = SamplingParams(max_tokens=24, temperature=0.0, allowed_token_ids=list(range(3, 4000)), ignore_eos=True)
    drawn = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, presence_penalty=0.5, min_tokens=20)
    requests = [Request("c", prompt, allowed, seed=0, eos_token_ids=())]
    requests += [Request(f"{i}", prompt[i:], drawn, seed=i, eos_token_ids=(2,)) for i in range(4)]
    options = {**TORCH, "max_num_seqs": 8, "cuda_graphs": graphs}
    expected = running.run(running.open_engine("embedded", constrained=True, **options), requests).outputs
    engine = running.open_engine("embedded", constrained=True, speculation="prompt-lookup", **options)
    found = running.run(engine, requests, outputs_to_guess=expected)
    assert found.stats.tokens_accepted > 0
    assert {key: output.token_ids for key, output in found.outputs.items()} == {key: output.token_ids for key, output in expected.items()}


def test_captured_steps_fit_their_scratch() -> None:
    """52 sequences of 932 positions that share 832, in a pool that would not hold them apart: a step of 56 has more splits than one of 64
    has by the pool's size."""
    block = load_spec(resolve_model("embedded")).kv_bytes_per_token("float32") * 64
    options = {**TORCH, "block_size": 64, "max_num_seqs": 64, "kv_memory": str(block * 252), "max_model_len": 1200, "kv_debug": False}
    engine = running.open_engine("embedded", **options)
    made = engine.backend._steps
    for size in range(1, 65):
        assert made.capacity(size) <= made.scratch.capacity
    sent = made.send_padded
    splits = []

    def watched(arrays: Any, updates: Any, size: int) -> Any:
        step, samples = sent(arrays, updates, size)
        splits.extend((int(tiles.count), tiles.scratch.capacity) for tiles in step.decode_tiles.values())
        return step, samples

    made.send_padded = watched
    common = [100 + i % 400 for i in range(832)]
    running.run(engine, [greedy("first", common, 1)])
    running.run(engine, [greedy(f"{i}", [*common, *[500 + i] * 100], 4) for i in range(52)])
    assert splits
    assert all(count <= capacity for count, capacity in splits)
