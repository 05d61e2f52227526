"""All of them, by the names that the decoder calls."""

from quire.backends.cuda.kernels.adjustments import ban, bias, penalize, restrict
from quire.backends.cuda.kernels.attention import decode, prefill
from quire.backends.cuda.kernels.copies import copy_blocks, fill_blocks
from quire.backends.cuda.kernels.experts import experts, route
from quire.backends.cuda.kernels.kv_write import write_kv
from quire.backends.cuda.kernels.layers import activate, layer_norm, rms_norm, softcap
from quire.backends.cuda.kernels.linear import gated_linear, linear
from quire.backends.cuda.kernels.logprobs import report
from quire.backends.cuda.kernels.sampling import sample
from quire.backends.cuda.kernels.tokens import embed, put_tokens

__all__ = [
    "activate", "ban", "bias", "copy_blocks", "decode", "embed", "experts", "fill_blocks", "gated_linear", "layer_norm", "linear",
    "penalize", "prefill", "put_tokens", "report", "restrict", "rms_norm", "route", "sample", "softcap",
    "write_kv",
]  # fmt: skip
