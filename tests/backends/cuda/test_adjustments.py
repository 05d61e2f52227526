"""Masks, bans, biases and penalties: reference and kernels (interpreted) against NumPy, and against the CPU's kernel. Bit for bit: there is
one rounding at a time, and the same everywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.backends.cuda.kernels import adjustments as kernels
from quire.backends.cuda.reference import adjustments as reference
from quire.backends.cuda.reference.sampling import sample
from quire.backends.cuda.sampling_tensors import SamplingTensors

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
MODULES = pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "kernels"])


def random_logits(rows, vocab, seed=0):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


def flat(lists):
    start = np.cumsum([0] + [len(x) for x in lists], dtype=np.int32)
    return torch.from_numpy(start), torch.tensor([t for x in lists for t in x], dtype=torch.int32)


def apart(logits):
    """The same rows, with room between them that must stay as it is."""
    padded = torch.full((len(logits), logits.shape[1] + 3), 55.0)
    padded[:, : logits.shape[1]] = torch.from_numpy(logits)
    return padded, padded[:, : logits.shape[1]]


def pack(allowed):
    padded = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), bool)
    padded[:, : allowed.shape[1]] = allowed
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


@MODULES
@pytest.mark.parametrize("vocab", [1, 31, 33, 97, 5000])
def test_restrict(module, vocab):
    logits = random_logits(5, vocab)
    logits[4, 0], logits[3, -1] = np.nan, np.inf
    allowed = np.random.default_rng(vocab).random((3, vocab)) < 0.5
    index = np.array([1, -1, 0, 2, 2], np.int32)
    expected = logits.copy()
    for row, mask in enumerate(index):
        if mask >= 0:
            expected[row][~allowed[mask] & (logits[row] < np.inf)] = -np.inf
    padded, z = apart(logits)
    module.restrict(z, pack(allowed), torch.from_numpy(index))
    np.testing.assert_array_equal(z.numpy(), expected)
    assert (padded[:, vocab:] == 55).all()
    module.restrict(z, torch.zeros((0, -(-vocab // 32)), dtype=torch.int32), torch.full((5,), -1, dtype=torch.int32))
    np.testing.assert_array_equal(z.numpy(), expected)


@MODULES
def test_ban_and_bias(module):
    vocab = 700
    logits = random_logits(5, vocab)
    logits[1, 5] = np.nan
    banned = [[], [5, 7, 7, 699], [0], list(range(600)), []]
    biased = [{3: 1.5, 699: -np.inf}, {5: 1.0}, {}, {0: 100.0, 650: -7.25}, {t: t / 3 for t in range(0, 700, 2)}]
    expected = logits.copy()
    for row, tokens in enumerate(banned):
        expected[row, [t for t in tokens if logits[row, t] < np.inf]] = -np.inf
    padded, z = apart(logits)
    start, ids = flat(banned)
    module.ban(z, start, torch.cat([ids, torch.tensor([1, 2], dtype=torch.int32)]))  # room after the last row's
    np.testing.assert_array_equal(z.numpy(), expected)
    for row, values in enumerate(biased):
        for t, value in values.items():
            expected[row, t] += np.float32(value)
    start, ids = flat([list(b) for b in biased])
    values = torch.tensor([v for b in biased for v in b.values()], dtype=torch.float32)
    module.bias(z, start, ids, values)
    np.testing.assert_array_equal(z.numpy(), expected)
    assert (padded[:, vocab:] == 55).all()
    module.ban(z, torch.zeros(6, dtype=torch.int32), ids[:0])
    np.testing.assert_array_equal(z.numpy(), expected)


def penalized(z, prompt, output, repetition, frequency, presence):
    """One row, as the CPU does it."""
    repetition, frequency, presence = np.float32(repetition), np.float32(frequency), np.float32(presence)
    z = z.copy()
    for t in set(prompt) | set(output):
        z[t] = z[t] / repetition if z[t] > 0 else z[t] * repetition
    for t in set(output):
        z[t] = z[t] - frequency * np.float32(output.count(t))
        z[t] = z[t] - presence
    return z


PENALTIES = [
    (1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.5, 0.0, 0.0), (1.0, 0.7, 0.2), (1.0, -1.5, 0.0), (1.0, 0.0, 1.1), (1.17, 0.1, -0.3),
    (1e-6, 2.0, 2.0),
]  # fmt: skip


@MODULES
@pytest.mark.parametrize("vocab", [1, 97, 5000])
def test_penalize(module, vocab, monkeypatch):
    monkeypatch.setattr(kernels, "PENALIZED_ROWS", 3)  # more than one part
    rng = np.random.default_rng(vocab)
    count, length = len(PENALTIES), 700
    table = rng.integers(0, min(vocab, 300), (count + 2, length)).astype(np.int32)
    table[:, -1] = -1
    rows = rng.permutation(count + 2)[:count].astype(np.int32)
    lengths = np.array([10, 700, 699, 650, 5, 20, 600, 690], np.int32)
    prompt = np.array([4, 0, 698, 520, 5, 1, 7, 689], np.int32)
    logits = random_logits(count, vocab, 2)
    logits[1, 0] = np.nan
    expected = np.stack(
        [
            penalized(logits[i], *(x[x >= 0].tolist() for x in (table[r, :p], table[r, p:n])), *PENALTIES[i])
            for i, (r, p, n) in enumerate(zip(rows, prompt, lengths, strict=True))
        ]
    )
    padded, z = apart(logits)
    columns = [torch.tensor(c, dtype=torch.float32) for c in zip(*PENALTIES, strict=True)]
    arguments = [torch.from_numpy(a) for a in (table, rows, prompt, lengths)]
    module.penalize(z, *arguments, *columns)
    np.testing.assert_array_equal(z.numpy(), expected)
    assert (padded[:, vocab:] == 55).all()
    alone = torch.from_numpy(logits[6:7].copy())
    module.penalize(alone, arguments[0], *(a[6:7] for a in arguments[1:]), *(c[6:7] for c in columns))
    np.testing.assert_array_equal(alone.numpy(), expected[6:7])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_reference_changes_what_the_cpu_changes(data, seed):
    """All of it, and then a greedy token, and a drawn one."""
    native = pytest.importorskip("quire.backends.cpu._native")
    vocab, count = 40, 3
    tokens = st.lists(st.integers(0, vocab - 1), max_size=12)
    prompts, outputs, banned = ([data.draw(tokens) for _ in range(count)] for _ in range(3))
    biased = [{t: float(np.float32(t) / 7 - 2) for t in data.draw(tokens)} for _ in range(count)]
    penalties = [
        np.array([data.draw(st.sampled_from(v)) for _ in range(count)], np.float32) for v in ([1, 1.3, 0.7], [0, 0.4, -1], [0, 0.9])
    ]
    logits = random_logits(count, vocab, seed)
    allowed = np.random.default_rng(seed).random((count, vocab)) < 0.7
    draws = {"temperature": np.array([0, 1, 0.6], np.float32), "seed": np.arange(count, dtype=np.uint64), "position": np.arange(count)}
    lists = {}
    for name, values in (("prompt", prompts), ("output", outputs), ("banned", banned), ("bias", [list(b) for b in biased])):
        lists[f"{name}_start"], lists[f"{name}_ids"] = (x.numpy() for x in flat(values))
    values = np.array([v for b in biased for v in b.values()], np.float32)
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    expected, status = np.zeros(count, np.int32), np.zeros(count, np.int32)
    lists |= {"bias_values": values, "allowed_mask": pack(allowed).numpy()}
    native.sample(logits, expected, status, **draws, **lists, **dict(zip(names, penalties, strict=True)))
    z = torch.from_numpy(logits)
    reference.restrict(z, pack(allowed), torch.arange(count, dtype=torch.int32))
    reference.ban(z, *flat(banned))
    reference.bias(z, *flat([list(b) for b in biased]), torch.from_numpy(values))
    table = torch.zeros((count, 30), dtype=torch.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        table[row, : len(prompt) + len(output)] = torch.tensor(prompt + output)
    lengths = [torch.tensor([len(x) for x in y], dtype=torch.int32) for y in (prompts, outputs)]
    rows = torch.arange(count, dtype=torch.int32)
    reference.penalize(z, table, rows, lengths[0], lengths[0] + lengths[1], *(torch.from_numpy(p) for p in penalties))
    given_tensors = {name: torch.from_numpy(value.astype(np.int64) if name == "seed" else value) for name, value in draws.items()}
    off, zeros = torch.ones(count), torch.zeros(count)
    found = sample(z, SamplingTensors(top_k=rows * 0, top_p=off, min_p=zeros, **given_tensors))
    assert [x.tolist() for x in found] == [expected.tolist(), status.tolist()]
