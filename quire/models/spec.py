"""TransformerSpec: one decoder-only transformer, described by data.

Every backend, the planner and the simulator read this and nothing else of a model's configuration. A variant is a
field here, not a class. Memory and FLOP formulas live here, once.

Canonical tensor names (``{i}`` counts layers from 0; linears are [out, in], as in PyTorch):

    embed.weight [vocab, embed_size]        positions.weight [max_positions + position_offset, hidden]   (learned only)
    embed_in.weight [hidden, embed_size]    embed_out.weight [embed_size, hidden]                        (embed_size != hidden only)
    layers.{i}.attn_norm.weight|bias        layers.{i}.mlp_norm.weight|bias
    layers.{i}.attn_out_norm.weight         layers.{i}.mlp_out_norm.weight                               (norms_behind only)
    layers.{i}.q|k|v|o.weight|bias          layers.{i}.q_norm|k_norm.weight [head_dim, or all heads']            (head_norm only)
    layers.{i}.sinks.weight [heads]                                                              (attention_sinks only)
    layers.{i}.gate|up|down.weight|bias     (gate only where gated)
    layers.{i}.router.weight|bias           layers.{i}.experts.{j}.gate|up|down.weight|bias      (instead of these, in a mixture of experts)
    layers.{i}.correction.bias [experts]                                                         (expert_correction only)
    layers.{i}.shared.gate|up|down.weight|bias                                                   (shared_size only)
    final_norm.weight|bias                  lm_head.weight [vocab, embed_size]                           (untied only)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Literal, Protocol

from quire.machine import StepCost

Norm = Literal["rms", "layer"]
NormPlace = Literal["before", "after", "behind"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"]
"""Of a gate g, times the product u that it gates, or of what a feed-forward has between its linears. ``swiglu_oai`` (gpt-oss, arXiv
2508.10925, section 2) is for gates alone: g is cut off above 7, u beyond -7 and 7, and g * sigmoid(1.702 g) meets u + 1."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "fp8": 1}

KV_SCALE_BYTES = {"int8": 2, "fp8": 2}
"""Of the scale (float16) of one head's key, or value, of one token; KV types that are not here have none."""


@dataclass(slots=True, frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout as in GPT-NeoX and Llama."""

    theta: float = 10000.0
    rotary_dim: int = 0
    """Leading dimensions of a head that are rotated; even."""
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    """yarn: turns within the original context from which on a frequency is kept."""
    beta_slow: float = 1.0
    """And below which it is stretched by all of ``factor``."""
    truncate: bool = True
    """yarn: whether the places of both among the frequencies are made whole numbers."""
    short_factors: tuple[float, ...] = ()
    """longrope: what the wavelength of each frequency is stretched by, where no sequence can be longer than the original context."""
    long_factors: tuple[float, ...] = ()
    """The same for longer ones."""
    magnitude: float = 1.0
    """Factor on cosines and sines."""
    query_beta: float = 0.0
    """Beyond the original context queries are scaled as well, see query_scales; 0: they are not."""

    def inverse_frequencies(self, max_model_len: int) -> list[float]:
        """``rotary_dim / 2`` angular frequencies in radians per position, scaling applied. max_model_len: of the longest sequence that is
        served.

        ``longrope`` (LongRoPE, arXiv 2402.13753): a list of factors of its own for sequences beyond the original context. Which
        one holds can't depend on how long a sequence has become, for its keys are in the cache: it is the one that the longest
        sequence needs, as in vLLM.

        ``yarn`` (arXiv 2309.00071, section 3.2): frequencies of many turns are kept, those of few stretched, others in between.

        ``llama3``: wavelengths beyond ``original_max_positions / low_freq_factor`` are stretched by ``factor``, those below
        ``original_max_positions / high_freq_factor`` kept, the ones between interpolated (Llama 3.1 model card and code).
        """
        freqs = [self.theta ** (-2 * i / self.rotary_dim) for i in range(self.rotary_dim // 2)]
        if self.scaling == "longrope":
            factors = self.long_factors if max_model_len > self.original_max_positions else self.short_factors
            return [f / factor for f, factor in zip(freqs, factors, strict=True)]
        if self.scaling == "linear":
            return [f / self.factor for f in freqs]
        if self.scaling == "yarn":
            low, high = self._dimension(self.beta_fast), self._dimension(self.beta_slow)
            if self.truncate:
                low, high = floor(low), ceil(high)
            low, high = max(low, 0), min(high, self.rotary_dim - 1)
            width = high - low or 0.001
            ramp = [min(1.0, max(0.0, (i - low) / width)) for i in range(len(freqs))]
            return [f * (1 - share + share / self.factor) for f, share in zip(freqs, ramp, strict=True)]
        if self.scaling == "llama3":
            scaled = []
            for f in freqs:
                turns = self.original_max_positions * f / (2 * pi)  # full turns within the original context
                smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
                smooth = min(1.0, max(0.0, smooth))
                scaled.append(f * (smooth + (1 - smooth) / self.factor))
            return scaled
        return freqs

    def query_scales(self, max_model_len: int) -> list[float] | None:
        """Factor on the rotated query of each position, 1 + beta log(1 + the whole original contexts before it) (Ministral 3, after
        Llama 4); None where it is 1 for all."""
        if not self.query_beta or max_model_len <= self.original_max_positions:
            return None
        return [1 + self.query_beta * log(1 + position // self.original_max_positions) for position in range(max_model_len)]

    def _dimension(self, turns: float) -> float:
        """Of the frequency (a number, as if there were any between two) that makes so many turns within the original context."""
        return self.rotary_dim * log(self.original_max_positions / (turns * 2 * pi)) / (2 * log(self.theta))


@dataclass(slots=True, frozen=True)
class TransformerSpec:
    """Shapes and variants of one decoder-only transformer."""

    architecture: str
    """The class name in the checkpoint's config.json, e.g. ``LlamaForCausalLM``."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Inner units of a feed-forward, or of each expert."""
    max_positions: int
    """The model's context, in tokens."""

    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_place: NormPlace = "before"
    """Where a layer's norms are: before attention and feed-forward (pre-norm), after what they give was added to the residual (post-norm,
    OPT-350m), or behind them, of what they give (RMS norms; OLMo 2, arXiv 2501.00656, section 3.2)."""
    norms_behind: bool = False
    """RMS norms behind them as well (Gemma 3; beside pre-norm only)."""
    norm_offset: float = 0.0
    """What is added to the stored weights of RMS norms (Gemma: 1)."""
    final_norm: bool = True
    norm_bias: bool = False
    head_norm: bool = False
    """RMS norm of each query and key head before rotary (Qwen3)."""
    heads_as_one: bool = False
    """Whether that is one norm of all query heads, and one of all key heads (OLMo 2)."""
    activation: Activation = "silu"
    gated: bool = True
    num_experts: int = 0
    """Feed-forwards of each layer, of which a position takes the ``experts_per_token`` that its router scores highest, and adds them up by
    their shares (Shazeer et al., arXiv 1701.06538; Mixtral, arXiv 2401.04088). 0: there is one, without a router."""
    experts_per_token: int = 0
    expert_shares: Literal["softmax", "sigmoid"] = "softmax"
    """An expert's share: of the softmax of all scores, or the sigmoid of its own."""
    expert_correction: bool = False
    """Whether those are taken whose share is highest with a learned number of each expert added, that balances how often experts are taken
    and is no part of what they are weighed by (Wang et al., arXiv 2408.15664)."""
    experts_sum_to_one: bool = True
    """Whether shares are divided by the sum of those that are taken."""
    experts_scale: float = 1.0
    """Factor on all of them."""
    shared_size: int = 0
    """Inner units of a feed-forward that every position takes beside its experts; 0: there is none (DeepSeekMoE, arXiv 2401.06066)."""
    dense_sizes: tuple[int, ...] = ()
    """Of each layer, inner units of the one feed-forward that it has instead of experts, 0 where it has experts; empty: all have them."""
    qkv_bias: bool = False
    o_bias: bool = False
    attention_sinks: bool = False
    """Each query head has a score of its own, learned, that takes part in the softmax and has no value (gpt-oss; Xiao et al., arXiv
    2309.17453, section 3.3)."""
    mlp_bias: bool = False
    """Of the linears of feed-forwards, those of experts and their router included."""
    rope: RopeSpec | None = None
    """None: learned absolute positions."""
    ropes: tuple[RopeSpec | None, ...] = ()
    """Of each layer, where not all are ``rope``. None: it does not rotate (SmolLM3: one of four)."""
    position_offset: int = 0
    """Learned positions: row of position p is p + position_offset (OPT: 2)."""
    windows: tuple[int, ...] = ()
    """Sliding window of each layer in tokens, 0 for full attention; empty: all full. A query sees the last ``window`` keys,
    itself included."""
    tied: bool = False
    """lm_head is the embedding."""
    embed_size: int = 0
    """Width of the embedding where it differs from hidden_size (OPT-350m); 0: hidden_size."""
    embed_scale: float = 1.0
    """Factor on what is looked up in the embedding."""
    logit_scale: float = 1.0
    """Factor on the logits, and so on what lm_head reads (backends put it into the final norm)."""
    attention_scale: float = 0.0
    """Factor on query-key products; 0: 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """What scaled query-key products are limited by, c tanh(product / c); 0: nothing (Gemma 2, arXiv 2408.00118, section 2)."""
    logit_softcap: float = 0.0
    """The same of logits."""
    dtype: str = "float32"
    """Of the checkpoint: float32, float16 or bfloat16; of what a quantized one becomes where it is not quantized again."""
    stored: tuple[tuple[str, str], ...] = ()
    """(name of a linear, what it is multiplied as: ``int8``; ``int4:32``, by the size of its groups; ``int4:32+offsets``, where groups are
    not centred on zero; ``mxfp4``) for all linears of a checkpoint that is quantized already; a tied lm_head is ``embed``. Empty: it is
    not."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: tuple[tuple[str, float], ...] = ()
    """(name of a sampling parameter, value) that the model's authors recommend, where a request says nothing."""

    @property
    def quantized(self) -> str:
        """The value of --quantize that keeps the linears as they are stored; empty where they are not quantized."""
        kinds = {kind for _, kind in self.stored}
        return "int8" if kinds == {"int8"} else "stored" if kinds else ""

    def widths(self, quantize: str) -> str:
        """Of the linears under a value of --quantize."""
        return " and ".join(sorted({kind.split(":")[0] for _, kind in self.stored})) if quantize == "stored" else quantize

    @property
    def scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5

    @property
    def embedding_size(self) -> int:
        return self.embed_size or self.hidden_size

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def layer_rope(self, layer: int) -> RopeSpec | None:
        return self.ropes[layer] if self.ropes else self.rope

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and not (self.dense_sizes and self.dense_sizes[layer])

    @property
    def expert_layers(self) -> int:
        """How many layers have experts."""
        return self.num_layers - sum(size > 0 for size in self.dense_sizes) if self.num_experts else 0

    @property
    def plain_size(self) -> int:
        """Inner units of the widest feed-forward that is no expert; 0 where there is none."""
        return max(self.shared_size, *self.dense_sizes, 0) if self.num_experts else self.intermediate_size

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape, for every tensor that the model has."""
        h, e, d = self.hidden_size, self.embedding_size, self.head_dim
        q, kv = self.num_heads * d, self.num_kv_heads * d
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, e)}

        def linear(name: str, out: int, inp: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out, inp)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (h,)
            if self.norm_bias:
                shapes[f"{name}.bias"] = (h,)

        if self.rope is None:
            shapes["positions.weight"] = (self.max_positions + self.position_offset, h)
        if e != h:
            linear("embed_in", h, e, False)
            linear("embed_out", e, h, False)
        for i in range(self.num_layers):
            at = f"layers.{i}"
            norm(f"{at}.attn_norm")
            for name, out in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{at}.{name}", out, h, self.qkv_bias)
            linear(f"{at}.o", h, q, self.o_bias)
            if self.attention_sinks:
                shapes[f"{at}.sinks.weight"] = (self.num_heads,)
            if self.head_norm:
                shapes[f"{at}.q_norm.weight"], shapes[f"{at}.k_norm.weight"] = ((q,), (kv,)) if self.heads_as_one else ((d,), (d,))
            norm(f"{at}.mlp_norm")
            if self.norms_behind:
                shapes[f"{at}.attn_out_norm.weight"] = shapes[f"{at}.mlp_out_norm.weight"] = (h,)
            if self.has_experts(i):
                linear(f"{at}.router", self.num_experts, h, self.mlp_bias)
                if self.expert_correction:
                    shapes[f"{at}.correction.bias"] = (self.num_experts,)
            for place, f in self.feed_forwards(i).items():
                if self.gated:
                    linear(f"{place}.gate", f, h, self.mlp_bias)
                linear(f"{place}.up", f, h, self.mlp_bias)
                linear(f"{place}.down", h, f, self.mlp_bias)
        if self.final_norm:
            norm("final_norm")
        if not self.tied:
            linear("lm_head", self.vocab_size, e, False)
        return shapes

    def quantizable(self) -> dict[str, tuple[int, int]]:
        """Name → [out, in] of the linears that may be quantized: all but routers, whose choices hang on small differences. A tied lm_head
        is ``embed``."""
        tables = ("positions",) if self.tied else ("positions", "embed")
        shapes = {full.removesuffix(".weight"): shape for full, shape in self.tensor_shapes().items() if len(shape) == 2}
        return {name: (n, k) for name, (n, k) in shapes.items() if name not in tables and not name.endswith(".router")}

    def feed_forwards(self, layer: int) -> dict[str, int]:
        """Where the linears of a layer's feed-forward are, or of its experts and of what it has beside them → inner units."""
        at = f"layers.{layer}"
        if not self.has_experts(layer):
            return {at: self.dense_sizes[layer] if self.num_experts else self.intermediate_size}
        beside = {f"{at}.shared": self.shared_size} if self.shared_size else {}
        return {f"{at}.experts.{j}": self.intermediate_size for j in range(self.num_experts)} | beside

    def num_parameters(self) -> int:
        """Parameters, a tied lm_head counted once."""
        total = 0
        for shape in self.tensor_shapes().values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Bytes of all weights at one width."""
        return self.num_parameters() * DTYPE_BYTES[dtype or self.dtype]

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes of KV cache for one token position, all layers, keys and values, with their scales."""
        return self.num_layers * self.layer_kv_bytes(kv_dtype)

    def layer_kv_bytes(self, kv_dtype: str) -> int:
        """Of one layer."""
        vector = self.head_dim * DTYPE_BYTES[kv_dtype] + KV_SCALE_BYTES.get(kv_dtype, 0)
        return 2 * self.num_kv_heads * vector

    def matmul_parameters(self) -> int:
        """Parameters that one computed position multiplies by, without lm_head."""
        plain = sum(self.dense_sizes) if self.num_experts else self.num_layers * self.intermediate_size
        mixtures = self.expert_layers * self._mixture_parameters()
        return self.num_layers * self._attention_parameters() + self._inner_parameters(plain) + mixtures

    def layer_matmul_parameters(self, layer: int) -> int:
        """Of one layer."""
        mixed = self.has_experts(layer)
        mlp = self._mixture_parameters() if mixed else self._inner_parameters(sum(self.feed_forwards(layer).values()))
        return self._attention_parameters() + mlp

    def linear_parameters(self) -> int:
        """Of all linears of all layers, those of experts that a position does not take included."""
        return self.matmul_parameters() + self.expert_layers * (self.num_experts - self.experts_per_token) * self.feed_forward_parameters()

    def feed_forward_parameters(self) -> int:
        """Of the linears of one feed-forward, or of one expert."""
        return self._inner_parameters(self.intermediate_size)

    def _inner_parameters(self, inner: int) -> int:
        return (3 if self.gated else 2) * self.hidden_size * inner

    def _attention_parameters(self) -> int:
        return 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim

    def _mixture_parameters(self) -> int:
        """Of a layer's experts, as many as a position takes, with the router and what is beside them."""
        units = self.experts_per_token * self.intermediate_size + self.shared_size
        return self._inner_parameters(units) + self.num_experts * self.hidden_size

    def experts_met(self, positions: float) -> float:
        """Experts of a layer that some of so many positions take, if each takes any of them as often as the others; 0 without experts."""
        if not self.num_experts:
            return 0.0
        left_out: float = (1 - self.experts_per_token / self.num_experts) ** positions
        return self.num_experts * (1 - left_out)


class Extent(Protocol):
    """What steps do, counted: core's StepExtent, which says what each of these is."""

    steps: int
    sampling_steps: int
    positions: int
    keys: int
    context: int
    rows: int
    rows_context: int
    near_keys: int
    near_context: int
    near_rows_context: int


@dataclass(slots=True, frozen=True)
class ModelCost:
    """What the steps of a model ask of a machine, in the widths that it is served in."""

    spec: TransformerSpec
    weight_bytes: int
    """That a step reads, as the backend tells them."""
    head_bytes: int
    """Of which only steps with a row of logits read (lm_head)."""
    kv_dtype: str
    expert_bytes: int = 0
    """Of which experts: a step reads those that its positions take."""
    head_rows: int = 0
    """Tokens of the vocabulary whose logits the machine computes, where several share the model; 0: all."""

    def of(self, extent: Extent) -> StepCost:
        """The operations, and the memory that is read at least: weights once a step, and the KV of every row once. Of several steps
        together, experts are those of as many steps of their mean size.

        Two operations for each multiply-add; norms and activations are left out (below 1 %, and in caches). In the last layer
        positions without a row of logits need keys and values only.
        """
        spec = self.spec
        ends = spec.num_layers - 1
        in_last = spec.layer_matmul_parameters(ends)
        kv = spec.hidden_size * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim  # with the queries, a part of one product
        last = extent.positions * kv + extent.rows * (in_last - kv)
        head = extent.rows * (self.head_rows or spec.vocab_size) * spec.embedding_size
        weights = extent.steps * (self.weight_bytes - self.head_bytes) + extent.sampling_steps * self.head_bytes
        if self.expert_bytes and extent.steps:
            most, least = (spec.experts_met(each / extent.steps) / spec.num_experts for each in (extent.positions, extent.rows))
            met = (most * (spec.expert_layers - 1) + (least if spec.has_experts(ends) else most)) / spec.expert_layers
            weights -= round(extent.steps * self.expert_bytes * (1 - met))
        windowed = sum(window > 0 for window in spec.windows)
        ends_near = spec.window(ends) > 0  # the last layer, which has queries for rows of logits alone
        near, far = windowed - ends_near, spec.num_layers - windowed - (not ends_near)
        context = near * extent.near_context + far * extent.context + (extent.near_rows_context if ends_near else extent.rows_context)
        keys = windowed * extent.near_keys + (spec.num_layers - windowed) * extent.keys
        return StepCost(
            linear_flops=2 * (extent.positions * (spec.matmul_parameters() - in_last) + last + head),
            weight_bytes=weights,
            attention_flops=4 * spec.num_heads * spec.head_dim * context,
            kv_bytes=keys * spec.layer_kv_bytes(self.kv_dtype),
        )
