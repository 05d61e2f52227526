"""gpt-oss with experts in MXFP4 as transformers reads them: the same numbers, and the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quire.models.weights import load_model
from reference_model import ReferenceModel, relative_error
from sample_packed import packed_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from oracle.models import TOLERANCE, Case, build, heads, logits, save  # noqa: E402

pytestmark = pytest.mark.oracle


def test_what_transformers_reads(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    case = Case("gpt-oss-mxfp4", "gpt_oss", heads(4, 2, hidden_size=64, intermediate_size=96))
    folder = packed_folder(save(build(case), tmp_path / "floats"), tmp_path / "packed", "mxfp4")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "quantization_config": transformers.Mxfp4Config(dequantize=True)}
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).float().eval()
    model = load_model(folder)
    state = oracle.state_dict()
    for layer in range(2):
        for expert in range(5):
            at = f"layers.{layer}.experts.{expert}"
            fused = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert].numpy()
            down = state[f"model.layers.{layer}.mlp.experts.down_proj"][expert].numpy()
            for part, wanted in (("gate", fused.T[::2]), ("up", fused.T[1::2]), ("down", down.T)):
                np.testing.assert_array_equal(np.asarray(model.tensors[f"{at}.{part}.weight"], np.float32), wanted)
    tokens = np.random.default_rng(0).integers(4, 97, 60).tolist()
    found = ReferenceModel(model.spec, model.tensors).logits(tokens)
    assert relative_error(found, logits(oracle, tokens).double().numpy()) < TOLERANCE
