"""Quantized checkpoints from end to end: what they answer, and from the cache of packed weights."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("quire.backends.cpu._native")

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.errors import ConfigError
from quire.models.weights import resolve_model
from quire.models.weights.packed import PackedWeight
from sample_packed import packed_folder

GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
PROMPTS = ["def fibonacci(n):\n", "import os\n\n\ndef main() -> None:\n", "class Stack:\n    def __init__(self):"]

Answers = list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made, source = tmp_path_factory.mktemp("packed"), resolve_model("embedded")
    return {
        "awq": packed_folder(source, made / "awq", "awq", group=64),
        "gptq": packed_folder(source, made / "gptq", "gptq", group=64),
        "gptq-v2": packed_folder(source, made / "gptq-v2", "gptq-v2", group=64),
        "centred": packed_folder(source, made / "centred", "pack-quantized", group=64),
        "not-centred": packed_folder(source, made / "not-centred", "pack-quantized", group=64, symmetric=False),
        "int8": packed_folder(source, made / "int8", "int-quantized", bits=8, group=0),
    }


def answers(model: Path, **options: Any) -> Answers:
    llm = LLM(model, kv_memory="16MiB", **options)
    outputs = [each.outputs[0] for each in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    return [(each.token_ids, [next(iter(step.values())).logprob for step in each.logprobs or []]) for each in outputs]


def test_one_model_in_several_formats(folders: dict[str, Path]) -> None:
    """The same numbers, scales and zeros give the same bytes, however they are packed."""
    assert answers(folders["awq"]) == answers(folders["gptq-v2"]) == answers(folders["not-centred"])
    assert answers(folders["gptq"]) == answers(folders["centred"])
    for name, kinds in (("awq", {("int4", 64, True)}), ("gptq", {("int4", 64, False)}), ("int8", {("int8", 0, False)})):
        backend = LLM(folders[name], kv_memory="16MiB").backend
        found = {(p.dtype, p.group_size, p.offsets) for layer in backend.decoder.layers for p in (*layer.qkv.parts, *layer.mlp.up.parts)}
        assert found == kinds
        assert [part.dtype for part in backend.decoder.lm_head.parts] == ["int8"]
    assert LLM(folders["awq"], kv_memory="16MiB").backend.weight_note.startswith("int4 and int8 as the file has them: 4 MB")


@pytest.mark.parametrize("name", ["awq", "gptq", "int8"])
def test_nearly_what_floats_say(folders: dict[str, Path], name: str) -> None:
    """Only activations are rounded, to 8 bits."""
    stored, floats = (answers(folders[name], quantize=how) for how in ("stored", "none"))
    for (tokens, logprobs), (others, expected) in zip(stored, floats, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
        assert same >= 1
        assert logprobs[:same] == pytest.approx(expected[:same], abs=0.3)


def test_cache_of_packed_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = answers(folders["awq"])
    assert answers(folders["awq"], cache_dir=str(tmp_path)) == plain
    (packed,) = tmp_path.glob("*.packed")
    written = packed.stat().st_mtime_ns
    assert answers(folders["awq"], cache_dir=str(tmp_path)) == plain
    assert packed.stat().st_mtime_ns == written


def test_a_cache_is_not_taken_for_numbers_that_are_read_otherwise(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(folders["gptq-v2"], folder)
    config = json.loads((folder / "config.json").read_text())
    wrong = config | {"quantization_config": config["quantization_config"] | {"checkpoint_format": "gptq"}}
    (folder / "config.json").write_text(json.dumps(wrong))
    assert answers(folder, cache_dir=str(tmp_path / "cache")) != answers(folders["gptq-v2"])
    (folder / "config.json").write_text(json.dumps(config))
    assert answers(folder, cache_dir=str(tmp_path / "cache")) == answers(folders["gptq-v2"])
    assert "was made with other options: it is made again" in caplog.text


def test_nothing_is_kept_of_what_weights_were_made_from(folders: dict[str, Path]) -> None:
    decoder = LLM(folders["awq"], kv_memory="16MiB").backend.decoder
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, PackedWeight)], decoder


def test_the_benchmark_names_the_limit_of_what_is_multiplied(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--requests", "2", "--prompt-mean", "8", "--output-mean", "4", "--kv-memory", "32MiB"]
    assert main(["bench", "throughput", str(folders["awq"]), *lengths]) == 0
    assert "GOP/s   int8, measured" in capsys.readouterr().out
    assert main(["bench", "throughput", str(folders["awq"]), "--quantize", "none", *lengths]) == 0
    assert "GFLOP/s   float32, measured" in capsys.readouterr().out


def test_other_widths(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert LLM(folders["awq"], kv_memory="16MiB", quantize="int8").backend.weight_note.startswith("int8 with one scale for each output")
    with pytest.raises(ConfigError, match="--group-size 32 is for"):
        LLM(folders["awq"], kv_memory="16MiB", group_size=32)
    with pytest.raises(ConfigError, match="--quantize stored keeps weights as a quantized file has them, and this model's are not"):
        LLM("embedded", kv_memory="16MiB", quantize="stored")
    assert main(["plan", str(folders["awq"]), "--kv-memory", "32MiB"]) == 0
    assert "int4 and int8, and bfloat16 for what is no linear" in capsys.readouterr().out
