"""Quantized checkpoints on the CUDA backend, in PyTorch on a CPU: floats are made of them, or numbers of 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.models.weights import resolve_model
from sample_packed import packed_folder

GREEDY = SamplingParams(temperature=0, max_tokens=16)
PROMPTS = ["def fibonacci(n):\n", "import os\n\n\ndef main() -> None:\n"]


@pytest.mark.parametrize(("method", "options"), [
    ("awq", {"group": 64}), ("gptq", {"group": 64}), ("pack-quantized", {"group": 64}), ("int-quantized", {"bits": 8, "group": 0}),
])  # fmt: skip
def test_the_same_tokens_as_on_the_other_backend(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    folder = packed_folder(resolve_model("embedded"), tmp_path / "m", method, **options)
    found = LLM(folder, device="torch-cpu", dtype="float32", kv_memory="16MiB").generate(PROMPTS, GREEDY, use_tqdm=False)
    other = LLM(folder, quantize="none", dtype="float32", kv_dtype="float32", kv_memory="16MiB").generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [each.outputs[0].token_ids for each in found] == [each.outputs[0].token_ids for each in other]


def test_quantized_again(tmp_path: Path) -> None:
    folder = packed_folder(resolve_model("embedded"), tmp_path / "m", "gptq", group=64)
    assert LLM(folder, device="torch-cpu", kv_memory="16MiB", quantize="int8").backend.weight_note.startswith("int8")
