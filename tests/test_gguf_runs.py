"""GGUF files from end to end: the offline API, a server, the planner, the cache of packed weights."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("quire.backends.cpu._native")

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.errors import ModelLoadError
from sample_gguf import embedded_gguf, tiny_fields, tiny_tensors, write_gguf

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, no package

from serving_process import serving

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gguf")
    for kind in ("F32", "Q8_0", "Q4_0", "mixed"):
        embedded_gguf(made / f"code.{kind}.gguf", kind)
    return made


def prompts() -> list[Any]:
    tokenizer = LLM("embedded", kv_memory="16MiB").tokenizer
    texts = ["def fibonacci(n):\n", "import os\n\n\ndef main() -> None:\n", "class Stack:\n    def __init__(self):"]
    return [{"prompt_token_ids": tokenizer.encode(text)} for text in texts]


def tokens(model: str | Path, **options: Any) -> list[list[int]]:
    llm = LLM(model, kv_memory="16MiB", **options)
    return [output.outputs[0].token_ids for output in llm.generate(prompts(), GREEDY, use_tqdm=False)]


def test_the_same_tokens_as_from_the_folder(folder: Path) -> None:
    expected = tokens("embedded", dtype="float32")
    assert tokens(folder / "code.F32.gguf") == expected
    assert tokens(folder / "code.F32.gguf", quantize="int8") == tokens("embedded", dtype="float32", quantize="int8")
    similar = tokens(folder / "code.Q8_0.gguf", quantize="none", dtype="float32")
    assert sum(a == b for a, b in zip(similar, expected, strict=True)) >= 2  # 8 bits make no other program of it


def test_what_a_file_is_quantized_to(folder: Path) -> None:
    for kind, note in (("Q8_0", "int8 with one scale for each output"), ("Q4_0", "int4 as the file has them: 3 MB"),
                       ("mixed", "int4 and int8 as the file has them: 4 MB"), ("F32", "")):  # fmt: skip
        assert LLM(folder / f"code.{kind}.gguf", kv_memory="16MiB").backend.weight_note.startswith(note)
    stated = LLM(folder / "code.Q8_0.gguf", kv_memory="16MiB", quantize="int4", group_size=64)
    assert stated.backend.weight_note.startswith("int4 in groups of 64")
    assert LLM(folder / "code.Q8_0.gguf", kv_memory="16MiB", quantize="none").backend.weight_note == ""


def test_a_file_of_several_kinds(folder: Path) -> None:
    """Each linear is what the file has it in, and says nearly what floats say."""
    path = folder / "code.mixed.gguf"
    decoder = LLM(path, kv_memory="16MiB").backend.decoder
    for layer in decoder.layers:
        assert [(part.dtype, part.offsets, part.n) for part in layer.qkv.parts] == [("int4", True, 384), ("int8", False, 128)]
        assert [(part.dtype, part.offsets, part.gated) for part in layer.mlp.up.parts] == [("int4", True, True)]
        assert [(part.dtype, part.group_size) for part in layer.mlp.down.parts] == [("int4", 32)]
    assert [part.dtype for part in decoder.lm_head.parts] == ["int8"]
    stored, floats = tokens(path), tokens(path, quantize="none", dtype="float32")
    same = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), 24) for x, y in zip(stored, floats, strict=True)]
    assert sum(same) >= 48, same
    batches = [tokens(path, max_num_seqs=seqs) for seqs in (1, 2, 3)]
    assert batches == [stored] * 3


def test_gate_and_up_of_two_kinds(tmp_path: Path) -> None:
    """Are multiplied by each other, and so become one linear: of int8."""
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_tensors(), "Q4_0", other={"ffn_up": "Q4_1"})
    decoder = LLM(path, kv_memory="1MiB").backend.decoder
    assert [(part.dtype, part.gated) for part in decoder.layers[0].mlp.up.parts] == [("int8", True)]
    assert [(part.dtype, part.offsets) for part in decoder.layers[0].mlp.down.parts] == [("int4", False)]


def test_cache_of_packed_weights(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Found by the next start, made again when the file has changed."""
    model, cache = tmp_path / "a.gguf", tmp_path / "cache"
    model.write_bytes((folder / "code.mixed.gguf").read_bytes())
    plain = tokens(model)
    assert tokens(model, cache_dir=str(cache)) == plain
    (packed,) = cache.glob("*.packed")
    assert packed.name.startswith("a.gguf-")
    written = packed.stat().st_mtime_ns
    assert tokens(model, cache_dir=str(cache)) == plain
    assert packed.stat().st_mtime_ns == written
    model.write_bytes((folder / "code.Q4_0.gguf").read_bytes())
    assert tokens(model, cache_dir=str(cache)) == tokens(model) != plain
    assert "is stale" in caplog.text
    model.write_bytes((folder / "code.Q8_0.gguf").read_bytes())
    assert tokens(model, cache_dir=str(cache), quantize="int4") == tokens(model, quantize="int4")
    assert len(list(cache.glob("*.packed"))) == 2


def test_a_server(folder: Path) -> None:
    with (
        serving(str(folder / "code.Q8_0.gguf"), "--kv-memory", "32MiB") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
    ):
        assert [model.id for model in client.models.list()] == ["code.Q8_0"]
        answer = client.completions.create(model="code.Q8_0", prompt="def add(a, b):\n", max_tokens=8, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}},
                "required": ["a"], "additionalProperties": False}}}  # fmt: skip
        formed = client.completions.create(
            model="code.Q8_0",
            prompt="x = ",
            max_tokens=64,
            temperature=0,
            extra_body={"structured_outputs": {"json": form["json_schema"]["schema"]}},
        )
        assert isinstance(json.loads(formed.choices[0].text)["a"], int)  # the workers that compile forms read the tokenizer, too
        with urllib.request.urlopen(f"{server.url}/api/tags") as tags:
            details = json.load(tags)["models"][0]["details"]
        assert (details["format"], details["quantization_level"]) == ("gguf", "int8")


def test_the_planner(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / "code.Q8_0.gguf"), "--kv-memory", "32MiB"]) == 0
    assert "int8, and float16 for what is no linear" in capsys.readouterr().out
    assert main(["plan", str(folder / "code.Q8_0.gguf"), "--machine", "h100"]) == 0
    assert "x 2 bytes" in capsys.readouterr().out  # on a GPU it is floats


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "a.gguf", tiny_fields("mamba"), {})
    with pytest.raises(ModelLoadError, match=r"the architecture 'mamba'; supported: .*gemma3"):
        LLM(file)
    assert main(["run", str(file), "-p", "x"]) != 0
    assert "the architecture 'mamba'" in capsys.readouterr().err
    whole = write_gguf(tmp_path / "b.gguf", tiny_fields(tokenizer__ggml__pre="what"), tiny_tensors())
    assert main(["run", str(whole), "-p", "x"]) != 0
    assert "cuts texts into words as 'what' does" in capsys.readouterr().err
