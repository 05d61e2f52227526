"""tools/make_model.py: a complete folder, the same bytes for the same arguments, and a tokenizer that loses nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer

from quire.models.weights import load_model


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    file = Path(__file__).parents[2] / "tools" / "make_model.py"
    spec = importlib.util.spec_from_file_location("make_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Small enough for a test; the real shapes differ in numbers only.
    module.SHAPES["tiny"] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                             "intermediate_size": 48}  # fmt: skip
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model(tool: ModuleType, tmp_path: Path, dtype: str) -> None:
    count = tool.make_model("tiny", tmp_path / "a", dtype, seed=3)
    tool.make_model("tiny", tmp_path / "b", dtype, seed=3)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    model = load_model(tmp_path / "a")
    assert model.spec.num_parameters() == count
    assert model.spec.dtype == dtype
    assert model.spec.eos_token_ids == (0, 2)
    assert model.tensors["final_norm.weight"].astype(np.float32).tolist() == [1.0] * 32
    assert 0.019 < float(model.tensors["embed.weight"].astype(np.float32).std()) < 0.021
    assert not np.array_equal(model.tensors["layers.0.q.weight"], model.tensors["layers.1.q.weight"])


def test_experts_in_mxfp4(tool: ModuleType, tmp_path: Path) -> None:
    tool.SHAPES["tiny-oss"] = tool.SHAPES["gpt-oss-20b"] | {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 64, "vocab_size": 33_000, "num_local_experts": 4,
    }  # fmt: skip
    count = tool.make_model("tiny-oss", tmp_path, "bfloat16", seed=3)
    model = load_model(tmp_path)
    assert model.spec.num_parameters() == count
    assert model.spec.dtype == "bfloat16"
    assert dict(model.spec.stored)["layers.1.experts.3.down"] == "mxfp4"
    assert model.tensors["layers.1.mlp_norm.weight"].astype(np.float32).tolist() == [1.0] * 32
    for name in ("layers.0.experts.2.up.weight", "layers.1.experts.0.down.weight", "lm_head.weight", "layers.0.experts.2.up.bias"):
        assert 0.01 < float(model.tensors[name].astype(np.float32).std()) < 0.03, name


def test_tokenizer(tool: ModuleType, tmp_path: Path) -> None:
    tool.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 32_000
    for text in (
        "The cat sat on the mat.",
        "def f(x):\n        return 2.5 * x\n\n",
        "héllo 漢字 🎉 \x00\t",
        "ÅÅÅ   ",
        "🙂" * 9,
        "1234567",
        "",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the other thing").ids) < 8
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(32_000))
    assert tokenizer.encode("a<|im_end|>").ids[-1] == 2
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
