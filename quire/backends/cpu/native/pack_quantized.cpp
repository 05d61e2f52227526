// Weights to 8 or 4 bits, straight from where the file's mapping has them into panels: a run of positions of one column is
// quantized while it is in the cache, then the runs of a panel's columns are interleaved.
#include <type_traits>

#include "blocks.h"
#include "quantize_weights.h"
#include "quantized.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kPanel = 4 * kWidth;
constexpr int64_t kRun = 1024;                       // positions; whole groups, whole segments
constexpr int64_t kRunStride = kRun + 64;            // so that the columns of a panel don't share few sets of the cache
static_assert(kRun / 32 <= kMaxGroups);
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

template <class T> Source<T> source_of(const Matrix* parts, const Panels& w, int64_t panel) {
    Source<T> s;
    const int64_t left = w.n - panel * kPanel;
    s.columns = static_cast<int>(left < kPanel ? left : kPanel);
    s.side_by_side = true;
    int64_t part = 0, begin = 0;
    for (int j = 0; j < s.columns; ++j) {
        const int64_t n = panel * kPanel + j;
        while (n - begin >= parts[part].n) begin += parts[part++].n;
        const Matrix& m = parts[part];
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
        if constexpr (std::is_same_v<T, float>)
            if (source.column[j].stride == sizeof(T)) return reinterpret_cast<const float*>(source.column[j].data) + k;
        fetch(source.column[j], k, kn, block);
        return block;
    }
};

#if !defined(QUIRE_ISA_portable)
// Four words of each of eight columns: four rows of eight words.
QUIRE_INLINE void turn_8x4(const uint8_t* columns, int64_t stride, uint8_t* out, int64_t out_stride) {
    const auto two = [&](int j) QUIRE_LAMBDA {   // columns j and j + 4
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + j * stride));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + (j + 4) * stride));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    };
    const __m256i a = two(0), b = two(1), c = two(2), d = two(3);
    const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab2 = _mm256_unpackhi_epi32(a, b);
    const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd2 = _mm256_unpackhi_epi32(c, d);
    const auto row = [&](int i) QUIRE_LAMBDA { return reinterpret_cast<__m256i*>(out + i * out_stride); };
    _mm256_storeu_si256(row(0), _mm256_unpacklo_epi64(ab0, cd0));
    _mm256_storeu_si256(row(1), _mm256_unpackhi_epi64(ab0, cd0));
    _mm256_storeu_si256(row(2), _mm256_unpacklo_epi64(ab2, cd2));
    _mm256_storeu_si256(row(3), _mm256_unpackhi_epi64(ab2, cd2));
}
#endif

// The words of all columns' runs into the panel's order: word by word, the columns side by side.
void interleave(const uint8_t* runs, int64_t words, uint8_t* out) {
    int64_t i = 0;
#if !defined(QUIRE_ISA_portable)
    for (; i + 4 <= words; i += 4, out += 4 * 4 * kPanel)
        for (int j = 0; j < kPanel; j += 8) turn_8x4(runs + j * kRunStride + 4 * i, kRunStride, out + 4 * j, 4 * kPanel);
#endif
    for (; i < words; ++i)
        for (int j = 0; j < kPanel; ++j, out += 4) std::memcpy(out, runs + j * kRunStride + 4 * i, 4);
}

template <class T> void greatest_of_columns(Reader<T>& reader, int64_t k, int32_t (&most)[kPanel]) {
    for (int64_t at = 0; at < k; at += kRun) {
        reader.open(at, k - at < kRun ? k - at : kRun);
        for (int j = 0; j < reader.source.columns; ++j) {
            const int32_t magnitude = greatest_magnitude(reader.column(j), reader.kn);
            if (magnitude > most[j]) most[j] = magnitude;
        }
    }
}

template <class T, int Bits> void pack_task(const void* context, int64_t panel, int64_t) {
    const Job& job = *static_cast<const Job*>(context);
    const QuantizeArgs& a = job.args;
    const QuantLayout& l = job.layout;
    uint8_t* out = static_cast<uint8_t*>(a.out) + panel * l.panel_bytes;
    const Source<T> source = source_of<T>(a.parts, a.w, panel);
    const size_t run_bytes = kPanel * kRunStride, block_bytes = (source.side_by_side ? kPanel : 1) * kRunStride * sizeof(float);
    uint8_t* runs = static_cast<uint8_t*>(thread_scratch(kScratchGemm, run_bytes + block_bytes));
    std::memset(runs + source.columns * kRunStride, Bits == 8 ? 0x80 : 0x88,   // columns that don't exist
                static_cast<size_t>((kPanel - source.columns) * kRunStride));
    Reader<T> reader{source, reinterpret_cast<float*>(runs + run_bytes), 0, 0};

    bf16 scales[kMaxGroups][kPanel] = {};
    int32_t most[kPanel] = {};
    Fits fits{};
    const int64_t k = a.w.k, group = a.w.group;
    const int shift = group ? __builtin_ctzll(static_cast<uint64_t>(group)) : 63;   // 32, 64 or 128
    if (!group) {
        greatest_of_columns(reader, k, most);
        for (int j = 0; j < kPanel; ++j) {
            fit8(most[j], fits, 0);
            scales[0][j] = fits.scale[0];
        }
        std::memcpy(out, scales[0], static_cast<size_t>(l.scale_bytes));
        out += l.scale_bytes;
    }
    for (int64_t at = 0; at < k; at += kRun) {
        const int64_t kn = k - at < kRun ? k - at : kRun, step = group ? group : kn;
        reader.open(at, kn);
        for (int j = 0; j < source.columns; ++j) {
            const float* w = reader.column(j);
            uint8_t* run = runs + j * kRunStride;
            if constexpr (Bits == 4) fit4(w, kn, group, fits);
            else if (group) for (int g = 0; g < kn / group; ++g) fit8(greatest_magnitude(w + g * group, group), fits, g);
            else fit8(most[j], fits, 0);
            if (group) for (int g = 0; g < kn / group; ++g) scales[g][j] = fits.scale[g];
            quantize_run<Bits>(w, kn, shift, fits, run);
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

// What blocks are made of: of a group's values a scale, and what (q - 8) * scale must be raised by, and the numbers q, a byte each.
struct Group {
    float scale, offset;
};

// The halves of bytes at p, low or high (shift 4), as 32 numbers.
QUIRE_INLINE void halves(const uint8_t* p, int n, int shift, uint8_t* q) {
    for (int i = 0; i < n; ++i) q[i] = static_cast<uint8_t>(p[i] >> shift & 15);
}

struct Q4_0 {
    static constexpr int group = 32, groups = 1, bytes = 18;
    static constexpr bool offsets = false;
    static void block(const uint8_t* p, uint8_t* q, Group* g) {
        halves(p + 2, 16, 0, q);
        halves(p + 2, 16, 4, q + 16);
        g[0] = {half_at(p), 0};
    }
};

struct Q4_1 {
    static constexpr int group = 32, groups = 1, bytes = 20;
    static constexpr bool offsets = true;
    static void block(const uint8_t* p, uint8_t* q, Group* g) {
        halves(p + 4, 16, 0, q);
        halves(p + 4, 16, 4, q + 16);
        g[0] = {half_at(p), 8 * half_at(p) + half_at(p + 2)};
    }
};

struct Q4_K {
    static constexpr int group = 32, groups = 8, bytes = 144;
    static constexpr bool offsets = true;
    static void block(const uint8_t* p, uint8_t* q, Group* g) {
        for (int i = 0; i < 4; ++i) {
            halves(p + 16 + 32 * i, 32, 0, q + 64 * i);
            halves(p + 16 + 32 * i, 32, 4, q + 64 * i + 32);
        }
        for (int i = 0; i < groups; ++i) {
            int scale, least;
            scale_and_least(p + 4, i, scale, least);
            g[i].scale = half_at(p) * static_cast<float>(scale);
            g[i].offset = 8 * g[i].scale - half_at(p + 2) * static_cast<float>(least);
        }
    }
};

template <int Size, bool Offsets> struct Numbers {
    static constexpr int group = Size, groups = 1, bytes = (Offsets ? 8 : 4) + Size / 2;
    static constexpr bool offsets = Offsets;
    static void block(const uint8_t* p, uint8_t* q, Group* g) {
        *g = {};
        std::memcpy(g, p, Offsets ? 8 : 4);
        for (int i = 0; i < Size / 2; ++i) {
            const uint8_t two = p[bytes - Size / 2 + i];
            q[2 * i] = two & 15, q[2 * i + 1] = two >> 4;
        }
    }
};

// E2M1, whose bytes are what the inner loop wants, with a power of two, which it wants half of.
struct MXFP4 {
    static constexpr int group = 32, groups = 1, bytes = 17;
    static constexpr bool offsets = false;
    static void block(const uint8_t* p, uint8_t* q, Group* g) {
        halves(p + 1, 16, 0, q);
        halves(p + 1, 16, 4, q + 16);
        g[0] = {0.5f * power_at(p), 0};
    }
};

template <class Format> void repack_panel(const RepackArgs& a, const QuantLayout& l, int64_t panel) {
    constexpr int kGroup = Format::group, kValues = Format::groups * kGroup;
    uint8_t* out = static_cast<uint8_t*>(a.out) + panel * l.panel_bytes;
    uint8_t* runs = static_cast<uint8_t*>(thread_scratch(kScratchGemm, kPanel * kRunStride + 4 * kWidth));
    const Source<uint8_t> source = source_of<uint8_t>(a.parts, a.w, panel);
    bf16 scales[kMaxGroups][kPanel * (Format::offsets ? 2 : 1)] = {};
    uint8_t q[kRun] = {};
    Group groups[kMaxGroups];
    for (int64_t at = 0; at < a.w.k; at += kRun) {
        const int64_t kn = a.w.k - at < kRun ? a.w.k - at : kRun;
        for (int j = 0; j < kPanel; ++j) {
            uint8_t* run = runs + j * kRunStride;
            if (j >= source.columns || !source.column[j].stride) {
                std::memset(run, 0x88, static_cast<size_t>(kn / 2));
                continue;
            }
            const uint8_t* block = reinterpret_cast<const uint8_t*>(source.column[j].data) + at / kValues * Format::bytes;
            for (int64_t i = 0; i < kn; i += kValues, block += Format::bytes) Format::block(block, q + i, groups + i / kGroup);
            for (int64_t i = 0; i < kn; i += 4 * kWidth) store_nibbles(run + i / 2, load_i(q + i));
            for (int64_t g = 0; g < kn / kGroup; ++g) {
                from_float(groups[g].scale, scales[g][Format::offsets ? 2 * j + 1 : j]);
                if constexpr (Format::offsets) from_float(groups[g].offset, scales[g][2 * j]);
            }
        }
        for (int64_t g = 0; g < kn / kGroup; ++g) {
            std::memcpy(out, scales[g], static_cast<size_t>(l.scale_bytes));
            out += l.scale_bytes;
            interleave(runs + g * kGroup / 2, l.segment / 8, out);
            out += kGroup / 2 * kPanel;
        }
    }
}

template <class Format> void repack_as(const RepackArgs& args) {
    struct Job {
        const RepackArgs& args;
        QuantLayout layout;
    } job{args, quant_layout(args.w)};
    run_tasks((args.w.n + kPanel - 1) / kPanel, [](const void* context, int64_t panel, int64_t) {
        const Job& j = *static_cast<const Job*>(context);
        repack_panel<Format>(j.args, j.layout, panel);
    }, &job);
}

template <bool Offsets> void repack_numbers(const RepackArgs& args) {
    switch (args.w.group) {
        case 32: return repack_as<Numbers<32, Offsets>>(args);
        case 64: return repack_as<Numbers<64, Offsets>>(args);
        default: return repack_as<Numbers<128, Offsets>>(args);
    }
}

}  // namespace

void repack(const RepackArgs& args) {
    switch (args.format) {
        case Format::Q4_0: return repack_as<Q4_0>(args);
        case Format::Q4_1: return repack_as<Q4_1>(args);
        case Format::Q4_K: return repack_as<Q4_K>(args);
        case Format::MXFP4: return repack_as<MXFP4>(args);
        case Format::Numbers: return args.w.coding == Coding::offsets ? repack_numbers<true>(args) : repack_numbers<false>(args);
        default: return;
    }
}

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
