"""The native CPU kernels: plain arrays in, plain arrays out, no state besides the number of threads and an open Recording.

Conventions. `float32` arrays are C-contiguous along their last axis; matrices and head views may have any larger
distance between rows (and heads), so that q, k and v can be views into one fused buffer. 16-bit floats are `float16`, or
`uint16` for the bits of bfloat16. A wrong dtype is a TypeError, a wrong shape, stride or id a ValueError; both name the
argument, and nothing has been written then. Kernels release the GIL; two at a time wait for each other.

The same bytes: what comes out for a row (a token, a head, a sequence) depends on that row alone, not on its neighbours,
the number of rows, the block size or the number of threads. Two instruction sets may differ from each other.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
F16 = NDArray[np.float16]
Floats = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]
KV = Floats | NDArray[np.int8]

# --- instruction sets, threads, limits ------------------------------------------------------------------------------

def isa() -> str:
    """The instruction set in use: 'avx512bf16', 'avx512vnni', 'avx512', 'avx2' or 'portable'. At import: QUIRE_ISA, or else the best."""

def available_isas() -> list[str]:
    """What this machine has, best first; 'portable' always."""

def set_isa(name: str) -> None:
    """For tests. ValueError if the machine lacks it. A PackedLinear keeps the instruction set that it was packed for."""

def num_threads() -> int: ...
def set_num_threads(n: int) -> None:
    """1 to 256 threads, the caller included."""

def default_num_threads() -> int:
    """CPUs that the affinity mask and the control group's quota allow; what is used until set_num_threads."""

def cpu_quota(root: str = "/") -> float | None:
    """CPUs that the quotas of this process's control group (version 1 or 2) and of the groups above it are worth.

    None without a quota. root: where /proc and /sys are found.
    """

# Each is the best of many short tries with the pool's threads and the instruction set in use.

def measure_read_bandwidth(bytes: int = 1 << 29, seconds: float = 0.2) -> float:
    """GB/s (10^9) of reading the same `bytes` (at least 4096) on huge pages again and again, for so long; the default is far more
    than caches hold. ValueError for numbers out of range."""

def measure_peak(arithmetic: str) -> float:
    """G operations/s (10^9, two for a multiply-add) in registers, of what arithmetic() names: independent multiply-adds of float32; of
    bfloat16, in pairs, with sums in float32 (or of float32, where the instruction set has no such products); of int8 with sums in int32,
    exact for all operands. ValueError for another name."""

def arithmetic(dtype: str) -> str:
    """What linears with weights of such a dtype (float32, float16, bfloat16, int8, int4) multiply: float32, bfloat16 or int8."""

def measure_region(together: bool = False, asleep: bool = False) -> float:
    """Seconds of a parallel region without work, median. together: until every thread has taken a task of it, which an empty
    region does not wait for. asleep: after a pause, so that the threads must be woken."""

# --- steps that come again ------------------------------------------------------------------------------------------

@final
class Recording:
    """Calls of the kernels of layers and of the KV cache (not of the sampler), kept to be run again.

    ``with recording:`` keeps what this thread calls meanwhile, besides running it. Arrays are kept alive, and used where they are:
    same shapes, whatever they hold by then. Ids among it are checked at every run, as at every call.
    """

    def __enter__(self) -> Recording: ...
    def __exit__(self, *args: object) -> None: ...
    def __len__(self) -> int:
        """Calls that it holds."""
    def run(self) -> None: ...

# --- layers ---------------------------------------------------------------------------------------------------------

@final
class PackedLinear:
    """Weights [n, k] in the order in which the inner loop reads them."""

    @property
    def n(self) -> int:
        """Outputs; where gated, half of the weights' rows."""
    @property
    def k(self) -> int: ...
    @property
    def dtype(self) -> str:
        """'float32', 'float16', 'bfloat16', 'int8', 'int4' or 'mxfp4'."""
    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0 for one scale an output, and for floats."""
    @property
    def offsets(self) -> bool:
        """int4: whether groups have not only a scale, but also an offset."""
    @property
    def gated(self) -> bool: ...
    @property
    def panel(self) -> int:
        """Columns in a panel: what the order of the bytes depends on, besides n, k, dtype, group_size, offsets and gated."""
    @property
    def nbytes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def data(self) -> NDArray[np.uint8]:
        """The packed bytes [nbytes], a read-only view that keeps them alive."""
    def set_then(self, then: PackedLinear) -> None:
        """``then`` is usually the next to be read: its first panels are prefetched at the end of this one. Changes no result."""

def pack_linear(weights: Floats | Sequence[Floats], quantize: str | None = None, group_size: int = 0, gated: bool = False) -> PackedLinear:
    """Packs a copy of [n, k] weights. Any strides: pass w.T for weights stored as [k, n].

    Several matrices with the same k and dtype are concatenated along n (q, k, v). gated: two of one shape, gate and up, whose
    outputs are multiplied (see ``linear``). quantize: None keeps their width; 'int8' rounds to whole numbers -127..127, with one
    scale an output (group_size 0) or for each 32, 64 or 128 inputs; 'int4' to -8..7, with such groups always, and of three ways to
    round a group the one with the least squared error. Groups must divide k. Rounding is to nearest even; scales are bfloat16. A NaN
    or infinity among weights that share a scale makes their output NaN.
    """

def pack_blocks(blocks: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], format: str, gated: bool = False) -> PackedLinear:
    """[n, bytes of a row] of tensors of 4 bits, as they are. format: a GGUF type, Q4_0, Q4_1, Q4_K or MXFP4, in groups of 32, Q4_1 and
    Q4_K with offsets; or int4:32, int4:64, int4:128, a group a block: its scale (float32), then its numbers from 0 to 15, the even ones
    in the low halves of bytes; int4:32+offsets and so on, with an offset (float32) behind the scale; or mxfp4, as int4:32, but numbers
    are floats of 4 bits (E2M1), and the scale is half of what they are multiplied by.

    Several are concatenated, or gated, as in ``pack_linear``. Weights stay the numbers that they are; scales and offsets are rounded to
    bfloat16, where an offset is what a number from -8 to 7, times the scale, must be raised by.
    """

def dequantize(blocks: NDArray[np.uint8], format: str, out: NDArray[np.float16]) -> bool:
    """[n, bytes of a row] of a GGUF tensor's blocks, rows at any distance → out [n, k] float16, contiguous. format: ggml's name for the
    type, Q4_K for example. False, and nothing done, for one that is not known here. What overflows is infinite."""

def load_packed(
    data: NDArray[np.uint8], n: int, k: int, dtype: str, group_size: int = 0, gated: bool = False, offsets: bool = False
) -> PackedLinear:
    """A linear over the bytes of another's ``data``, in place (a mapped file), for the instruction set in use.

    They must come from one with the same n, k, dtype, group_size, gated, offsets and ``panel()`` and lie at a multiple of 64 bytes; a wrong
    size is a ValueError. Other bytes than that give other numbers, never a crash.
    """

def panel() -> int:
    """Columns in a panel of the instruction set in use."""

def linear(
    packed: PackedLinear, x: F32, out: F32, bias: F32 | None = None, accumulate: bool = False, activation: str | None = None
) -> None:
    """out[m, n] = act(x[m, k] W^T (+ bias[n])); with accumulate, out += that (the sum is added after the chain).

    activation: 'silu', 'gelu', 'gelu_tanh', 'relu', or None for none. Gated, out = act(x G^T (+ bias[:n])) * (x U^T (+ bias[n:]));
    then also 'swiglu_oai', see TransformerSpec.
    The bytes are those of each of these operations by itself.

    With quantized weights each row of x is rounded to whole numbers -127..127 times max|x| / 127 first, 128 positions at a time where
    weights have groups, 1,024 where not; a row with a NaN or an infinity gives NaN. x and out must not overlap.
    """

@final
class Experts:
    """The feed-forwards of a mixture of experts, whose bytes are moved together; views of a linear's ``data`` from before are void."""

    def __init__(
        self,
        up: tuple[PackedLinear, ...],
        down: tuple[PackedLinear, ...],
        taken: int,
        sum_to_one: bool,
        up_bias: F32 | None = None,
        down_bias: F32 | None = None,
        correction: F32 | None = None,
        sigmoid: bool = False,
        scale: float = 1.0,
    ) -> None:
        """up [n, k], gated or not, and down [k, n] of each expert; those of one list are of one kind. taken: experts of a row, those with
        the highest scores; of equal ones the first. Their weights are their shares of the softmax of all scores, or the sigmoids of their
        own (sigmoid), divided by their sum (sum_to_one), times scale. correction [experts]: those are taken whose share with it added is
        the highest. up_bias [experts, n] (gated: 2 n, the gates' first) and down_bias [experts, k]; all three are copied."""
    @property
    def count(self) -> int: ...
    @property
    def taken(self) -> int: ...
    @property
    def dtype(self) -> str:
        """As of a PackedLinear, of up; and so is ``gated``."""
    @property
    def gated(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    def set_then(self, then: PackedLinear) -> None:
        """See PackedLinear."""

def experts(
    experts: Experts, x: F32, scores: F32, out: F32, rows: F32, inner: F32, accumulate: bool = False, activation: str | None = None
) -> None:
    """out[m, k] = the weighed sum of what the experts that scores [m, experts] choose give for x [m, k]; with accumulate, out += that.

    rows [m * taken, k] and inner [m * taken, n] are memory to work in. Each expert is ``linear`` with up and the activation, then with
    down; the sum goes over a row's experts by score, as a chain of multiply-adds. A NaN among the scores makes the row NaN.
    """

def rms_norm(x: F32, weight: F32, eps: float, out: F32, accumulate: bool = False) -> None:
    """out = (accumulate: out +=) x / sqrt(mean(x^2) + eps) * weight over the last axis. x and out: [m, d], or [m, heads, d] (a norm for
    each head), maybe strided, maybe the same memory."""

def layer_norm(x: F32, weight: F32, bias: F32 | None, eps: float, out: F32) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias, likewise."""

def rotary(x: F32, positions: I32, cos: F32, sin: F32, scale: F32 | None = None) -> None:
    """Rotates the first 2 * cos.shape[1] dimensions of each head of x [m, heads, head_dim], in place, half-split (Llama):
    dimension i pairs with i + cos.shape[1]. cos and sin: [max_position, half], contiguous. scale [max_position]: a factor on what
    was rotated."""

def embed(ids: I32, table: Floats, out: F32, scale: float = 1.0) -> None:
    """out[i] = table[ids[i]] * scale. The table may be a read-only mapping."""

def add_rows(ids: I32, table: Floats, out: F32) -> None:
    """out[i] += table[ids[i]] (learned positions)."""

def softcap(x: F32, cap: float) -> None:
    """x = cap * tanh(x / cap), in place; x [m, n]. NaN stays NaN."""

def convert(x: Floats, out: Floats) -> None:
    """Element by element to the dtype of out, rounding to nearest even. Both contiguous, of the same size."""

# --- the KV cache ---------------------------------------------------------------------------------------------------
# One layer's k_cache is [blocks, kv_heads, head_dim, block_size], its v_cache [blocks, kv_heads, block_size, head_dim];
# block_size is a power of two from 4 to 256, the dtype float32, float16, uint16 (bfloat16) or int8. A cache of int8 has
# k_scales and v_scales [blocks, kv_heads, block_size], float16: the number of a head's vector of a token is its int8 times
# the scale. Other caches have none.
# Tokens of a step lie one sequence after the other: those of sequence s are query_start[s] to query_start[s + 1] - 1, the
# first of them at absolute position start[s]; its blocks are row rows[s] of block_tables [any, max_blocks].

def write_kv(
    k: F32,
    v: F32,
    k_cache: KV,
    v_cache: KV,
    block_tables: I32,
    rows: I32,
    query_start: I32,
    start: I32,
    k_scales: F16 | None = None,
    v_scales: F16 | None = None,
) -> None:
    """Stores k and v [tokens, kv_heads, head_dim] (maybe views of a fused buffer) at the tokens' positions.

    int8: scale = max|x| / 127 over a head's vector of a token, rounded to float16, and round(x / scale). A vector with a NaN
    or an infinity gets the scale NaN.
    """

def paged_attention(
    q: F32,
    k_cache: KV,
    v_cache: KV,
    out: F32,
    block_tables: I32,
    rows: I32,
    query_start: I32,
    start: I32,
    scale: float,
    window: int = 0,
    k_scales: F16 | None = None,
    v_scales: F16 | None = None,
    sinks: F32 | None = None,
    softcap: float = 0.0,
    share: bool | None = None,
) -> int:
    """Causal attention of q [tokens, heads, head_dim] into out [tokens, heads * head_dim].

    The query at position p sees keys 0..p, or with a window the last `window` of these. Prefill, chunks and decode mix
    freely. heads is a multiple of kv_heads; head h reads KV head h // (heads // kv_heads). Blocks that lie wholly before
    every window of their sequence may be gone from the table. sinks [heads]: a score of each head that takes part in the softmax of the
    scaled products and has no value. softcap: products become softcap * tanh(product / softcap) once they are scaled; 0: they stay.

    Keys that lie in the same blocks for several sequences of the call are read once for all of them, where it pays (share:
    always, or never); the bytes are the same. Returns how many reads of 64 keys (by all KV heads) that saved.
    """

def copy_blocks(cache: NDArray[Any], pairs: I32) -> None:
    """cache[dst] = cache[src] for each (src, dst) of pairs [n, 2], in order."""

def fill_blocks(cache: Floats, ids: I32, value: float) -> None:
    """cache[id] = value for each id."""

# --- sampling -------------------------------------------------------------------------------------------------------

def sample(
    logits: F32,
    tokens: I32,
    status: I32,
    *,
    temperature: F32,
    seed: NDArray[np.uint64],
    position: NDArray[np.int64],
    top_k: I32 | None = None,
    top_p: F32 | None = None,
    min_p: F32 | None = None,
    repetition_penalty: F32 | None = None,
    frequency_penalty: F32 | None = None,
    presence_penalty: F32 | None = None,
    prompt_start: I32 | None = None,
    prompt_ids: I32 | None = None,
    output_start: I32 | None = None,
    output_ids: I32 | None = None,
    bias_start: I32 | None = None,
    bias_ids: I32 | None = None,
    bias_values: F32 | None = None,
    banned_start: I32 | None = None,
    banned_ids: I32 | None = None,
    allowed_mask: I32 | NDArray[np.uint32] | None = None,
    mask_index: I32 | None = None,
    num_logprobs: I32 | None = None,
    logprob: F32 | None = None,
    rank: I32 | None = None,
    top_ids: I32 | None = None,
    top_logprobs: F32 | None = None,
) -> None:
    """One token for each row of logits [rows, vocab] into tokens [rows]; logits are not changed.

    Parameters are arrays of length rows. Lists of different lengths are flat, with row s at start[s]:start[s + 1].
    In this order:

    1. Where num_logprobs[s] >= 0: logprob[s] of the chosen token and its rank[s] (1 + the number of tokens with a greater
       logit), and the num_logprobs[s] likeliest into top_ids and top_logprobs [rows, n >= max(num_logprobs)] (descending,
       ties by lower id, the rest -1 and -inf); all from the unchanged logits. Only a token with the greatest logit has the
       greatest log-probability: one that would round to it gets the next smaller float.
    2. Tokens whose bit is 0 in allowed_mask [masks, ceil(vocab / 32)] (bit t % 32 of word t // 32), and banned_ids, get
       -inf; row s has mask mask_index[s], none where that is -1, and mask s without a mask_index;
       bias_values are added to the logits of bias_ids.
    3. repetition_penalty r for each distinct token of prompt_ids and output_ids (logit / r if positive, else * r); then
       minus frequency_penalty * its count in output_ids, minus presence_penalty if it is there at all.
    4. temperature: 0 takes the greatest logit (ties: the lowest id) and ends here; otherwise logits are divided by it.
    5. min_p: keeps tokens with at least min_p times the probability of the likeliest.
    6. top_k: keeps the k likeliest, ties by lower id; 0 or -1 keeps all.
    7. top_p: keeps the smallest set of likeliest tokens that holds at least top_p of what is left; at least one.
    8. Draws from what is kept, in ascending order of ids, with uniform(seed[s], position[s]).

    status[s] is 0; or 1 if the logits contain NaN or +inf, 2 if no token is allowed: tokens[s] is -1 then.
    """

def score(
    logits: F32,
    tokens: I32,
    status: I32,
    *,
    num_logprobs: I32,
    logprob: F32,
    rank: I32,
    top_ids: I32 | None = None,
    top_logprobs: F32 | None = None,
) -> None:
    """What ``sample`` reports of the tokens that it chooses (1. there), of ``tokens`` [rows] that are there already; the same bytes.

    status[s] is 0; or 1 if the logits contain NaN or +inf, 2 if all are -inf: rank[s] is -1 then.
    """

def uniform(seed: int, position: int) -> float:
    """Philox4x32-10 at counter `position` under key `seed`: in [0, 1), 53 bits."""
