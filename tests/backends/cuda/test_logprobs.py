"""Reported log-probabilities: reference and kernels (interpreted) against float64, and against the CPU's kernel."""

import math

import numpy as np
import pytest
import torch

from quire.backends.cuda.kernels import logprobs as kernels
from quire.backends.cuda.reference import logprobs as reference

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning", "ignore:.*divide by zero.*:RuntimeWarning")
MODULES = pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "kernels"])


def report(module, logits, tokens, width):
    logits = logits if isinstance(logits, torch.Tensor) else torch.from_numpy(logits)
    found = module.report(logits, torch.tensor(tokens, dtype=torch.int32), width)
    assert [x.dtype for x in found] == [torch.float32, torch.int32, torch.int32, torch.float32]
    assert [x.shape[0] for x in found] == [len(logits)] * 4
    assert found[2].shape == found[3].shape == (len(logits), width)
    return [x.numpy() for x in found]


def check(found, logits, tokens, width):
    logprob, rank, top_ids, top_logprobs = found
    count = min(width, logits.shape[1])
    for row, z in enumerate(logits.astype(np.float64)):
        exact = z - z.max() - np.log(np.exp(z - z.max()).sum())
        order = np.argsort(-z, kind="stable")
        np.testing.assert_allclose(logprob[row], exact[tokens[row]], rtol=1e-6, atol=1e-6)
        assert rank[row] == 1 + (z > z[tokens[row]]).sum()
        assert top_ids[row, :count].tolist() == order[:count].tolist()
        np.testing.assert_allclose(top_logprobs[row, :count], exact[order[:count]], rtol=1e-6, atol=1e-6)
        assert (top_ids[row, count:] == -1).all()
        assert (top_logprobs[row, count:] == -np.inf).all()


@MODULES
@pytest.mark.parametrize(("vocab", "widths"), [(1, [0, 1, 3]), (3, [2, 3]), (64, [0, 5, 64]), (1000, [20, 130]), (5003, [3])])
def test_log_probabilities(module, vocab, widths):
    rng = np.random.default_rng(vocab)
    logits = np.round(rng.standard_normal((3, vocab)) * 3, 1).astype(np.float32)  # rounded, for ties
    logits[1] += 50
    for width in widths:
        tokens = [int(z.argmax()) if row == 0 else int(rng.integers(vocab)) for row, z in enumerate(logits)]
        check(report(module, logits, tokens, width), logits, tokens, width)


@MODULES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(module, dtype):
    logits = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 500)).astype(np.float32) * 3).to(dtype)
    check(report(module, logits, [4, 70], 9), logits.float().numpy(), [4, 70], 9)


@MODULES
def test_rows_without_a_report(module):
    logits = np.zeros((6, 40), np.float32)
    logits[0, 4], logits[1, 4], logits[2, 7], logits[3, :] = 2.0, -np.inf, np.nan, -np.inf
    logprob, rank, top_ids, top_logprobs = report(module, logits, [9, 4, 0, 0, -1, 39], 3)
    assert rank.tolist() == [2, 40, -1, -1, -1, 1]
    assert logprob[1] == -np.inf
    assert (logprob[2:5] == -np.inf).all()
    assert logprob[0] == pytest.approx(-np.log(39 + np.exp(2.0)), rel=1e-6)
    assert top_ids.tolist() == [[4, 0, 1], [0, 1, 2], [-1] * 3, [-1] * 3, [-1] * 3, [0, 1, 2]]
    assert (top_logprobs[2:5] == -np.inf).all()
    # What can't be is listed too, where there is nothing else; and in a kernel that sorts.
    logits = np.full((1, 40), -np.inf, np.float32)
    logits[0, 39] = 1.0
    for width in (3, 40):
        logprob, rank, top_ids, top_logprobs = report(module, logits, [39], width)
        assert (logprob[0], rank[0], top_ids[0, :3].tolist()) == (0, 1, [39, 0, 1])
        assert top_logprobs[0].tolist() == [0.0] + [-math.inf] * (width - 1)
    assert [len(x) for x in report(module, np.zeros((0, 40), np.float32), [], 2)] == [0] * 4


@MODULES
def test_only_the_greatest_logit_has_the_greatest_logprob(module):
    """Logits one step of float32 apart, whose log-probabilities would round to the same number."""
    logits = np.full((2, 9000), 0.001, np.float32)
    logits[:, 11] = np.float32(0.0010001)
    logits[:, 40] = np.nextafter(np.float32(0.0010001), np.float32(1))
    logprob, rank, top_ids, top_logprobs = report(module, logits, [11, 40], 3)
    assert rank.tolist() == [2, 1]
    assert top_ids[:, :2].tolist() == [[40, 11], [40, 11]]
    assert logprob[1] == top_logprobs[0, 0] > top_logprobs[0, 1] == logprob[0]
    # Where the likeliest token has all the mass, and a log-probability of 0.
    certain = np.full((1, 5), -200.0, np.float32)
    certain[0, 2], certain[0, 3] = 1000.0, 999.99994
    logprob, _, _, top_logprobs = report(module, certain, [2], 2)
    assert logprob[0] == top_logprobs[0, 0] > top_logprobs[0, 1]
    certain[0, 3] = -200.0
    assert report(module, certain, [2], 0)[0][0] == 0


@MODULES
def test_a_row_is_reported_as_if_it_were_alone(module):
    logits = np.random.default_rng(7).standard_normal((3, 300)).astype(np.float32)
    together = report(module, logits, [1, 2, 3], 4)
    for row in range(3):
        for a, b in zip(report(module, logits[row : row + 1], [1 + row], 4), together, strict=True):
            np.testing.assert_array_equal(a[0], b[row])


@pytest.mark.parametrize("vocab", [1, 7, 97, 2500, 40_000])
def test_reference_reports_what_the_cpu_reports(vocab):
    native = pytest.importorskip("quire.backends.cpu._native")
    rng = np.random.default_rng(vocab)
    count, width = 20, min(vocab, 6)
    logits = (rng.standard_normal((count, vocab)) * 3).astype(np.float32)
    logits[5, :], logits[6, : vocab // 2], logits[7, 0], logits[8, :] = 1.5, -np.inf, np.nan, -np.inf
    logits[9:] = np.round(logits[9:], 1)
    tokens, status = rng.integers(vocab, size=count).astype(np.int32), np.zeros(count, np.int32)
    expected = [
        np.zeros(count, np.float32),
        np.zeros(count, np.int32),
        np.zeros((count, width), np.int32),
        np.zeros((count, width), np.float32),
    ]
    names = ("logprob", "rank", "top_ids", "top_logprobs")
    native.score(logits, tokens, status, num_logprobs=np.full(count, width, np.int32), **dict(zip(names, expected, strict=True)))
    found = report(reference, logits, tokens.tolist(), width)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-6, atol=1e-6)
