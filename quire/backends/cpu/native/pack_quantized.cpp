// Weights to 8 or 4 bits, straight from where the file's mapping has them into panels: a run of positions of one column is
// quantized while it is in the cache, then the runs of a panel's columns are interleaved.
#include "quantized.h"
#include "simd_int.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kPanel = 4 * kWidth;
constexpr int64_t kRun = 1024;                       // positions; whole groups, whole segments
constexpr int64_t kRunStride = kRun + 64;            // so that the columns of a panel don't share few sets of the cache
constexpr int64_t kMaxGroups = kRun / 32;
static_assert(kRun % kSegment == 0 || kSegment % kRun == 0);

struct Job {
    QuantizeArgs args;
    QuantLayout layout;
};

template <class T> struct Column {
    const char* data;
    int64_t stride;   // bytes from a position to the next
};

// The columns of a panel, and whether they lie side by side (a transposed view).
template <class T> struct Source {
    Column<T> column[kPanel];
    int columns;
    bool side_by_side;
};

template <class T> Source<T> source_of(const QuantizeArgs& a, int64_t panel) {
    Source<T> s;
    const int64_t left = a.w.n - panel * kPanel;
    s.columns = static_cast<int>(left < kPanel ? left : kPanel);
    s.side_by_side = true;
    int64_t part = 0, begin = 0;
    for (int j = 0; j < s.columns; ++j) {
        const int64_t n = panel * kPanel + j;
        while (n - begin >= a.parts[part].n) begin += a.parts[part++].n;
        const Matrix& m = a.parts[part];
        s.column[j] = {m.data + (n - begin) * m.n_stride, m.k_stride};
        s.side_by_side &= s.column[j].data == s.column[0].data + j * static_cast<int64_t>(sizeof(T)) &&
                          m.k_stride == s.column[0].stride;
    }
    return s;
}

template <class T> QUIRE_INLINE float read_one(const char* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return to_float(x);
}

// kn positions of a column as float32.
template <class T> void fetch(const Column<T>& c, int64_t k, int64_t kn, float* out) {
    const char* from = c.data + k * c.stride;
    if (c.stride != static_cast<int64_t>(sizeof(T))) {
        for (int64_t i = 0; i < kn; ++i) out[i] = read_one<T>(from + i * c.stride);
        return;
    }
    int64_t i = 0;
    for (; i + kWidth <= kn; i += kWidth) store(out + i, load(reinterpret_cast<const T*>(from) + i));
    for (; i < kn; ++i) out[i] = read_one<T>(from + i * c.stride);
}

// Column j's run in a buffer of floats: all columns are read together where they lie side by side.
template <class T> struct Reader {
    const Source<T>& source;
    float* block;        // [kPanel][kRun] for columns side by side, else [kRun]
    int64_t k, kn;

    void open(int64_t k_, int64_t kn_) {
        k = k_, kn = kn_;
        if (!source.side_by_side) return;
        for (int64_t i = 0; i < kn; ++i)
            for (int j = 0; j < source.columns; ++j)
                block[j * kRunStride + i] = read_one<T>(source.column[j].data + (k + i) * source.column[j].stride);
    }
    const float* column(int j) {
        if (source.side_by_side) return block + j * kRunStride;
        fetch(source.column[j], k, kn, block);
        return block;
    }
};

// The scale for weights of the given greatest magnitude (as bits). Not a number where the weights are not.
QUIRE_INLINE bf16 scale_for(int32_t magnitude, float divisor) {
    bf16 scale{0x7fc0};
    if (magnitude >= kInfinityBits) return scale;
    const float most = from_bits(static_cast<uint32_t>(magnitude));
    from_float(most < kTiny ? 0.0f : most / divisor, scale);
    return scale;
}

// q = w / scale, rounded, as one byte each; what has no scale is 0.
template <int Bits> QUIRE_INLINE void quantize(const float* w, int64_t n, bf16 scale_, uint8_t* q) {
    constexpr float kLow = Bits == 8 ? -127.0f : -8.0f, kHigh = Bits == 8 ? 127.0f : 7.0f;
    constexpr int32_t kZero = Bits == 8 ? 128 : 8;
    const float scale = to_float(scale_);
    if (!(scale < 0 || scale > 0)) {
        std::memset(q, kZero, static_cast<size_t>((n + kWidth - 1) / kWidth * kWidth));
        return;
    }
    const vf inverse = set1(1.0f / scale);
    for (int64_t i = 0; i < n; i += kWidth) {
        const vf v = i + kWidth <= n ? load(w + i) : load_n(w + i, static_cast<int>(n - i));
        const vi rounded = to_int(max(set1(kLow), min(set1(kHigh), mul(v, inverse))));
        store_bytes(reinterpret_cast<int8_t*>(q + i), add_i(rounded, set1_i(kZero)));
    }
}

template <int Bits> QUIRE_INLINE bf16 group_scale(const float* w, int64_t n) {
    const int32_t magnitude = greatest_magnitude(w, n);
    if constexpr (Bits == 8) return scale_for(magnitude, 127.0f);
    // The weight of the greatest magnitude becomes -8, the end of the range that reaches further.
    const float most = from_bits(static_cast<uint32_t>(magnitude));
    bool positive = false;
    for (int64_t i = 0; i < n; ++i) positive |= w[i] == most;
    return scale_for(magnitude, positive ? -8.0f : 8.0f);
}

// The runs of all columns into the panel's order, four positions of a column at a time.
template <int Bits> void interleave(const uint8_t* runs, int64_t kn, uint8_t* out) {
    if constexpr (Bits == 8) {
        for (int64_t k = 0; k < kn; k += 4)
            for (int j = 0; j < kPanel; ++j, out += 4) std::memcpy(out, runs + j * kRunStride + k, 4);
    } else {
        for (int64_t k = 0; k < kn; k += 8)
            for (int j = 0; j < kPanel; ++j, out += 4) {
                uint32_t low, high;
                std::memcpy(&low, runs + j * kRunStride + k, 4);
                std::memcpy(&high, runs + j * kRunStride + k + 4, 4);
                low |= high << 4;
                std::memcpy(out, &low, 4);
            }
    }
}

template <class T> void column_scales(Reader<T>& reader, int64_t k, bf16* scales) {
    int32_t most[kPanel] = {};
    for (int64_t at = 0; at < k; at += kRun) {
        reader.open(at, k - at < kRun ? k - at : kRun);
        for (int j = 0; j < reader.source.columns; ++j) {
            const int32_t magnitude = greatest_magnitude(reader.column(j), reader.kn);
            if (magnitude > most[j]) most[j] = magnitude;
        }
    }
    for (int j = 0; j < kPanel; ++j) scales[j] = scale_for(most[j], 127.0f);
}

template <class T, int Bits> void pack_task(const void* context, int64_t panel, int64_t) {
    const Job& job = *static_cast<const Job*>(context);
    const QuantizeArgs& a = job.args;
    const QuantLayout& l = job.layout;
    uint8_t* out = static_cast<uint8_t*>(a.out) + panel * l.panel_bytes;
    const Source<T> source = source_of<T>(a, panel);
    const size_t run_bytes = kPanel * kRunStride, block_bytes = (source.side_by_side ? kPanel : 1) * kRunStride * sizeof(float);
    uint8_t* runs = static_cast<uint8_t*>(thread_scratch(kScratchGemm, run_bytes + block_bytes));
    std::memset(runs, Bits == 8 ? 128 : 8, run_bytes);   // columns and positions that don't exist
    Reader<T> reader{source, reinterpret_cast<float*>(runs + run_bytes), 0, 0};

    bf16 scales[kMaxGroups][kPanel] = {};
    const int64_t k = a.w.k, group = a.w.group;
    if (!group) {
        column_scales(reader, k, scales[0]);
        std::memcpy(out, scales[0], static_cast<size_t>(l.scale_bytes));
        out += l.scale_bytes;
    }
    for (int64_t at = 0; at < k; at += kRun) {
        const int64_t kn = k - at < kRun ? k - at : kRun, step = group ? group : kn;
        reader.open(at, kn);
        for (int j = 0; j < source.columns; ++j) {
            const float* w = reader.column(j);
            for (int64_t i = 0, g = 0; i < kn; i += step, ++g) {
                if (group) scales[g][j] = group_scale<Bits>(w + i, step);
                quantize<Bits>(w + i, step, scales[g][j], runs + j * kRunStride + i);
            }
        }
        for (int64_t i = 0, g = 0; i < kn; i += step, ++g) {
            if (group) {
                std::memcpy(out, scales[g], static_cast<size_t>(l.scale_bytes));
                out += l.scale_bytes;
            }
            interleave<Bits>(runs + i, step, out);
            out += (step + 3) / 4 * 4 * kPanel * Bits / 8;
        }
    }
}

template <class T> void pack(const Job& job, int64_t panels) {
    run_tasks(panels, job.args.w.bits == 8 ? pack_task<T, 8> : pack_task<T, 4>, &job);
}

}  // namespace

void pack_quantized(const QuantizeArgs& args) {
    const Job job{args, quant_layout(args.w)};
    const int64_t panels = (args.w.n + kPanel - 1) / kPanel;
    switch (args.dtype) {
        case DType::f32: return pack<float>(job, panels);
        case DType::f16: return pack<f16>(job, panels);
        case DType::bf16: return pack<bf16>(job, panels);
    }
}

}  // namespace quire::QUIRE_NS
