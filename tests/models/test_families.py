"""config.json → TransformerSpec, for every family, as transformers 4 and 5 write it; and everything that is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quire.errors import ModelLoadError
from quire.models.families import FAMILIES, find_family, spec_from_config
from quire.models.parallel import part_of
from quire.models.spec import RopeSpec, TransformerSpec
from sample_models import (
    DOTS1,
    ERNIE,
    ERNIE_MOE,
    EXAONE4,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3_VISION,
    GLM,
    GLM4,
    GLM4_MOE,
    GPT2,
    GPT_OSS,
    GRANITE,
    GRANITE_MOE,
    HELIUM,
    LLAMA,
    MINISTRAL,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OLMO3,
    OLMOE,
    OPT,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MIXED,
    QWEN3_MOE,
    SEED_OSS,
    SMOLLM3,
    STABLELM,
    STARCODER2,
    YARN,
)

MIXED = [QWEN3_MIXED, GLM4_MOE, DOTS1, ERNIE_MOE]
ALL = [LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GRANITE_MOE, GPT_OSS, OLMO2, OLMOE, EXAONE4, GEMMA, GEMMA2, GPT2, OPT,
       ERNIE, GLM, GLM4, SEED_OSS, HELIUM, MINISTRAL, *MIXED]  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def version5(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    new = {name: value for name, value in config.items() if name not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = config.get("torch_dtype", "float32")
    if "rope_theta" in config:
        new["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"], **(config["rope_scaling"] or {})}
    return new


@pytest.mark.parametrize("config", ALL, ids=lambda c: c["model_type"])
def test_both_forms_give_the_same_spec(config: dict[str, Any]) -> None:
    spec = spec_from_config(config)
    assert spec == spec_from_config(version5(config))
    assert spec.architecture == config["architectures"][0]
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.num_heads) == (1000, 96, 4, 6)
    # Older files name no architecture.
    assert spec == spec_from_config({name: value for name, value in config.items() if name != "architectures"})


@pytest.mark.parametrize("config", ALL, ids=lambda c: c["model_type"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_has_one_source(config: dict[str, Any], tied: bool) -> None:
    spec = spec_from_config({**config, "tie_word_embeddings": tied})
    sources = find_family(config).sources(spec)
    assert sources.keys() == spec.tensor_shapes().keys()
    assert len(set(sources.values())) == len(sources)
    assert ("lm_head.weight" in sources) == (not tied)


def test_llama() -> None:
    spec = spec_from_config(LLAMA)
    assert (spec.norm, spec.norm_eps, spec.gated, spec.activation) == ("rms", 1e-5, True, "silu")
    assert (spec.num_kv_heads, spec.head_dim, spec.intermediate_size, spec.max_positions) == (2, 16, 200, 4096)
    assert not any((spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.norm_bias, spec.head_norm, spec.tied))
    assert spec.rope == RopeSpec(500000.0, 16)
    assert spec.dtype == "bfloat16"
    spec = spec_from_config({**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 24, "num_key_value_heads": None})
    assert spec.qkv_bias
    assert spec.o_bias
    assert spec.mlp_bias
    assert (spec.head_dim, spec.num_kv_heads) == (24, 6)
    assert spec_from_config({**LLAMA, "rope_theta": None}).rope == RopeSpec(10000.0, 16)


@pytest.mark.parametrize("form", [lambda c: c, version5], ids=["4", "5"])
def test_rope_scaling(form: Any) -> None:
    linear = spec_from_config(form({**LLAMA, "rope_scaling": {"type" if form is not version5 else "rope_type": "linear", "factor": 4.0}}))
    assert linear.rope == RopeSpec(500000.0, 16, "linear", 4.0)
    llama3 = spec_from_config(form({**LLAMA, "rope_scaling": LLAMA3}))
    assert llama3.rope == RopeSpec(500000.0, 16, "llama3", 8.0, 1.0, 4.0, 8192)


def test_llama3_frequencies() -> None:
    """Against the three cases of the published code, in float64."""
    for theta, dim, original, factor in ((500000.0, 128, 8192, 8.0), (500000.0, 64, 8192, 32.0), (500.0, 16, 32, 8.0)):
        rope = RopeSpec(theta, dim, "llama3", factor, 1.0, 4.0, original)
        plain = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        expected = []
        for frequency in plain:
            wavelength = 2 * math.pi / frequency
            if wavelength < original / 4.0:
                expected.append(frequency)
            elif wavelength > original / 1.0:
                expected.append(frequency / factor)
            else:
                smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
                expected.append((1 - smooth) * frequency / factor + smooth * frequency)
        np.testing.assert_allclose(rope.inverse_frequencies(4096), expected, rtol=1e-14)
        assert len({round(e / p, 6) for e, p in zip(expected, plain, strict=True)}) >= 3  # all three cases occur


def test_mistral_windows() -> None:
    assert spec_from_config(MISTRAL).windows == ()
    assert spec_from_config({**MISTRAL, "sliding_window": 1024}).windows == (1024,) * 4
    assert spec_from_config({**MISTRAL, "sliding_window": 4096}).windows == ()  # as long as the context
    absent = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    assert spec_from_config({**absent, "max_position_embeddings": 32768}).windows == (4096,) * 4
    assert spec_from_config({**MISTRAL, "head_dim": 128}).head_dim == 128


def test_ministral3() -> None:
    """Names and values as in Ministral-3-8B's config.json, whose text is a part."""
    rope = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}  # fmt: skip
    text = {name: value for name, value in MISTRAL.items() if name not in ("architectures", "rope_theta", "rope_scaling", "torch_dtype")}
    text |= {"model_type": "ministral3", "rope_parameters": rope, "max_position_embeddings": 262144, "head_dim": 128}
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "dtype": "bfloat16", "text_config": text,
             "vision_config": {}}  # fmt: skip
    spec = spec_from_config(whole)
    assert spec == spec_from_config({**text, "architectures": ["Ministral3ForCausalLM"], "dtype": "bfloat16"})
    expected = RopeSpec(1e6, 128, "yarn", 16.0, original_max_positions=16384, query_beta=0.1)
    assert (spec.rope, spec.windows, spec.max_positions, spec.dtype) == (expected, (), 262144, "bfloat16")
    scales = expected.query_scales(40000)
    assert scales is not None
    assert scales[16383:16385] == [1.0, 1 + 0.1 * math.log(2)]
    assert (len(scales), scales[-1]) == (40000, 1 + 0.1 * math.log(3))
    assert expected.query_scales(16384) is None
    plain = {**text, "model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}
    assert spec_from_config({**whole, "text_config": plain}).architecture == "MistralForCausalLM"
    assert spec_from_config({**whole, "text_config": plain}).windows == (), "null is none"
    different = {**rope, "mscale": 0.5}
    found = spec_from_config({**whole, "text_config": {**text, "rope_parameters": different}}).rope
    assert found is not None
    assert found.magnitude == pytest.approx((0.05 * math.log(16) + 1) / (0.1 * math.log(16) + 1))


def test_qwen() -> None:
    spec = spec_from_config(QWEN2)
    assert spec.qkv_bias
    assert not spec.o_bias
    assert not spec.head_norm
    assert spec.windows == ()
    assert spec_from_config({**QWEN2, "use_sliding_window": True}).windows == (0, 0, 0, 1024)
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert spec_from_config({**QWEN2, "use_sliding_window": True, "layer_types": kinds}).windows == (1024, 0, 0, 1024)
    assert spec_from_config({**QWEN2, "layer_types": ["full_attention"] * 4, "sliding_window": None}).windows == ()
    spec = spec_from_config(QWEN3)
    assert spec.head_norm
    assert spec.head_dim == 32
    assert not spec.qkv_bias
    spec = spec_from_config({**QWEN3, "attention_bias": True, "head_dim": None})
    assert spec.qkv_bias
    assert spec.o_bias
    assert spec.head_dim == 128


def test_phi3() -> None:
    """Names and values as in Phi-4-mini's config.json."""
    spec = spec_from_config(PHI3)
    magnitude = math.sqrt(1 + math.log(131072 / 4096) / math.log(4096))
    short, long = (1.0,) * 6, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert spec.rope == RopeSpec(
        500000.0, 12, "longrope", original_max_positions=4096, short_factors=short, long_factors=long, magnitude=magnitude
    )
    assert spec.windows == ()
    assert spec.rope.inverse_frequencies(4096)[2] == pytest.approx(3 * spec.rope.inverse_frequencies(4097)[2])
    assert spec_from_config({**PHI3, "rope_scaling": {**PHI3["rope_scaling"], "type": "su"}}).rope == spec.rope
    assert spec_from_config({**PHI3, "rope_scaling": None, "sliding_window": 2047}).windows == (2047,) * 4
    sources = find_family(PHI3).sources(spec)
    assert set(sources) == set(spec.tensor_shapes())
    v, up = sources["layers.1.v.weight"], sources["layers.1.up.weight"]
    assert (v.name, v.rows, v.stored_shape((32, 96))) == ("layers.1.self_attn.qkv_proj.weight", (128, 160), (160, 96))
    assert (up.name, up.rows, up.stored_shape((200, 96))) == ("layers.1.mlp.gate_up_proj.weight", (200, 400), (400, 96))


def test_granite() -> None:
    spec = spec_from_config({**GRANITE, "rms_norm_eps": 1e-5})
    assert spec.embed_scale == 12.0 / 0.22
    assert spec.norm_eps == pytest.approx(1e-5 / 0.22**2)
    assert spec.logit_scale == 1 / 8
    assert spec.scale == 0.015625
    plain = {name: value for name, value in GRANITE.items() if "multiplier" not in name and name != "logits_scaling"}
    assert spec_from_config(plain).scale == 1.0, "as transformers has it where the file does not say"


def test_smollm3() -> None:
    spec = spec_from_config(SMOLLM3)
    assert [spec.layer_rope(i) is not None for i in range(4)] == [True, True, True, False]
    assert spec.tied
    assert spec.windows == ()
    assert spec_from_config({**SMOLLM3, "rope_theta": None}).rope == RopeSpec(2000000.0, 16)
    windows = {**SMOLLM3, "use_sliding_window": True, "sliding_window": 512}
    assert spec_from_config({**windows, "layer_types": None}).windows == (0, 0, 0, 512)
    assert spec_from_config({**windows, "no_rope_layers": [0, 1, 1, 1], "layer_types": ["sliding_attention"] * 4}).windows == (512,) * 4


def test_olmo() -> None:
    spec = spec_from_config(OLMO2)
    assert (spec.norm_place, spec.head_norm, spec.heads_as_one, spec.norms_behind) == ("behind", True, True, False)
    assert spec.tensor_shapes()["layers.1.k_norm.weight"] == (96,)
    assert spec_from_config({**OLMO2, "num_key_value_heads": 2}).tensor_shapes()["layers.1.k_norm.weight"] == (32,)
    sources = find_family(OLMO2).sources(spec)
    assert sources["layers.1.attn_norm.weight"].name == "layers.1.post_attention_layernorm.weight"
    assert sources["layers.1.mlp_norm.weight"].name == "layers.1.post_feedforward_layernorm.weight"
    experts = spec_from_config(OLMOE)
    assert (experts.norm_place, experts.heads_as_one, experts.num_experts, experts.experts_sum_to_one) == ("before", True, 6, False)


def test_olmo3() -> None:
    """What looks at a window is not stretched, in the files of either version."""
    yarn = RopeSpec(500000.0, 16, "yarn", 4.0, original_max_positions=4096, magnitude=1.2)
    spec = spec_from_config(OLMO3)
    assert spec.windows == (1024, 1024, 1024, 0)
    assert spec.max_positions == 16384
    assert spec.ropes == (RopeSpec(500000.0, 16),) * 3 + (yarn,)
    new = {name: value for name, value in OLMO3.items() if name not in ("rope_theta", "rope_scaling")}
    full = {**OLMO3["rope_scaling"], "rope_theta": 500000.0}
    for others in ({"sliding_attention": {"rope_type": "default", "rope_theta": 500000.0}}, {}):
        assert spec_from_config({**new, "rope_parameters": {"full_attention": full} | others}) == spec
    plain = spec_from_config({**OLMO3, "rope_scaling": None, "layer_types": None})
    assert (plain.windows, plain.ropes, plain.rope) == (spec.windows, (), RopeSpec(500000.0, 16))
    large = {"vocab_size": 100278, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32, "layer_types": None}  # fmt: skip
    assert spec_from_config(OLMO3 | large).num_parameters() == 7_298_011_136, "Olmo-3-7B"


def test_exaone4() -> None:
    spec = spec_from_config(EXAONE4)
    assert (spec.norm_place, spec.head_norm, spec.heads_as_one) == ("behind", True, False)
    assert spec.windows == (1024, 1024, 1024, 0)
    assert [spec.layer_rope(i) is not None for i in range(4)] == [True, True, True, False]
    small = spec_from_config({**EXAONE4, "sliding_window": None, "layer_types": ["full_attention"] * 4})
    assert (small.windows, small.ropes, small.rope) == ((), (), RopeSpec(500000.0, 32))
    assert spec_from_config({**EXAONE4, "layer_types": None, "sliding_window_pattern": 4}) == spec


def test_gemma() -> None:
    spec = spec_from_config({name: value for name, value in GEMMA.items() if name != "tie_word_embeddings"})
    assert (spec.norm_offset, spec.norms_behind, spec.tied, spec.embed_scale) == (1.0, False, True, 96**0.5)
    assert spec.activation == "gelu_tanh", "which 'gelu' means here"
    assert (spec.attention_softcap, spec.logit_softcap) == (0.0, 0.0)


def test_gemma2() -> None:
    spec = spec_from_config(GEMMA2)
    assert (spec.norm_offset, spec.norms_behind, spec.head_norm) == (1.0, True, False)
    assert (spec.attention_softcap, spec.logit_softcap, spec.scale) == (50.0, 30.0, 24**-0.5)
    assert spec.windows == (1024, 0, 1024, 0)
    absent = {name: value for name, value in GEMMA2.items() if "softcapping" not in name and name != "sliding_window"}
    spec = spec_from_config({**absent, "max_position_embeddings": 8192})
    assert (spec.attention_softcap, spec.logit_softcap, spec.windows) == (50.0, 30.0, (4096, 0, 4096, 0))
    spec = spec_from_config({**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None})
    assert (spec.attention_softcap, spec.logit_softcap, spec.windows) == (0.0, 0.0, ())
    first = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
             "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}  # fmt: skip
    assert spec_from_config(GEMMA2 | first).num_parameters() == 2_614_341_888, "gemma-2-2b"


def test_gemma3() -> None:
    spec = spec_from_config(GEMMA3)
    assert (spec.norm_offset, spec.norms_behind, spec.head_norm, spec.tied) == (1.0, True, True, True)
    assert (spec.activation, spec.scale, spec.embed_scale) == ("gelu_tanh", 1 / 16, 96**0.5)
    assert spec.windows == (512,) * 5 + (0, 512)
    assert spec.rope == RopeSpec(1e6, 32)
    assert [spec.layer_rope(i) for i in range(7)] == [RopeSpec(1e4, 32)] * 5 + [RopeSpec(1e6, 32), RopeSpec(1e4, 32)]
    assert (spec.bos_token_id, spec.eos_token_ids) == (2, (1, 106))
    assert (spec.logit_softcap, spec_from_config({**GEMMA3, "final_logit_softcapping": 30.0}).logit_softcap) == (0.0, 30.0)
    # A window as long as the context hides nothing, but the layer rotates as those with a window do.
    whole = spec_from_config({**GEMMA3, "sliding_window": 4096})
    assert (whole.windows, whole.ropes) == ((), spec.ropes)
    kinds = ["full_attention", *["sliding_attention"] * 6]
    new = {name: value for name, value in GEMMA3.items() if name not in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")}
    new |= {"layer_types": kinds, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}  # fmt: skip
    assert spec_from_config(new).ropes == (RopeSpec(2e6, 32, "linear", 8.0),) + (RopeSpec(500.0, 32),) * 6
    assert spec_from_config({**new, "rope_parameters": {"full_attention": None}}).ropes[:2] == (RopeSpec(1e6, 32), RopeSpec(1e4, 32))
    first = {"vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "head_dim": 256}
    assert spec_from_config(GEMMA3 | first).num_parameters() == 999_885_952, "gemma-3-1b"


def test_gemma3_that_sees_images_is_served_as_one_that_reads() -> None:
    spec = spec_from_config(GEMMA3_VISION)
    assert spec.architecture == "Gemma3ForCausalLM", "which is what is served"
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_positions) == (8, 4, 256, 131072), "defaults of the class"
    assert spec.ropes == (RopeSpec(1e4, 256),) * 5 + (RopeSpec(1e6, 256, "linear", 8.0), RopeSpec(1e4, 256))
    assert (spec.windows, spec.dtype, spec.eos_token_ids) == ((1024,) * 5 + (0, 1024), "bfloat16", (1, 106))
    untied = {**GEMMA3_VISION, "tie_word_embeddings": False, "text_config": {**GEMMA3_VISION["text_config"], "torch_dtype": "float16"}}
    assert (spec_from_config(untied).tied, spec_from_config(untied).dtype) == (False, "float16")


def test_starcoder2_and_stablelm() -> None:
    spec = spec_from_config(STARCODER2)
    assert (spec.norm, spec.norm_bias, spec.gated, spec.activation, spec.tied) == ("layer", True, False, "gelu_tanh", True)
    assert spec.qkv_bias
    assert spec.mlp_bias
    assert find_family(STARCODER2).sources(spec)["layers.0.up.bias"].name == "layers.0.mlp.c_fc.bias"
    spec = spec_from_config(STABLELM)
    assert (spec.norm, spec.norm_bias, spec.gated, spec.activation, spec.tied) == ("layer", True, True, "silu", False)
    assert spec.rope == RopeSpec(10000.0, 4), "a quarter of each head"
    assert spec.qkv_bias
    assert not spec.o_bias


def test_ernie() -> None:
    """Names and values as in ERNIE-4.5-0.3B's config.json, whose parameters are counted."""
    spec = spec_from_config(ERNIE)
    assert spec.tied
    assert (spec.head_dim, spec.rope) == (32, RopeSpec(500000.0, 32))
    assert not any((spec.qkv_bias, spec.o_bias, spec.mlp_bias))
    biased = spec_from_config({**ERNIE, "use_bias": True})
    assert all((biased.qkv_bias, biased.o_bias, biased.mlp_bias))
    sources = find_family(ERNIE).sources(biased)
    assert (sources["layers.0.q.bias"].interleaved, sources["layers.0.k.weight"].interleaved) == ((6, 32), (2, 32))
    assert {name.split(".")[2] for name, source in sources.items() if source.interleaved} == {"q", "k"}
    # What config.json does not say is as in transformers, where null is a head's usual size.
    bare = {name: value for name, value in ERNIE.items() if name not in ("head_dim", "tie_word_embeddings", "rope_theta", "rms_norm_eps")}
    assert spec_from_config(bare) == spec_from_config({**ERNIE, "head_dim": 128})
    assert spec_from_config({**ERNIE, "head_dim": None}).head_dim == 16
    small = {"vocab_size": 103424, "hidden_size": 1024, "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2,
             "head_dim": 128, "intermediate_size": 3072}  # fmt: skip
    assert spec_from_config({**ERNIE, **small}).num_parameters() == 360_748_032, "ERNIE-4.5-0.3B"


def test_glm() -> None:
    spec, behind = spec_from_config(GLM), spec_from_config(GLM4)
    assert spec.rope == behind.rope == RopeSpec(10000.0, 16), "half of each head"
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.tied) == (True, False, False, False)
    assert (spec.norms_behind, behind.norms_behind) == (False, True)
    assert not spec_from_config({**GLM, "attention_bias": False}).qkv_bias  # GLM-4-32B
    bare = {
        name: value for name, value in GLM4.items() if name not in ("attention_bias", "head_dim", "rms_norm_eps", "partial_rotary_factor")
    }
    assert spec_from_config(bare) == spec_from_config({**GLM4, "head_dim": 128})
    sources = find_family(GLM4).sources(behind)
    assert sources["layers.1.mlp_norm.weight"].name == "layers.1.post_attention_layernorm.weight"
    assert sources["layers.1.attn_out_norm.weight"].name == "layers.1.post_self_attn_layernorm.weight"
    assert sources["layers.1.mlp_out_norm.weight"].name == "layers.1.post_mlp_layernorm.weight"
    up = sources["layers.1.up.weight"]
    assert (up.name, up.rows, up.stored_shape((200, 96))) == ("layers.1.mlp.gate_up_proj.weight", (200, 400), (400, 96))
    assert (sources["layers.1.q.bias"].interleaved, sources["layers.1.k.weight"].interleaved) == ((6, 16), (2, 16))
    large = {"vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2,
             "head_dim": 128, "intermediate_size": 13696}  # fmt: skip
    assert spec_from_config({**GLM, **large}).num_parameters() == 9_399_951_360, "glm-4-9b"
    assert spec_from_config({**GLM4, **large}).num_parameters() == 9_400_279_040, "GLM-4-9B-0414"


def test_seed_oss() -> None:
    spec = spec_from_config(SEED_OSS)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.head_dim) == (True, False, False, 32)
    other = spec_from_config({**SEED_OSS, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": None})
    assert (other.qkv_bias, other.o_bias, other.mlp_bias, other.head_dim) == (False, True, True, 16)
    large = {"vocab_size": 155136, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 80, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 27648}  # fmt: skip
    assert spec_from_config({**SEED_OSS, **large}).num_parameters() == 36_151_104_512, "Seed-OSS-36B"


def test_helium_ministral_and_gemma() -> None:
    spec = spec_from_config(HELIUM)
    assert (spec.rope, spec.norm_eps) == (RopeSpec(100000.0, 16), 1e-8)
    assert find_family(HELIUM).sources(spec)["layers.0.q.weight"].interleaved == (6, 16)
    assert spec_from_config(MINISTRAL).windows == (0, 1024, 1024, 1024)
    assert spec_from_config({**MINISTRAL, "layer_types": None}).windows == (1024,) * 4
    assert spec_from_config({**MINISTRAL, "layer_types": None, "sliding_window": None}).windows == ()
    spec = spec_from_config(GEMMA)
    assert (spec.norm_offset, spec.norms_behind, spec.tied) == (1.0, False, True)
    assert (spec.activation, spec.embed_scale, spec.scale) == ("gelu_tanh", 96**0.5, 32**-0.5), "gelu stands for this one"
    small = {"vocab_size": 256000, "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
             "head_dim": 256, "intermediate_size": 16384}  # fmt: skip
    assert spec_from_config({**GEMMA, **small}).num_parameters() == 2_506_172_416, "gemma-2b"


def test_yarn() -> None:
    """As Qwen's model cards say it: the stretched context is the model's."""
    spec = spec_from_config({**QWEN3, "max_position_embeddings": 4096, "rope_scaling": YARN})
    assert spec.max_positions == 16384
    assert spec.rope == RopeSpec(500000.0, 32, "yarn", 4.0, original_max_positions=4096, magnitude=0.1 * math.log(4) + 1)
    frequencies = spec.rope.inverse_frequencies(1)
    plain = RopeSpec(500000.0, 32).inverse_frequencies(1)
    assert frequencies[0] == plain[0]
    assert frequencies[-1] == plain[-1] / 4
    assert spec_from_config({**QWEN3, "rope_scaling": {**YARN, "original_max_position_embeddings": None}}).max_positions == 16384


def test_gpt2() -> None:
    spec = spec_from_config(GPT2)
    assert (spec.norm, spec.norm_bias, spec.gated, spec.activation) == ("layer", True, False, "gelu_tanh")
    assert spec.rope is None
    assert spec.tied
    assert (spec.intermediate_size, spec.max_positions, spec.position_offset, spec.scale) == (384, 512, 0, 0.25)
    assert spec.dtype == "float32"
    assert spec_from_config({**GPT2, "n_inner": 100}).intermediate_size == 100
    assert spec_from_config({**GPT2, "scale_attn_weights": False}).scale == 1.0
    sources = find_family(GPT2).sources(spec)
    k = sources["layers.1.k.weight"]
    assert (k.name, k.transpose, k.rows) == ("h.1.attn.c_attn.weight", True, (96, 192))
    assert k.stored_shape((96, 96)) == (96, 288)
    assert sources["layers.1.v.bias"].stored_shape((96,)) == (288,)


def test_opt() -> None:
    spec = spec_from_config(OPT)
    assert (spec.norm, spec.norm_place, spec.final_norm, spec.activation, spec.gated) == ("layer", "before", True, "relu", False)
    assert spec.rope is None
    assert spec.tied
    assert spec.qkv_bias
    assert spec.embed_size == 0
    assert spec.tensor_shapes()["positions.weight"] == (514, 96)
    post = spec_from_config({**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 40, "enable_bias": False})
    assert (post.norm_place, post.final_norm, post.embed_size, post.qkv_bias, post.mlp_bias) == ("after", False, 40, False, False)
    assert post.tensor_shapes()["embed_in.weight"] == (96, 40)
    assert not spec_from_config({**OPT, "_remove_final_layer_norm": True}).final_norm


def test_end_of_text_ids() -> None:
    assert spec_from_config(LLAMA).eos_token_ids == (2,)
    spec = spec_from_config({**LLAMA, "eos_token_id": [7, 2]}, {"eos_token_id": [5, 7], "bos_token_id": 3})
    assert (spec.eos_token_ids, spec.bos_token_id) == ((5, 7, 2), 3)
    assert spec_from_config({**LLAMA, "eos_token_id": 50256, "bos_token_id": 50256}).eos_token_ids == ()
    none = spec_from_config({**LLAMA, "eos_token_id": None, "bos_token_id": None})
    assert (none.eos_token_ids, none.bos_token_id) == ((), None)
    with pytest.raises(ModelLoadError, match="'eos_token_id' must be a token id"):
        spec_from_config({**LLAMA, "eos_token_id": "</s>"})


def test_parameter_formula() -> None:
    """Known models, from the published counts."""
    gpt2 = spec_from_config({**GPT2, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257})
    assert gpt2.num_parameters() == 124_439_808
    llama = spec_from_config({**LLAMA, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
                              "intermediate_size": 14336, "vocab_size": 128256})  # fmt: skip
    assert llama.num_parameters() == 8_030_261_248
    assert llama.weight_bytes("bfloat16") == 16_060_522_496
    assert llama.kv_bytes_per_token("float16") == 131_072
    qwen = spec_from_config({**QWEN3, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 28,
                             "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True})  # fmt: skip
    assert qwen.num_parameters() == 596_049_920
    mixtral = spec_from_config({**MIXTRAL, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
                                "num_hidden_layers": 32, "intermediate_size": 14336, "num_local_experts": 8})  # fmt: skip
    assert mixtral.num_parameters() == 46_702_792_704
    moe = spec_from_config({**QWEN3_MOE, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48,
                            "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
                            "vocab_size": 151936})  # fmt: skip
    assert moe.num_parameters() == 30_532_122_624
    for layers, experts, total, active in ((24, 32, 20_914_757_184, 3.61e9), (36, 128, 116_829_156_672, 5.13e9)):  # 20b and 120b
        oss = spec_from_config({**GPT_OSS, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
                                "intermediate_size": 2880, "num_hidden_layers": layers, "num_local_experts": experts, "layer_types": None,
                                "num_experts_per_tok": 4, "vocab_size": 201088})  # fmt: skip
        assert oss.num_parameters() == total
        assert oss.matmul_parameters() + 201088 * 2880 == pytest.approx(active, rel=0.01)  # as published: without the embedding
    assert moe.linear_parameters() == sum(n * k for name, (n, k) in _matrices(moe).items() if name.startswith("layers."))
    assert moe.matmul_parameters() + 2 * 151936 * 2048 == pytest.approx(3.3e9, rel=0.02)  # "3.3B activated"


def _matrices(spec: TransformerSpec) -> dict[str, tuple[int, int]]:
    return {name: (shape[0], shape[1]) for name, shape in spec.tensor_shapes().items() if len(shape) == 2}


def test_experts() -> None:
    spec = spec_from_config(MIXTRAL)
    assert (spec.num_experts, spec.experts_per_token, spec.experts_sum_to_one, spec.intermediate_size) == (4, 2, True, 192)
    assert spec_from_config({name: value for name, value in MIXTRAL.items() if "expert" not in name}).num_experts == 8
    assert spec_from_config({**MIXTRAL, "sliding_window": 1024}).windows == (1024,) * 4
    spec = spec_from_config(QWEN3_MOE)
    assert (spec.num_experts, spec.experts_per_token, spec.experts_sum_to_one, spec.intermediate_size) == (8, 3, True, 64)
    assert not spec_from_config({**QWEN3_MOE, "norm_topk_prob": None}).experts_sum_to_one
    renamed = {name: value for name, value in QWEN3_MOE.items() if name != "num_experts"} | {"num_local_experts": 8}
    assert spec_from_config(renamed) == spec
    assert spec_from_config({**QWEN3_MOE, "use_sliding_window": True}).windows == (1024,) * 4
    names = [name for name in spec.tensor_shapes() if name.startswith("layers.2.") and "attn" not in name]
    assert "layers.2.experts.7.down.weight" in names
    assert "layers.2.up.weight" not in names
    assert not any(name.endswith(".router") for name in spec.quantizable())
    assert spec.experts_met(0) == 0
    assert spec.experts_met(1) == pytest.approx(3)
    assert spec.experts_met(2) == pytest.approx(8 - 8 * (5 / 8) ** 2)
    granite = spec_from_config(GRANITE_MOE)
    assert (granite.num_experts, granite.experts_per_token) == (6, 2)
    assert granite.embed_scale == spec_from_config(GRANITE).embed_scale


def test_layers_with_and_without_experts() -> None:
    spec = spec_from_config(QWEN3_MIXED)
    assert spec.dense_sizes == (200, 0, 200, 200)
    assert [spec.has_experts(i) for i in range(4)] == [False, True, False, False]
    assert (spec.expert_layers, spec.plain_size) == (1, 200)
    assert spec.tensor_shapes()["layers.3.down.weight"] == (96, 200)
    assert spec_from_config({**QWEN3_MOE, "mlp_only_layers": [2]}).dense_sizes == (0, 0, 200, 0)
    part = part_of(spec_from_config(GLM4_MOE), 2)
    assert (part.intermediate_size, part.shared_size, part.dense_sizes) == (32, 32, (100, 0, 0, 0))
    for values in MIXED:
        spec = spec_from_config(values)
        assert spec.linear_parameters() == sum(n * k for name, (n, k) in _matrices(spec).items() if name.startswith("layers."))
        assert spec.matmul_parameters() == sum(map(spec.layer_matmul_parameters, range(4)))
        assert sum(spec.layer_matmul_parameters(i) for i in range(4) if spec.has_experts(i)) == sum(
            n * k * (3 / 8 if ".experts." in name else 1)
            for name, (n, k) in _matrices(spec).items()
            if name.startswith("layers.") and spec.has_experts(int(name.split(".")[1]))
        )


def test_experts_that_are_chosen_by_corrected_shares() -> None:
    spec = spec_from_config(GLM4_MOE)
    assert (spec.expert_shares, spec.expert_correction, spec.experts_scale, spec.experts_sum_to_one) == ("sigmoid", True, 2.5, True)
    assert (spec.shared_size, spec.dense_sizes, spec.head_norm, spec.qkv_bias, spec.o_bias) == (64, (200, 0, 0, 0), True, True, False)
    assert spec.rope == RopeSpec(1e6, 16)
    assert not any("correction" in name or "router" in name for name in spec.quantizable())
    assert spec.quantizable()["layers.3.shared.down"] == (96, 64)
    sources = find_family(GLM4_MOE).sources(spec)
    assert sources["layers.2.correction.bias"].name == "layers.2.mlp.gate.e_score_correction_bias"
    assert sources["layers.2.shared.up.weight"].name == "layers.2.mlp.shared_experts.up_proj.weight"
    bare = ("partial_rotary_factor", "n_shared_experts", "first_k_dense_replace", "norm_topk_prob", "rms_norm_eps", "n_group", "topk_group")
    assert spec_from_config({name: value for name, value in GLM4_MOE.items() if name not in bare}) == spec
    dots = spec_from_config(DOTS1)
    assert (dots.expert_shares, dots.shared_size, dots.windows, dots.head_norm) == ("sigmoid", 128, (), True)
    assert spec_from_config({**DOTS1, "sliding_window": 512, "max_window_layers": 3}).windows == (0, 0, 0, 512)
    ernie = spec_from_config(ERNIE_MOE)
    assert (ernie.expert_shares, ernie.expert_correction, ernie.experts_sum_to_one, ernie.tied) == ("softmax", True, True, True)
    assert (ernie.shared_size, ernie.dense_sizes) == (128, (256, 0, 0, 256))
    assert spec_from_config({**ERNIE_MOE, "moe_layer_end_index": -1, "moe_layer_interval": 2}).dense_sizes == (256, 0, 256, 0)
    bias = find_family(ERNIE_MOE).sources(ernie)["layers.1.correction.bias"]
    assert (bias.name, bias.stored_shape((8,))) == ("layers.1.mlp.moe_statics.e_score_correction_bias", (1, 8))


def test_sizes_of_published_mixtures() -> None:
    """As their authors round them: of all parameters, and of those that a token meets."""
    air = GLM4_MOE | {"hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
                      "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8,
                      "vocab_size": 151552, "use_qk_norm": False}  # fmt: skip
    dots = DOTS1 | {"hidden_size": 4096, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32,
                    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 6,
                    "vocab_size": 152064}  # fmt: skip
    ernie = ERNIE_MOE | {"hidden_size": 2560, "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4,
                         "intermediate_size": 12288, "moe_intermediate_size": 1536, "moe_num_experts": 64, "moe_k": 6,
                         "vocab_size": 103424, "moe_layer_end_index": 27}  # fmt: skip
    for values, total, active in ((air, 106e9, 12e9), (dots, 142e9, 14e9), (ernie, 21e9, 3e9)):
        spec = spec_from_config(values)
        assert spec.num_parameters() == pytest.approx(total, rel=0.05)
        assert spec.matmul_parameters() == pytest.approx(active, rel=0.1)


def test_gpt_oss() -> None:
    spec = spec_from_config(GPT_OSS)
    assert (spec.activation, spec.gated, spec.attention_sinks) == ("swiglu_oai", True, True)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.experts_sum_to_one) == (True, True, True, True)
    assert spec.windows == (128, 0, 128, 0)
    shapes = spec.tensor_shapes()
    assert shapes["layers.3.sinks.weight"] == (6,)
    assert shapes["layers.3.router.bias"] == (5,)
    assert shapes["layers.3.experts.4.gate.bias"] == (128,)
    assert not any(name.endswith(("router", "sinks")) for name in spec.quantizable())
    sources = find_family(GPT_OSS).sources(spec)
    up = sources["layers.3.experts.4.up.weight"]
    assert (up.name, up.transpose, up.rows, up.expert) == ("layers.3.mlp.experts.gate_up_proj", True, (1, 256, 2), (4, 5))
    assert up.stored_shape((128, 96)) == (5, 96, 256)
    assert sources["layers.3.experts.4.up.bias"].stored_shape((128,)) == (5, 256)
    assert sources["layers.3.experts.4.down.weight"].stored_shape((96, 128)) == (5, 128, 96)
    # What config.json does not say is as in transformers.
    bare = {name: value for name, value in GPT_OSS.items() if name not in ("layer_types", "rope_scaling", "rope_theta", "sliding_window")}
    assert spec_from_config({**bare, "rms_norm_eps": None, "attention_bias": None}) == spec
    assert spec.rope is not None
    assert spec.rope.magnitude == pytest.approx(1.3465735902799727)
    whole = replace(spec.rope, truncate=True).inverse_frequencies(4096)
    found = spec.rope.inverse_frequencies(4096)
    plain = replace(spec.rope, scaling="none").inverse_frequencies(4096)
    assert found != whole
    low, high = (16 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(150000)) for turns in (32, 1))
    for i, (f, p) in enumerate(zip(found, plain, strict=True)):
        share = min(1.0, max(0.0, (i - low) / (high - low)))
        assert f == pytest.approx(p * (1 - share + share / 32))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        LLAMA,
        {"architectures": ["MambaForCausalLM"]},
        "architecture 'MambaForCausalLM' is not supported; supported: .*GPT2LMHeadModel, Gemma2",
    ),
    (LLAMA, {"architectures": None, "model_type": "mamba"}, "model_type 'mamba' is not supported"),
    (LLAMA, {"architectures": [3]}, "architecture 3 is not supported"),
    (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config: bits None is not supported"),
    (LLAMA, {"is_causal": False}, "is_causal .*[Ff]alse.* is not supported"),
    (LLAMA, {"model_type": "granite"}, "model_type 'granite' is not that of LlamaForCausalLM, which is 'llama'"),
    (LLAMA, {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope type 'ntk' is not supported; supported: default, linear"),
    (
        LLAMA,
        {"rope_scaling": {**YARN, "mscale": 1.0}},
        "'mscale' and 'mscale_all_dim' are supported together only, got 1.0 for one of them",
    ),
    (LLAMA, {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}}, "'llama_4_scaling_beta' is not supported with rope type 'yarn'"),
    ({**MISTRAL, "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}, {}, "'text_config' must be an object"),
    (
        {**MISTRAL, "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"},
        {"text_config": {"model_type": "mistral4"}},
        "text_config: model_type 'mistral4' is not supported; supported: mistral, ministral3",
    ),
    (LLAMA, {"rope_scaling": {**YARN, "beta_slow": 40.0}}, "'beta_slow' 40 must be below 'beta_fast' 32"),
    (LLAMA, {"rope_scaling": {**YARN, "truncate": 0}}, "'truncate' must be true or false, got 0"),
    (PHI3, {"rope_scaling": {**PHI3["rope_scaling"], "short_factor": [1.0]}}, "'short_factor' must list 6 numbers"),
    (PHI3, {"rope_scaling": {**PHI3["rope_scaling"], "long_factor": [0.0] * 6}}, "'long_factor' must be a number above 0"),
    (PHI3, {"original_max_position_embeddings": 1}, "'original_max_position_embeddings' must be an integer from 2"),
    (PHI3, {"original_max_position_embeddings": None}, "'original_max_position_embeddings' is missing"),
    (PHI3, {"partial_rotary_factor": 0.2}, "even head size, got 3"),
    (PHI3, {"partial_rotary_factor": 1.5}, "'partial_rotary_factor' must be a number above 0 and at most 1"),
    (GRANITE, {"residual_multiplier": 1e-200}, "'residual_multiplier' must be a number above 1e-06"),
    (GRANITE, {"logits_scaling": 0}, "'logits_scaling' must be a number above 1e-06"),
    (GRANITE, {"logits_scaling": "8"}, "'logits_scaling' must be a number"),
    (SMOLLM3, {"no_rope_layers": [1, 0]}, "'no_rope_layers' must list 0 or 1 for each of the 4 layers"),
    (SMOLLM3, {"no_rope_layers": [1, 0, 2, 1]}, "'no_rope_layers' must list 0 or 1"),
    (SMOLLM3, {"layer_types": [["full_attention"]] * 4}, "'layer_types' must list"),
    (LLAMA, {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope type .'linear'. is not supported"),
    (PHI3, {"rope_scaling": {"type": {"a": 1}}}, "is not supported; supported: default, linear, llama3, yarn, longrope"),
    (SMOLLM3, {"layer_types": ["full_attention"]}, "'layer_types' must list"),
    (OLMOE, {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
    (OLMO3, {"sliding_window": None}, "'sliding_window' is missing"),
    (OLMO3, {"rope_parameters": {"full_attention": {}}}, "'rope_scaling' and 'rope_parameters' contradict each other"),
    (OLMO3, {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, "an object for full_attention and one for sliding"),
    (OLMO3, {"rope_scaling": None, "rope_parameters": {"sliding_attention": 3}}, "'sliding_attention' must be an object, got 3"),
    (EXAONE4, {"layer_types": None}, "'sliding_window_pattern' 'LLLG' without 'layer_types' is not supported"),
    (EXAONE4, {"sliding_window": None}, "'layer_types' names sliding_attention, but 'sliding_window' turns it off"),
    (GEMMA, {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported; supported: gelu_pytorch_tanh"),
    (GEMMA2, {"attn_logit_softcapping": 0.0}, "'attn_logit_softcapping' must be a number above 0.001"),
    (GEMMA2, {"final_logit_softcapping": "30"}, "'final_logit_softcapping' must be a number above"),
    (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
    (GEMMA3, {"final_logit_softcapping": -30.0}, "'final_logit_softcapping' must be a number above 0.001"),
    (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
    (GEMMA3, {"layer_types": ["full_attention"]}, "'layer_types' must list full_attention or sliding_attention for each of the 7 layers"),
    (GEMMA3, {"layer_types": [["full_attention"]] * 7}, "'layer_types' must list"),
    (GEMMA3, {"sliding_window_pattern": 0}, "'sliding_window_pattern' must be an integer from 1"),
    (GEMMA3, {"sliding_window": -1}, "'sliding_window' must be an integer from 1"),
    (GEMMA3, {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' must be a number above 0"),
    (GEMMA3, {"rope_local_base_freq": "low"}, "'rope_local_base_freq' must be a number"),
    (GEMMA3, {"rope_parameters": {"rope_type": "default"}}, "'rope_parameters' must have an object for full_attention"),
    (GEMMA3, {"rope_parameters": {"full_attention": 3}}, "'full_attention' must be an object, got 3"),
    (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "ntk"}}}, "rope type 'ntk' is not supported"),
    (GEMMA3, {"rope_parameters": {}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradict each other"),
    (GEMMA3_VISION, {"text_config": None}, "'text_config' must be an object"),
    (GEMMA3_VISION, {"text_config": {"num_hidden_layers": -1}}, "config.json, text_config: 'num_hidden_layers' must be an integer"),
    (STABLELM, {"use_parallel_residual": True}, "use_parallel_residual True is not supported"),
    (STABLELM, {"qk_layernorm": True}, "qk_layernorm True is not supported"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
    (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling: 'factor' is missing"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' must be a number above 0"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": float("nan")}}, "'factor' must be a number"),
    (LLAMA, {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "'low_freq_factor' 1 must be below"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
    (
        LLAMA,
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
        "'original_max_pos.* contradict",
    ),
    (LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "'mrope_section' is not supported"),
    (LLAMA, {"rope_scaling": [1]}, "must be an object"),
    (LLAMA, {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "contradict each other"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention' is not supported"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    (MIXTRAL, {"num_experts_per_tok": 5}, "'num_experts_per_tok' 5 is more than the 4 experts that there are"),
    (MIXTRAL, {"num_hidden_layers": 4096, "num_local_experts": 1024}, "4096 layers of 1024 experts are more than 65,536 experts"),
    (MIXTRAL, {"num_local_experts": 0}, "'num_local_experts' must be an integer from 1 to 1024, got 0"),
    (MIXTRAL, {"num_local_experts": "many"}, "'num_local_experts' must be an integer"),
    (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
    (GPT_OSS, {"swiglu_limit": 5.0}, "swiglu_limit 5.0 is not supported .only 7.0."),
    (GPT_OSS, {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0 is not supported"),
    (GPT_OSS, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    (GPT_OSS, {"layer_types": ["full_attention"]}, "one type for each of the 4 layers"),
    (GPT_OSS, {"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention'"),
    (QWEN3_MOE, {"mlp_only_layers": [2.5]}, "'mlp_only_layers' must list numbers of layers"),
    (QWEN3_MOE, {"mlp_only_layers": [0, 1, 2, 3]}, "none of the 4 layers has experts"),
    (QWEN3_MOE, {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be an integer from 1"),
    (GLM4_MOE, {"n_group": 2}, "n_group 2 is not supported .only 1."),
    (GLM4_MOE, {"topk_group": 4}, "topk_group 4 is not supported .only 1."),
    (GLM4_MOE, {"first_k_dense_replace": 4}, "none of the 4 layers has experts"),
    (GLM4_MOE, {"num_experts_per_tok": 9}, "'num_experts_per_tok' 9 is more than the 8 experts"),
    (GLM4_MOE, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
    (GLM4_MOE, {"routed_scaling_factor": 0}, "'routed_scaling_factor' must be a number above 0"),
    (DOTS1, {"n_routed_experts": None}, "'n_routed_experts' is missing"),
    (DOTS1, {"n_shared_experts": None}, "'n_shared_experts' is missing"),
    (DOTS1, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
    (ERNIE_MOE, {"use_bias": True}, "use_bias True is not supported"),
    (ERNIE_MOE, {"moe_k": 9}, "'moe_k' 9 is more than the 8 experts"),
    (ERNIE_MOE, {"moe_norm_min": 0.1}, "'moe_norm_min' must be a number"),
    (ERNIE_MOE, {"moe_layer_end_index": -2}, "'moe_layer_end_index' must be an integer from -1"),
    (QWEN3_MOE, {"moe_intermediate_size": None}, "'moe_intermediate_size' is missing"),
    (QWEN3_MOE, {"norm_topk_prob": 1}, "'norm_topk_prob' must be true or false"),
    (LLAMA, {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; supported: silu"),
    (LLAMA, {"hidden_size": None}, "'hidden_size' is missing"),
    (LLAMA, {"hidden_size": "96"}, "'hidden_size' must be an integer from 1 to"),
    (LLAMA, {"hidden_size": True}, "'hidden_size' must be an integer"),
    (LLAMA, {"num_hidden_layers": 10**12}, "'num_hidden_layers' must be an integer"),
    (LLAMA, {"num_key_value_heads": 4}, "6 attention heads can't be divided among 4 key-value heads"),
    (LLAMA, {"num_attention_heads": 7}, "can't be divided"),
    (LLAMA, {"num_attention_heads": 10}, "'hidden_size' 96 is not a multiple of 'num_attention_heads' 10"),
    (LLAMA, {"head_dim": 15}, "even head size, got 15"),
    (LLAMA, {"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number"),
    (LLAMA, {"rms_norm_eps": 10**400}, "'rms_norm_eps' must be a number"),
    (LLAMA, {"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a number"),
    (LLAMA, {"rope_theta": 1e-300}, "'rope_theta' must be a number above 1"),
    (LLAMA, {"attention_bias": 1}, "'attention_bias' must be true or false"),
    (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
    (LLAMA, {"torch_dtype": 16}, "dtype 16 is not supported"),
    (LLAMA, {"sliding_window": 512}, "sliding_window 512 is not supported"),
    (MISTRAL, {"layer_types": ["sliding_attention"] * 4}, "'layer_types'"),
    (QWEN2, {"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention'"),
    (QWEN2, {"layer_types": ["full_attention"]}, "one type for each of the 4 layers"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 4}, "turns it off"),
    (QWEN2, {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
    (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True is not supported"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention True is not supported"),
    (GPT2, {"n_head": 7}, "not a multiple"),
    (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False is not supported"),
    (OPT, {"num_attention_heads": 7}, "not a multiple"),
    (ERNIE, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported"),
    (ERNIE, {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}}, "'mrope_section' is not supported"),
    (ERNIE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    (ERNIE, {"use_bias": "no"}, "'use_bias' must be true or false"),
    (GLM, {"partial_rotary_factor": 0.1}, "even head size, got 3"),
    (GLM4, {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}}, "'mrope_section' is not supported"),
    (HELIUM, {"head_dim": 32}, "6 attention heads of 32 do not make up the 'hidden_size' 96"),
    (MINISTRAL, {"sliding_window": None}, "'layer_types' names sliding_attention, but there is no 'sliding_window'"),
    (MINISTRAL, {"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention'"),
    (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
]


@pytest.mark.parametrize(("config", "change", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else None)
def test_refused(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    values = {**config, **change}
    if values["architectures"] is None:
        del values["architectures"]
    with pytest.raises(ModelLoadError, match=message) as error:
        spec_from_config(values, None, "m/config.json")
    assert error.value.message.startswith("m/config.json")


def test_registry_is_consistent() -> None:
    assert {f.architecture for f in FAMILIES.values()} == set(FAMILIES)
    assert len({f.model_type for f in FAMILIES.values()}) == len(FAMILIES)


def test_sampling_defaults_come_from_the_generation_config() -> None:
    config = LLAMA
    assert spec_from_config(config).sampling_defaults == ()
    spec = spec_from_config(config, {"temperature": 0.6, "top_p": 0.9, "top_k": None, "max_length": 4096})
    assert spec.sampling_defaults == (("temperature", 0.6), ("top_p", 0.9))
    with pytest.raises(ModelLoadError, match=r"generation_config.json: top_p must be from 0 to 1, got 7"):
        spec_from_config(config, {"top_p": 7})
