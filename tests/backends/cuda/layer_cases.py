"""Numbers to compute with, and what is close enough to float64."""

import math

import numpy as np
import pytest
import torch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

ACTIVATIONS = {
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: v * 0.5 * np.array([math.erfc(-e / math.sqrt(2)) for e in v.ravel()]).reshape(v.shape),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
}
GATED = {kind: lambda gate, up, of=of: of(gate) * up for kind, of in ACTIVATIONS.items()} | {
    "swiglu_oai": lambda gate, up: np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7))) * (np.clip(up, -7, 7) + 1)
}


def normal(seed, *shape, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).to(dtype)


def exact(x):
    return x.double().numpy()


def same(a, b):
    """Bit for bit, NaN as well."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_close(got, expected, dtype):
    error = np.linalg.norm(exact(got) - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[dtype], error
