"""GGUF files on the CUDA backend, in PyTorch on a CPU: the gguf library makes floats of what is quantized."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from quire import LLM, SamplingParams
from quire.models.weights import load_model
from sample_gguf import tiny_fields, tiny_tensors, write_gguf

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens(path: Path, **options: str) -> list[int]:
    llm = LLM(path, kv_memory="4MiB", dtype="float32", kv_dtype="float32", **options)
    return llm.generate({"prompt_token_ids": [1, 5, 9, 22, 7]}, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_the_tokens_of_the_cpu_backend(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_tensors(), kind)
    assert tokens(path, device="torch-cpu") == tokens(path, quantize="none")


def test_what_the_library_makes_is_what_the_kernels_make(tmp_path: Path) -> None:
    native = pytest.importorskip("quire.backends.cpu._native")
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_tensors(), "Q5_1")
    one, other = load_model(path), load_model(path, native.dequantize)
    for name, array in one.tensors.items():
        assert (array == other.tensors[name]).all(), name


def test_quantized_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_tensors(), "Q8_0")
    assert LLM(path, device="torch-cpu", kv_memory="4MiB").backend.weight_note == ""
    assert LLM(path, device="torch-cpu", kv_memory="4MiB", quantize="int8").backend.weight_note.startswith("int8")
