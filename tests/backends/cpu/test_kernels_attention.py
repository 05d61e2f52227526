"""Paged attention: right against float64, and the same bytes however a sequence was cut, placed and accompanied."""

import ml_dtypes
import numpy as np
import pytest

from quire.backends.cpu import _native as native

pytestmark = pytest.mark.usefixtures("isa", "threads")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


class Layer:
    """One layer's cache, NaN wherever nothing was written, with blocks dealt out at random."""

    def __init__(self, kv_heads, head_dim, block_size, dtype="float32", blocks=400, sequences=8, seed=0):
        self.block_size, self.dtype = block_size, DTYPES[dtype]
        nothing = 77 if dtype == "int8" else np.nan
        self.k = np.full((blocks, kv_heads, head_dim, block_size), nothing, np.float32).astype(self.dtype)
        self.v = np.full((blocks, kv_heads, block_size, head_dim), nothing, np.float32).astype(self.dtype)
        self.scales = {}
        if dtype == "int8":
            self.scales = {name: np.full((blocks, kv_heads, block_size), np.nan, np.float16) for name in ("k_scales", "v_scales")}
        self.tables = np.full((sequences, blocks), -1, np.int32)
        self.free = list(np.random.default_rng(seed).permutation(blocks))

    def grow(self, row, tokens):
        for b in range(-(-tokens // self.block_size)):
            if self.tables[row, b] < 0:
                self.tables[row, b] = self.free.pop()

    def arrays(self):
        return (self.k.view(np.uint16), self.v.view(np.uint16)) if self.dtype == ml_dtypes.bfloat16 else (self.k, self.v)

    def run(self, parts, heads, scale, window=0, share=None, sinks=None, softcap=0.0):
        """parts: (row, start, q, k, v) each. Writes k and v, attends, and returns one output for each part."""
        rows = np.array([p[0] for p in parts], np.int32)
        start = np.array([p[1] for p in parts], np.int32)
        query_start = np.cumsum([0] + [len(p[2]) for p in parts], dtype=np.int32)
        for row, first, q, _, _ in parts:
            self.grow(row, first + len(q))
        # q, k and v as views into one fused buffer, as the decoder has them.
        q, k, v = (np.concatenate([p[i] for p in parts]) for i in (2, 3, 4))
        fused = np.concatenate([q, k, v], axis=1)
        kv_heads = k.shape[1]
        where = (self.tables, rows, query_start, start)
        native.write_kv(fused[:, heads : heads + kv_heads], fused[:, heads + kv_heads :], *self.arrays(), *where, **self.scales)
        out = np.full((len(q), heads * q.shape[2]), np.nan, np.float32)
        options = {**self.scales, "share": share, "sinks": sinks, "softcap": softcap}
        self.saved = native.paged_attention(fused[:, :heads], *self.arrays(), out, *where, scale, window, **options)
        return np.split(out, query_start[1:-1])


def tokens(seed, n, heads, kv_heads, dim):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((n, h, dim)).astype(np.float32) for h in (heads, kv_heads, kv_heads))


def stored(x, dtype):
    """[tokens, heads, dim] as a cache of ``dtype`` holds it."""
    if dtype != "int8":
        return x.astype(DTYPES[dtype])
    scale = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0, dtype=np.float32)
    return np.clip(np.rint(x * inverse), -127, 127).astype(np.float64) * scale


def reference(q, k, v, scale, window=0, last=None, sinks=None, softcap=0.0):
    """All queries of a whole sequence (or the last few), in float64."""
    n, heads, dim = q.shape
    first = 0 if last is None else n - last
    group = heads // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (k, v))
    s = np.einsum("qhd,khd->hqk", q[first:].astype(np.float64), k) * scale
    if softcap:
        s = softcap * np.tanh(s / softcap)
    i, j = np.arange(first, n)[:, None], np.arange(n)[None]
    s = np.where((j <= i) & ((window == 0) | (j > i - window)), s, -np.inf)
    most = s.max(-1, keepdims=True)
    rest = 0.0
    if sinks is not None:
        each = np.broadcast_to(sinks.astype(np.float64)[:, None, None], most.shape)
        most = np.maximum(most, each)
        rest = np.exp(each - most)
    p = np.exp(s - most)
    return np.einsum("hqk,khd->qhd", p / (p.sum(-1, keepdims=True) + rest), v).reshape(n - first, heads * dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "n", "window"),
    [(1, 1, 8, 4, 1, 0), (4, 2, 64, 16, 70, 0), (9, 3, 64, 16, 130, 0), (6, 6, 20, 8, 65, 0), (8, 1, 128, 32, 90, 0),
     (4, 4, 12, 64, 100, 30), (5, 1, 80, 256, 600, 0), (2, 1, 256, 128, 530, 100), (3, 1, 33, 4, 77, 1)],
)  # fmt: skip
def test_matches_float64(dtype, heads, kv_heads, dim, block_size, n, window):
    q, k, v = tokens(n + dim, n, heads, kv_heads, dim)
    layer = Layer(kv_heads, dim, block_size, dtype)
    out = layer.run([(2, 0, q, k, v)], heads, dim**-0.5, window)[0]
    exact = reference(q, stored(k, dtype), stored(v, dtype), dim**-0.5, window)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "n", "window"), [(4, 2, 64, 70, 0), (9, 3, 20, 130, 30), (5, 1, 80, 1100, 0)])
@pytest.mark.parametrize(
    "options", [{"sinks": (-3, 6)}, {"softcap": 0.7}, {"sinks": (-1, 1), "softcap": 2.0}], ids=["sinks", "cap", "both"]
)
def test_what_softmax_is_of(dtype, heads, kv_heads, dim, n, window, options):
    """Scores beside it and limits of scores, in whole prompts, chunks, single queries and any number of threads: the same bytes."""
    q, k, v = tokens(n, n, heads, kv_heads, dim)
    if ends := options.get("sinks"):
        options = options | {"sinks": np.linspace(*ends, heads).astype(np.float32)}
    whole = Layer(kv_heads, dim, 16, dtype).run([(2, 0, q, k, v)], heads, dim**-0.5, window, **options)[0]
    exact = reference(q, stored(k, dtype), stored(v, dtype), dim**-0.5, window, **options)
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=3e-6)
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        layer, at = Layer(kv_heads, dim, 8, dtype), 0
        for size in (1, 1, 40, 1, n - 44, 1):
            cut = slice(at, at + size)
            out = layer.run([(1, at, q[cut], k[cut], v[cut])], heads, dim**-0.5, window, **options)[0]
            assert np.array_equal(out.view(np.uint32), whole[cut].view(np.uint32)), (threads, at, size)
            at += size


def test_sinks_of_any_size():
    """One that nothing is beside, one that is beside nothing, and what is not finite."""
    q, k, v = tokens(7, 50, 4, 2, 32)
    without = Layer(2, 32, 16).run([(0, 0, q, k, v)], 4, 0.3)[0].reshape(50, 4, 32)
    sinks = np.array([-1e30, 1e30, np.nan, -np.inf], np.float32)
    found = Layer(2, 32, 16).run([(0, 0, q, k, v)], 4, 0.3, sinks=sinks)[0].reshape(50, 4, 32)
    np.testing.assert_allclose(found[:, [0, 3]], without[:, [0, 3]], rtol=1e-6)
    assert not found[:, 1].any()
    assert np.isnan(found[:, 2]).all()


@pytest.mark.parametrize("block_size", [4, 16])
def test_int8_is_near_what_it_rounds(block_size):
    """Large and tiny vectors, zeros and one outlier: half a step of the vector's own scale at most, and nothing where it is 0."""
    rng = np.random.default_rng(40)
    kv_heads, dim, n = 3, 40, 20
    k = rng.standard_normal((n, kv_heads, dim)).astype(np.float32) * 10.0 ** rng.integers(-6, 5, (n, kv_heads, 1))
    k = k.astype(np.float32)
    k[3], k[4, 1, 7], v = 0, 1000, k[::-1].copy()
    layer = Layer(kv_heads, dim, block_size, "int8")
    layer.run([(0, 0, np.zeros((n, kv_heads, dim), np.float32), k, v)], kv_heads, 1.0)
    for cache, scales, x, axes in ((layer.k, "k_scales", k, (0, 3, 1, 2)), (layer.v, "v_scales", v, (0, 2, 1, 3))):
        blocks = layer.tables[0, : -(-n // block_size)]
        numbers = cache[blocks].transpose(axes).reshape(-1, kv_heads, dim)[:n].astype(np.float64)
        scale = layer.scales[scales][blocks].transpose(0, 2, 1).reshape(-1, kv_heads, 1)[:n].astype(np.float64)
        assert np.array_equal(numbers * scale, stored(x, "int8"))
        assert (abs(numbers * scale - x) <= 0.5001 * scale + 127 * 3e-8).all()  # float16 has no scale below 6e-8
        assert not numbers[x == 0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_does_not_hide_what_is_not_finite(bad):
    q, k, v = tokens(41, 9, 2, 2, 16)
    k[4, 0, 3] = v[6, 1, 2] = bad
    layer = Layer(2, 16, 4, "int8")
    out = layer.run([(0, 0, q, k, v)], 2, 0.3)[0].reshape(9, 2, 16)
    wrong = np.isnan(out).any(-1)
    assert wrong.tolist() == [[t >= 4, t >= 6] for t in range(9)]


SHAPES = [(4, 2, 64, 0), (3, 3, 20, 0), (8, 1, 32, 0), (6, 2, 16, 200)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), SHAPES)
def test_whole_chunks_and_decode_are_the_same_bytes(dtype, heads, kv_heads, dim, window):
    """Also for every block size: what a token sees is fixed by its position, not by how it was computed or stored."""
    n = 1100  # more than two splits
    q, k, v = tokens(1, n, heads, kv_heads, dim)
    whole = Layer(kv_heads, dim, 16, dtype).run([(0, 0, q, k, v)], heads, 0.3, window)[0]
    assert np.isfinite(whole).all()
    rng = np.random.default_rng(2)
    for block_size in (4, 8, 16, 32, 64, 128, 256):
        layer, at = Layer(kv_heads, dim, block_size, dtype, seed=block_size), 0
        while at < n:
            # Long chunks, a few single tokens after each.
            size = min(n - at, int(rng.integers(100, 400)) if rng.random() < 0.3 else int(rng.choice([1, 1, 2, 17])))
            cut = slice(at, at + size)
            out = layer.run([(1, at, q[cut], k[cut], v[cut])], heads, 0.3, window)[0]
            assert np.array_equal(out.view(np.uint32), whole[cut].view(np.uint32)), (block_size, at, size)
            at += size


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), SHAPES)
def test_neighbours_and_threads_do_not_matter(dtype, heads, kv_heads, dim, window):
    lengths = [1300, 3, 64, 700]
    sequences = [tokens(10 + i, n, heads, kv_heads, dim) for i, n in enumerate(lengths)]
    alone = [Layer(kv_heads, dim, 16, dtype).run([(0, 0, *s)], heads, 0.3, window)[0] for s in sequences]
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        layer = Layer(kv_heads, dim, 32, dtype)
        # Prefill of some together with a chunk of others, then decode of all in one call, in another order.
        split = [1298, 1, 40, 0]
        layer.run([(i, 0, *(a[: split[i]] for a in s)) for i, s in enumerate(sequences) if split[i]], heads, 0.3, window)
        parts = [(i, split[i], *(a[split[i] : n - 1] for a in sequences[i])) for i, n in enumerate(lengths)]
        for (i, start, *_), out in zip(parts, layer.run(parts, heads, 0.3, window), strict=True):
            assert np.array_equal(out, alone[i][start : lengths[i] - 1])
        last = [(i, lengths[i] - 1, *(a[-1:] for a in sequences[i])) for i in (2, 0, 3, 1)]
        for (i, *_), out in zip(last, layer.run(last, heads, 0.3, window), strict=True):
            assert np.array_equal(out[0], alone[i][-1])


def test_one_long_sequence_is_shared_by_the_threads():
    """One KV head: the only parallelism is in the splits, which are merged in the order that one thread would take."""
    q, k, v = tokens(20, 2900, 2, 1, 64)
    whole = Layer(1, 64, 16, blocks=200).run([(0, 0, q, k, v)], 2, 0.2)[0]
    np.testing.assert_allclose(whole[-3:], reference(q, k, v, 0.2, last=3), rtol=1e-5, atol=3e-6)
    for threads in (1, 2, 3, 4):
        native.set_num_threads(threads)
        layer = Layer(1, 64, 16, blocks=200)
        layer.run([(0, 0, q[:2896], k[:2896], v[:2896])], 2, 0.2)
        out = layer.run([(0, 2896, q[2896:], k[2896:], v[2896:])], 2, 0.2)[0]
        assert np.array_equal(out, whole[2896:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_heads_share_a_task_or_not(dtype):
    """How many KV heads a task has, and whether it is cut, follows from the neighbours and the threads; the bytes do not."""
    heads, kv_heads, dim, n = 12, 12, 16, 600
    q, k, v = tokens(30, n, heads, kv_heads, dim)
    whole = Layer(kv_heads, dim, 16, dtype).run([(0, 0, q, k, v)], heads, 0.2)[0]
    for block_size, threads, others in ((4, 1, 0), (4, 2, 3), (8, 2, 0), (8, 3, 5), (16, 4, 0), (32, 2, 1), (256, 3, 2)):
        native.set_num_threads(threads)
        layer = Layer(kv_heads, dim, block_size, dtype, blocks=(others + 1) * -(-n // block_size))
        layer.run([(i, 0, q[: n - 2], k[: n - 2], v[: n - 2]) for i in range(others + 1)], heads, 0.2)
        for at in (n - 2, n - 1):
            cut = slice(at, at + 1)
            for out in layer.run([(i, at, q[cut], k[cut], v[cut]) for i in range(others + 1)], heads, 0.2):
                assert np.array_equal(out.view(np.uint32), whole[cut].view(np.uint32)), (block_size, threads, others)


class Tree:
    """Sequences that share beginnings: 0 and 1 the first 700 tokens, 2 and 3 the first 1,100, all four 520 (as forks would);
    4 to 6 another 130; 7 is alone, 8 has no whole tile. Lengths before the step, and the queries that each has in it."""

    LENGTHS = (1500, 701, 1100, 1290, 130, 257, 131, 900, 20)
    QUERIES = (1, 3, 1, 1, 2, 40, 1, 1, 1)  # 5 has too many to take part
    SHARED = ((1, 0, 700), (2, 0, 520), (3, 2, 1100), (5, 4, 130), (6, 4, 130))

    def __init__(self, heads, kv_heads, dim, window, softcap=0.0):
        self.heads, self.window, self.softcap, whole = heads, window, softcap, []
        for i, (length, queries) in enumerate(zip(self.LENGTHS, self.QUERIES, strict=True)):
            whole.append(tokens(50 + i, length + queries, heads, kv_heads, dim))
            for later, earlier, n in self.SHARED:
                if later == i:
                    for mine, theirs in zip(whole[i][1:], whole[earlier][1:], strict=True):
                        mine[:n] = theirs[:n]
        self.whole, self.shape = whole, (kv_heads, dim)

    def alone(self, dtype):
        """[queries, heads * dim] of each sequence, computed as a whole."""
        layers = (Layer(*self.shape, 16, dtype) for _ in self.whole)
        outs = [self.run(layer, [(0, 0, *s)])[0] for layer, s in zip(layers, self.whole, strict=True)]
        return [out[n:] for out, n in zip(outs, self.LENGTHS, strict=True)]

    def layer(self, dtype, block_size):
        """The cache before the step: forks have the blocks of their parents, with a copy of one that is shared in part."""
        layer = Layer(*self.shape, block_size, dtype, blocks=6000 // block_size + 40, sequences=9)
        parents = {later: (earlier, n) for later, earlier, n in self.SHARED}
        for i, length in enumerate(self.LENGTHS):
            begin = 0
            if i in parents:
                blocks = parents[i][1] // block_size
                layer.tables[i, :blocks] = layer.tables[parents[i][0], :blocks]
                begin = blocks * block_size
            self.run(layer, [(i, begin, *(a[begin:length] for a in self.whole[i]))])
        return layer

    def step(self, layer, members, share):
        parts = [(i, self.LENGTHS[i], *(a[self.LENGTHS[i] :] for a in self.whole[i])) for i in members]
        return self.run(layer, parts, share)

    def run(self, layer, parts, share=None):
        return layer.run(parts, self.heads, 0.3, self.window, share, softcap=self.softcap)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [(4, 2, 64, 0, 0.0), (3, 3, 20, 0, 0.0), (8, 1, 32, 0, 1.5), (6, 2, 16, 1000, 0.0)],
)
def test_shared_reads_are_the_same_bytes(dtype, heads, kv_heads, dim, window, softcap):
    tree = Tree(heads, kv_heads, dim, window, softcap)
    alone = tree.alone(dtype)
    rng = np.random.default_rng(60)
    for block_size, threads in ((4, 2), (16, 1), (16, 3), (64, 2), (256, 2)):
        native.set_num_threads(threads)
        layer = tree.layer(dtype, block_size)
        for share in (True, None, False):
            order = rng.permutation(9)
            for i, out in zip(order, tree.step(layer, order, share), strict=True):
                assert np.array_equal(out.view(np.uint32), alone[i].view(np.uint32)), (block_size, threads, share, i)
            assert layer.saved == 0 if share is False else layer.saved >= 0
            if share and threads == 1 and block_size <= 64:
                # Tiles of 64: 512 for four, 1,088 for two, 640 for two; 128 for two. A window of 1,000 is behind four of them.
                assert layer.saved == (3 * 8 + 9 + 2 + 2 if not window else 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "count"), [(32, 2, 6), (32, 2, 7), (64, 4, 8), (16, 1, 7), (48, 1, 2), (48, 1, 3), (71, 1, 2)]
)
def test_shared_reads_with_more_rows_than_a_task_has(heads, kv_heads, count):
    """A task has up to 96: sequences with more rows for a KV head are cut, and take no part."""
    common, dim = 520, 16
    before = tokens(70, common, heads, kv_heads, dim)
    parts = [tokens(71 + i, count, heads, kv_heads, dim) for i in range(4)]
    layer = Layer(kv_heads, dim, 16, "float16")
    layer.run([(0, 0, *before)], heads, 0.3)
    for i in (1, 2, 3):
        layer.tables[i, : common // 16] = layer.tables[0, : common // 16]
        layer.run([(i, common // 16 * 16, *(a[common // 16 * 16 :] for a in before))], heads, 0.3)
    alone = [layer.run([(i, common, *part)], heads, 0.3)[0] for i, part in enumerate(parts)]
    for share in (True, None, False):
        together = layer.run([(i, common, *part) for i, part in enumerate(parts)], heads, 0.3, 0, share)
        assert all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(together, alone, strict=True)), share
        if share:
            assert (layer.saved > 0) == (count * heads // kv_heads <= 96)


def test_shared_reads_where_nothing_is_shared():
    tree = Tree(4, 2, 64, 0)
    layer = tree.layer("float16", 16)
    for members, saved in (((0,), 0), ((0, 7), 0), ((0, 4, 7, 8), 0), ((4, 5), 0), ((4, 6), 2), ((0, 1), 10), ((0, 2), 8), ((0, 0), 23)):
        tree.step(layer, members, True)
        assert layer.saved == saved, members
        tree.step(layer, members, None)
        assert layer.saved == (saved if saved > 16 else 0), members  # 32 KiB each: less than 512 KiB is not worth a region


def test_extreme_scores():
    """Large scores neither overflow nor lose the maximum; equal scores average."""
    q, k, v = tokens(21, 200, 2, 1, 16)
    out = Layer(1, 16, 16).run([(0, 0, q * 100, k * 100, v)], 2, 1.0)[0]
    np.testing.assert_allclose(out, reference(q * 100, k * 100, v, 1.0), rtol=1e-3, atol=1e-3)
    out = Layer(1, 16, 16).run([(0, 0, q * 0, k, v)], 2, 1.0)[0]
    np.testing.assert_allclose(out, reference(q * 0, k, v, 1.0), rtol=1e-5, atol=1e-6)


def test_blocks_before_the_window_may_be_gone():
    q, k, v = tokens(22, 300, 2, 1, 32)
    whole = Layer(1, 32, 16).run([(0, 0, q, k, v)], 2, 0.2, window=50)[0]
    layer = Layer(1, 32, 16)
    layer.run([(0, 0, q[:299], k[:299], v[:299])], 2, 0.2, window=50)
    layer.k[layer.tables[0, :15]] = np.nan
    layer.v[layer.tables[0, :15]] = np.nan
    layer.tables[0, :15] = -1  # positions 0 to 239; the window of 299 begins at 250
    rows, start, ends = np.array([0], np.int32), np.array([299], np.int32), np.array([0, 1], np.int32)
    where = (layer.tables, rows, ends, start)
    native.write_kv(k[299:], v[299:], layer.k, layer.v, *where)
    out = np.empty((1, 64), np.float32)
    native.paged_attention(q[299:], layer.k, layer.v, out, *where, 0.2, 50)
    assert np.array_equal(out[0], whole[299])


def test_copy_and_fill_blocks():
    rng = np.random.default_rng(23)
    for shape, dtype in (((9, 2, 8, 4), np.float16), ((5, 3, 64, 256), np.float32), ((6, 7), np.int8)):
        cache = rng.integers(0, 100, shape).astype(dtype)
        expected = cache.copy()
        expected[4], expected[2] = expected[1], expected[0]
        expected[3] = expected[4]  # in order: the copy of a copy
        native.copy_blocks(cache, np.array([[1, 4], [0, 2], [4, 3]], np.int32))
        assert np.array_equal(cache, expected)
        native.copy_blocks(cache, np.zeros((0, 2), np.int32))
        with pytest.raises(ValueError, match="pairs"):
            native.copy_blocks(cache, np.array([[0, shape[0]]], np.int32))
    for dtype in (np.float32, np.float16, np.uint16):
        cache = np.zeros((5, 2, 3), dtype)
        native.fill_blocks(cache, np.array([1, 4], np.int32), float("nan"))
        values = cache.view(ml_dtypes.bfloat16) if dtype == np.uint16 else cache
        assert np.isnan(values[[1, 4]].astype(np.float32)).all()
        assert not cache[[0, 2, 3]].any()


def test_wrong_calls():
    layer = Layer(2, 16, 32, blocks=10)
    q, k, v = tokens(24, 3, 4, 2, 16)
    layer.run([(0, 0, q, k, v)], 4, 1.0)
    out = np.zeros((3, 64), np.float32)

    def attend(q=q, k=layer.k, v=layer.v, out=out, tables=layer.tables, rows=(0,), ends=(0, 3), start=(0,), window=0, **scales):
        ints = [np.array(a, np.int32) for a in (rows, ends, start)]
        native.paged_attention(q, k, v, out, tables, *ints, 1.0, window, **scales)

    attend()
    for wrong, message in (
        ({"rows": (8,)}, "rows"),
        ({"rows": (-1,)}, "rows"),
        ({"start": (30,)}, "block 1 of its table is -1"),
        ({"start": (318,)}, "beyond the 10 blocks"),
        ({"start": (2**31 - 4,)}, "beyond"),
        ({"start": (-1,)}, "start"),
        ({"ends": (0, 2)}, "query_start"),
        ({"ends": (1, 3)}, "query_start"),
        ({"rows": (0, 0), "ends": (0, 4, 3), "start": (0, 0)}, "decrease"),
        ({"window": -1}, "window"),
        ({"q": q[:, :3]}, "multiple"),
        ({"q": q[:, :, :8]}, "multiple"),
        ({"out": out[:, :60]}, "out must be"),
        ({"k": layer.v}, "k_cache"),
        ({"tables": np.full_like(layer.tables, 10)}, "outside the 10"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(**wrong)
    with pytest.raises(ValueError, match="power of two"):
        attend(k=np.zeros((2, 2, 16, 12), np.float32), v=np.zeros((2, 2, 12, 16), np.float32))
    with pytest.raises(TypeError, match="dtype"):
        attend(k=layer.k.astype(np.float16))
    quantized, scales = Layer(2, 16, 32, "int8", blocks=10), np.zeros((10, 2, 32), np.float16)
    numbers = {"k": quantized.k, "v": quantized.v}
    attend(**numbers, k_scales=scales, v_scales=scales)
    for wrong, message in (
        ({**numbers}, "k_scales are needed"),
        ({**numbers, "k_scales": scales}, "v_scales are needed"),
        ({**numbers, "k_scales": scales[:9], "v_scales": scales}, "k_scales must be"),
        ({**numbers, "k_scales": scales, "v_scales": scales[:, :, ::2]}, "v_scales must be"),
        ({"k_scales": scales, "v_scales": scales}, "not int8"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(**wrong)
    with pytest.raises(TypeError, match="v_scales must be float16"):
        attend(**numbers, k_scales=scales, v_scales=scales.astype(np.float32))
    with pytest.raises(TypeError, match="k_cache must be float32"):
        attend(k=layer.k.astype(np.float64), v=layer.v)
    with pytest.raises(TypeError, match="block_tables"):
        attend(tables=layer.tables.astype(np.int64))
    with pytest.raises(ValueError, match="k and v must be"):
        native.write_kv(k[:, :1], v[:, :1], layer.k, layer.v, layer.tables, *(np.array(a, np.int32) for a in ((0,), (0, 3), (0,))))
