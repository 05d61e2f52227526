// Bindings of what touches the KV cache: writing, attention, and whole-block copies and fills.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstring>

#include "arrays.h"
#include "attention_plan.h"
#include "dispatch.h"
#include "recording.h"
#include "threads.h"

namespace quire {
namespace {

struct CheckedCache { Cache cache; int64_t blocks; };

template <class A> KvType kv_type(const A& a, const char* name) {
    if (a.dtype() == nb::dtype<int8_t>()) return KvType::i8;
    if (a.dtype() == nb::dtype<float>()) return KvType::f32;
    if (a.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1}) return KvType::f16;
    if (a.dtype() == nb::dtype<uint16_t>()) return KvType::bf16;
    fail_type(std::string(name) + " must be float32, float16, uint16 (the bits of bfloat16) or int8");
}

// The scales of an int8 cache; a cache of floats has none.
template <class A> f16* check_scales(const A& cache, KvType type, const std::optional<A>& scales, const char* name) {
    if (type != KvType::i8) {
        require(!scales, std::string(name) + " must be left out where the cache is not int8");
        return nullptr;
    }
    require(scales.has_value(), std::string(name) + " are needed where the cache is int8");
    if (scales->dtype() != nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})
        fail_type(std::string(name) + " must be float16");
    require_contiguous(*scales, name);
    require_aligned<f16>(*scales, name);
    require(scales->ndim() == 3 && dim(*scales, 0) == dim(cache, 0) && dim(*scales, 1) == dim(cache, 1) &&
                dim(*scales, 2) == dim(cache, 3),
            std::string(name) + " must be [blocks, kv_heads, block_size] for k_cache " + shape_of(cache) + ", not " +
                shape_of(*scales));
    return static_cast<f16*>(const_cast<void*>(static_cast<const void*>(scales->data())));
}

template <class A>
CheckedCache check_cache(const A& k, const A& v, const std::optional<A>& k_scales, const std::optional<A>& v_scales) {
    const KvType type = kv_type(k, "k_cache");
    if (kv_type(v, "v_cache") != type) fail_type("k_cache and v_cache must have one dtype");
    require_ndim(k, 4, "k_cache");
    require_ndim(v, 4, "v_cache");
    require_contiguous(k, "k_cache");
    require_contiguous(v, "v_cache");
    const int64_t head_dim = dim(k, 2), block = dim(k, 3);
    require(dim(v, 0) == dim(k, 0) && dim(v, 1) == dim(k, 1) && dim(v, 2) == block && dim(v, 3) == head_dim,
            "k_cache must be [blocks, kv_heads, head_dim, block_size] and v_cache [blocks, kv_heads, block_size, "
            "head_dim], not " + shape_of(k) + " and " + shape_of(v));
    require(block >= 4 && block <= 256 && (block & (block - 1)) == 0,
            "block_size must be a power of two from 4 to 256, not " + std::to_string(block));
    require(head_dim >= 1 && dim(k, 1) >= 1, "the cache must have heads and dimensions, not " + shape_of(k));
    return {{const_cast<void*>(static_cast<const void*>(k.data())), const_cast<void*>(static_cast<const void*>(v.data())),
             check_scales(k, type, k_scales, "k_scales"), check_scales(k, type, v_scales, "v_scales"), type, dim(k, 1), head_dim,
             block}, dim(k, 0)};
}

// Which tokens run, with what bounds them.
struct CheckedRagged { Ragged seq; int64_t tokens, table_rows, table_width; };

CheckedRagged check_ragged(int64_t tokens, const Array& tables, const Array& rows_, const Array& query_start_, const Array& start_) {
    require_dtype<int32_t>(tables, "block_tables", "int32");
    require_aligned<int32_t>(tables, "block_tables");
    require_ndim(tables, 2, "block_tables");
    const int64_t width = dim(tables, 1);
    require(stride(tables, 1, 1) == 1, "block_tables: the entries of a row must be adjacent");
    const int32_t* rows = vector<int32_t>(rows_, "rows", "int32", -1);
    const int64_t seqs = dim(rows_, 0);
    const int32_t* query_start = vector<int32_t>(query_start_, "query_start", "int32", seqs + 1);
    const int32_t* start = vector<int32_t>(start_, "start", "int32", seqs);
    const auto* table = static_cast<const int32_t*>(tables.data());
    return {{table, rows, query_start, start, seqs, stride(tables, 0, width)}, tokens, dim(tables, 0), width};
}

// Every block that a token of the batch reads or writes must exist: positions from first to last of each sequence,
// where the first is that of the chunk, or of what its window sees when `history`.
void check_blocks(const CheckedCache& c, const CheckedRagged& r, bool history, int64_t window) {
    const auto [table, rows, query_start, start, seqs, table_stride] = r.seq;
    require(query_start[0] == 0 && query_start[seqs] == r.tokens,
            "query_start must go from 0 to the number of tokens, " + std::to_string(r.tokens));
    require_ids(rows, seqs, r.table_rows, "rows", "rows of block_tables");
    for (int64_t s = 0; s < seqs; ++s) {
        const int64_t count = int64_t{query_start[s + 1]} - query_start[s];
        const auto who = [s] { return "sequence " + std::to_string(s); };
        require(count >= 0, who() + ": query_start must not decrease");
        require(start[s] >= 0, who() + ": start must not be negative, but is " + std::to_string(start[s]));
        if (count == 0) continue;
        const int64_t last = start[s] + count - 1;
        require(last < (int64_t{1} << 31) - 256 && last / c.cache.block_size < r.table_width,
                who() + ": position " + std::to_string(last) + " is beyond the " + std::to_string(r.table_width) + " blocks of its table");
        int64_t first = start[s];
        if (history) first = window > 0 && first >= window ? first - window + 1 : 0;
        const int32_t* blocks = table + rows[s] * table_stride;
        for (int64_t b = first / c.cache.block_size; b <= last / c.cache.block_size; ++b)
            if (blocks[b] < 0 || blocks[b] >= c.blocks)
                fail(who() + ": block " + std::to_string(b) + " of its table is " + std::to_string(blocks[b]) +
                     ", outside the " + std::to_string(c.blocks) + " blocks of the cache");
    }
}

void write_kv(const Array& k_, const Array& v_, const OutArray& k_cache, const OutArray& v_cache, const Array& tables,
              const Array& rows, const Array& query_start, const Array& start, const std::optional<OutArray>& k_scales,
              const std::optional<OutArray>& v_scales) {
    const CheckedCache c = check_cache(k_cache, v_cache, k_scales, v_scales);
    const Heads k = heads(k_, "k"), v = heads(v_, "v");
    require_ndim(k_, 3, "k");
    require_ndim(v_, 3, "v");
    require(k.heads == c.cache.kv_heads && k.dim == c.cache.head_dim && v.heads == k.heads && v.dim == k.dim && v.rows == k.rows,
            "k and v must be [tokens, kv_heads, head_dim] as in the cache, not " + shape_of(k_) + " and " + shape_of(v_));
    const CheckedRagged r = check_ragged(k.rows, tables, rows, query_start, start);
    const WriteKvArgs args{r.seq, c.cache, k.data, v.data, k.rows, k.stride, k.head_stride, v.stride, v.head_stride};
    run_kernel([=, kernel = active_kernels().write_kv] {
        check_blocks(c, r, false, 0);
        kernel(args);
    }, k_, v_, k_cache, v_cache, tables, rows, query_start, start, k_scales, v_scales);
}

int64_t attention(const Array& q_, const Array& k_cache, const Array& v_cache, const OutArray& out_, const Array& tables,
               const Array& rows, const Array& query_start, const Array& start, float scale, int64_t window,
               const MaybeArray& k_scales, const MaybeArray& v_scales, const MaybeArray& sinks_, float softcap,
               std::optional<bool> share) {
    const CheckedCache c = check_cache(k_cache, v_cache, k_scales, v_scales);
    const Heads q = heads(q_, "q");
    require_ndim(q_, 3, "q");
    const Matrix2 out = matrix(out_, "out");
    require(q.dim == c.cache.head_dim && q.heads % c.cache.kv_heads == 0 && q.heads > 0,
            "q must be [tokens, heads, head_dim] with a multiple of " + std::to_string(c.cache.kv_heads) +
                " heads of " + std::to_string(c.cache.head_dim) + ", not " + shape_of(q_));
    require(out.rows == q.rows && out.cols == q.heads * q.dim,
            "out must be [tokens, heads * head_dim] for q " + shape_of(q_) + ", not " + shape_of(out_));
    require(window >= 0, "window must not be negative");
    require(softcap >= 0, "softcap must not be negative");
    const float* sinks = sinks_ ? vector<float>(*sinks_, "sinks", "float32", q.heads) : nullptr;
    const CheckedRagged r = check_ragged(q.rows, tables, rows, query_start, start);
    const AttentionArgs args{r.seq, c.cache, q.data, out.data, q.rows, q.heads, q.stride, q.head_stride, out.stride, window, scale,
                             nullptr, 0, nullptr, 0, sinks, softcap};
    const Sharing sharing = !share ? Sharing::where_it_pays : *share ? Sharing::always : Sharing::never;
    return run_kernel([=, &kernels = active_kernels()] {
        check_blocks(c, r, true, window);
        return paged_attention(kernels, args, sharing);
    }, q_, k_cache, v_cache, out_, tables, rows, query_start, start, k_scales, v_scales, sinks_);
}

// Blocks along the first axis of a cache, as bytes.
struct Blocks { char* data; int64_t count, bytes; };

Blocks blocks_of(const OutArray& cache) {
    require(cache.ndim() >= 1, "cache must have blocks along its first axis");
    require_contiguous(cache, "cache");
    const int64_t count = dim(cache, 0);
    const int64_t size = static_cast<int64_t>(cache.size()) * cache.dtype().bits / 8;
    return {static_cast<char*>(cache.data()), count, count ? size / count : 0};
}

// A task takes a stretch of bytes of all blocks, so that the pairs happen in order whatever they have in common.
constexpr int64_t kStretch = 1 << 16;

struct CopyJob { Blocks blocks; const int32_t* pairs; int64_t n; };

void copy_task(const void* context, int64_t task, int64_t) {
    const auto& job = *static_cast<const CopyJob*>(context);
    const int64_t at = task * kStretch, bytes = std::min(kStretch, job.blocks.bytes - at);
    for (int64_t i = 0; i < job.n; ++i)
        std::memmove(job.blocks.data + job.pairs[2 * i + 1] * job.blocks.bytes + at,
                     job.blocks.data + job.pairs[2 * i] * job.blocks.bytes + at, static_cast<size_t>(bytes));
}

void copy_blocks(const OutArray& cache, const Array& pairs_) {
    require_dtype<int32_t>(pairs_, "pairs", "int32");
    require_ndim(pairs_, 2, "pairs");
    require(dim(pairs_, 1) == 2, "pairs must be [n, 2] (source, destination), not " + shape_of(pairs_));
    require_contiguous(pairs_, "pairs");
    require_aligned<int32_t>(pairs_, "pairs");
    const CopyJob job{blocks_of(cache), static_cast<const int32_t*>(pairs_.data()), dim(pairs_, 0)};
    require_ids(job.pairs, 2 * job.n, job.blocks.count, "pairs", "blocks of the cache");
    nb::gil_scoped_release release;
    if (job.n) run_tasks((job.blocks.bytes + kStretch - 1) / kStretch, copy_task, &job);
}

void fill_blocks(const OutArray& cache, const Array& ids_, float value) {
    const DType dtype = float_dtype(cache, "cache");
    const Blocks blocks = blocks_of(cache);
    const int32_t* ids = vector<int32_t>(ids_, "ids", "int32", -1);
    require_ids(ids, dim(ids_, 0), blocks.count, "ids", "blocks of the cache");
    uint32_t bits;
    uint16_t narrow = 0;
    std::memcpy(&bits, &value, 4);
    if (dtype != DType::f32) active_kernels().convert({&value, &narrow, 1, DType::f32, dtype});
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < dim(ids_, 0); ++i) {
        char* to = blocks.data + ids[i] * blocks.bytes;
        if (dtype == DType::f32) std::fill_n(reinterpret_cast<uint32_t*>(to), blocks.bytes / 4, bits);
        else std::fill_n(reinterpret_cast<uint16_t*>(to), blocks.bytes / 2, narrow);
    }
}

}  // namespace

void bind_cache(nb::module_& m) {
    m.def("write_kv", write_kv, nb::arg("k"), nb::arg("v"), nb::arg("k_cache"), nb::arg("v_cache"), nb::arg("block_tables"),
          nb::arg("rows"), nb::arg("query_start"), nb::arg("start"), nb::arg("k_scales") = nb::none(),
          nb::arg("v_scales") = nb::none());
    m.def("paged_attention", attention, nb::arg("q"), nb::arg("k_cache"), nb::arg("v_cache"), nb::arg("out"),
          nb::arg("block_tables"), nb::arg("rows"), nb::arg("query_start"), nb::arg("start"), nb::arg("scale"),
          nb::arg("window") = 0, nb::arg("k_scales") = nb::none(), nb::arg("v_scales") = nb::none(),
          nb::arg("sinks") = nb::none(), nb::arg("softcap") = 0.0f, nb::arg("share") = nb::none());
    m.def("copy_blocks", copy_blocks, nb::arg("cache"), nb::arg("pairs"));
    m.def("fill_blocks", fill_blocks, nb::arg("cache"), nb::arg("ids"), nb::arg("value"));
}

}  // namespace quire
