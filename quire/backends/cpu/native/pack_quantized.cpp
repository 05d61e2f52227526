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

// How weights become whole numbers: round(w * inverse * factor), which stand for multiples of scale.
struct Fit {
    float inverse, factor;
    bf16 scale;
};

// Weights that are all tiny count as zeros; where some are not finite, the scale is not a number.
QUIRE_INLINE bool has_no_fit(int32_t magnitude, Fit& fit) {
    if (magnitude < kInfinityBits && from_bits(static_cast<uint32_t>(magnitude)) >= kTiny) return false;
    fit = {0, 0, {static_cast<uint16_t>(magnitude < kInfinityBits ? 0 : 0x7fc0)}};
    return true;
}

// 8 bits: the greatest magnitude becomes 127.
QUIRE_INLINE Fit fit8(int32_t magnitude) {
    Fit fit{0, 1, {0}};
    if (has_no_fit(magnitude, fit)) return fit;
    from_float(from_bits(static_cast<uint32_t>(magnitude)) / 127.0f, fit.scale);
    fit.inverse = 1.0f / to_float(fit.scale);
    return fit;
}

// Sixteen lanes in a fixed order, halves first, so that every width of vectors gives the same scale.
QUIRE_INLINE float sum16(vf (&part)[16 / kWidth]) {
#pragma GCC unroll 2
    for (int half = 8 / kWidth; half; half /= 2)
#pragma GCC unroll 2
        for (int i = 0; i < half; ++i) part[i] = add(part[i], part[i + half]);
    return reduce_add(part[0]);
}
QUIRE_INLINE vf round_int4(vf v) { return max(set1(-8.0f), min(set1(7.0f), round_even(v))); }

// 4 bits: the weight of the greatest magnitude goes to -8, the end of the range that reaches further, or somewhat inside
// or beyond it, whichever leaves the least squared error; the scale is the one that fits the whole numbers best.
QUIRE_INLINE Fit fit4(const float* w, int64_t n) {
    constexpr int kTries = 3;
    constexpr float kFactors[kTries] = {1.0f, 7.25f / 8.0f, 9.0f / 8.0f};
    Fit fit{};
    const int32_t magnitude = greatest_magnitude(w, n);
    if (has_no_fit(magnitude, fit)) return fit;
    vf most = load(w);
    for (int64_t i = kWidth; i < n; i += kWidth) most = max(most, load(w + i));
    float top = from_bits(static_cast<uint32_t>(magnitude));
    if (reduce_max(most) != top) top = -top;
    fit.inverse = -8.0f / top;
    vf qv[kTries][16 / kWidth], qq[kTries][16 / kWidth];
#pragma GCC unroll 3
    for (int t = 0; t < kTries; ++t)
#pragma GCC unroll 4
        for (int l = 0; l < 16 / kWidth; ++l) qv[t][l] = qq[t][l] = zero();
    for (int64_t i = 0; i < n; i += 16)
#pragma GCC unroll 4
        for (int l = 0; l < 16 / kWidth; ++l) {
            const vf v = mul(load(w + i + l * kWidth), set1(fit.inverse));
#pragma GCC unroll 3
            for (int t = 0; t < kTries; ++t) {
                const vf q = round_int4(mul(v, set1(kFactors[t])));
                qv[t][l] = add(qv[t][l], mul(q, v));
                qq[t][l] = add(qq[t][l], mul(q, q));
            }
        }
    float best = -1, scale = 0;
#pragma GCC unroll 3
    for (int t = 0; t < kTries; ++t) {
        const float cross = sum16(qv[t]), square = sum16(qq[t]), explained = cross * cross / square;
        if (explained > best) best = explained, scale = cross / square, fit.factor = kFactors[t];
    }
    from_float(scale * (top / -8.0f), fit.scale);
    return fit;
}

// One byte each; what has no fit is 0.
template <int Bits> QUIRE_INLINE void quantize(const float* w, int64_t n, const Fit& fit, uint8_t* q) {
    constexpr int32_t kZero = Bits == 8 ? 128 : 8;
    if (fit.inverse == 0) {
        std::memset(q, kZero, static_cast<size_t>((n + kWidth - 1) / kWidth * kWidth));
        return;
    }
    for (int64_t i = 0; i < n; i += kWidth) {
        const vf v = mul(i + kWidth <= n ? load(w + i) : load_n(w + i, static_cast<int>(n - i)), set1(fit.inverse));
        const vf whole = Bits == 8 ? max(set1(-127.0f), min(set1(127.0f), v)) : round_int4(mul(v, set1(fit.factor)));
        store_bytes(reinterpret_cast<int8_t*>(q + i), add_i(to_int(whole), set1_i(kZero)));
    }
}

// Eight bytes of four bits each become four: position k + i low, k + 4 + i high.
QUIRE_INLINE void pack_nibbles(const uint8_t* bytes, int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 8, out += 4) {
        uint64_t x;
        std::memcpy(&x, bytes + i, 8);
        const uint32_t y = static_cast<uint32_t>(x | x >> 28);
        std::memcpy(out, &y, 4);
    }
}

// The words of all columns' runs into the panel's order: word by word, the columns side by side.
void interleave(const uint8_t* runs, int64_t words, uint8_t* out) {
    for (int64_t i = 0; i < words; ++i)
        for (int j = 0; j < kPanel; ++j, out += 4) std::memcpy(out, runs + j * kRunStride + 4 * i, 4);
}

template <class T> void fit_columns(Reader<T>& reader, int64_t k, Fit* fits) {
    int32_t most[kPanel] = {};
    for (int64_t at = 0; at < k; at += kRun) {
        reader.open(at, k - at < kRun ? k - at : kRun);
        for (int j = 0; j < reader.source.columns; ++j) {
            const int32_t magnitude = greatest_magnitude(reader.column(j), reader.kn);
            if (magnitude > most[j]) most[j] = magnitude;
        }
    }
    for (int j = 0; j < kPanel; ++j) fits[j] = fit8(most[j]);
}

template <class T, int Bits> void pack_task(const void* context, int64_t panel, int64_t) {
    const Job& job = *static_cast<const Job*>(context);
    const QuantizeArgs& a = job.args;
    const QuantLayout& l = job.layout;
    uint8_t* out = static_cast<uint8_t*>(a.out) + panel * l.panel_bytes;
    const Source<T> source = source_of<T>(a, panel);
    const size_t run_bytes = kPanel * kRunStride, block_bytes = (source.side_by_side ? kPanel : 1) * kRunStride * sizeof(float);
    uint8_t* runs = static_cast<uint8_t*>(thread_scratch(kScratchGemm, run_bytes + block_bytes));
    std::memset(runs, Bits == 8 ? 0x80 : 0x88, run_bytes);   // columns and positions that don't exist
    Reader<T> reader{source, reinterpret_cast<float*>(runs + run_bytes), 0, 0};

    bf16 scales[kMaxGroups][kPanel] = {};
    Fit fits[kPanel] = {};
    const int64_t k = a.w.k, group = a.w.group;
    if (!group) {
        fit_columns(reader, k, fits);
        for (int j = 0; j < kPanel; ++j) scales[0][j] = fits[j].scale;
        std::memcpy(out, scales[0], static_cast<size_t>(l.scale_bytes));
        out += l.scale_bytes;
    }
    for (int64_t at = 0; at < k; at += kRun) {
        const int64_t kn = k - at < kRun ? k - at : kRun, step = group ? group : kn;
        reader.open(at, kn);
        for (int j = 0; j < source.columns; ++j) {
            const float* w = reader.column(j);
            for (int64_t i = 0, g = 0; i < kn; i += step, ++g) {
                const Fit fit = !group ? fits[j] : Bits == 8 ? fit8(greatest_magnitude(w + i, step)) : fit4(w + i, step);
                if (group) scales[g][j] = fit.scale;
                uint8_t* run = runs + j * kRunStride;
                quantize<Bits>(w + i, step, fit, run + i);
                if constexpr (Bits == 4) pack_nibbles(run + i, step, run + i / 2);
            }
        }
        for (int64_t i = 0, g = 0; i < kn; i += step, ++g) {
            if (group) {
                std::memcpy(out, scales[g], static_cast<size_t>(l.scale_bytes));
                out += l.scale_bytes;
            }
            const int64_t words = (step + 3) / 4 * Bits / 8;
            interleave(runs + i * Bits / 8, words, out);
            out += words * 4 * kPanel;
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
