// Blocks of a GGUF tensor as float16: what llama.cpp's formats (ggml-common.h, ggml-quants.c) stand for, in float32 until the end.
//
// A block is 32 or 256 values of a row, with the scales that they share.
#include "blocks.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int64_t kValues = 1 << 14;   // about as many in a task
constexpr int kLargest = 256;          // values in a block

// 4 bits a value: the low halves of 16 bytes, then the high ones. `high` has the fifth bits, or is 0.
template <class Value> void nibbles(const uint8_t* q, uint32_t high, float* to, const Value& value) {
    for (int i = 0; i < 16; ++i) {
        to[i] = value((q[i] & 15) | ((high >> i & 1) << 4));
        to[i + 16] = value((q[i] >> 4) | ((high >> (i + 16) & 1) << 4));
    }
}

struct Q4_0 {
    static constexpr int values = 32, bytes = 18;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p);
        nibbles(p + 2, 0, to, [=](int q) QUIRE_LAMBDA { return d * static_cast<float>(q - 8); });
    }
};

struct Q4_1 {
    static constexpr int values = 32, bytes = 20;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p), m = half_at(p + 2);
        nibbles(p + 4, 0, to, [=](int q) QUIRE_LAMBDA { return d * static_cast<float>(q) + m; });
    }
};

struct Q5_0 {
    static constexpr int values = 32, bytes = 22;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p);
        uint32_t high;
        std::memcpy(&high, p + 2, 4);
        nibbles(p + 6, high, to, [=](int q) QUIRE_LAMBDA { return d * static_cast<float>(q - 16); });
    }
};

struct Q5_1 {
    static constexpr int values = 32, bytes = 24;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p), m = half_at(p + 2);
        uint32_t high;
        std::memcpy(&high, p + 4, 4);
        nibbles(p + 8, high, to, [=](int q) QUIRE_LAMBDA { return d * static_cast<float>(q) + m; });
    }
};

struct Q8_0 {
    static constexpr int values = 32, bytes = 34;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p);
        for (int i = 0; i < values; ++i) to[i] = d * static_cast<float>(static_cast<int8_t>(p[2 + i]));
    }
};

struct Q2_K {
    static constexpr int values = 256, bytes = 84;
    static void block(const uint8_t* p, float* to) {
        const uint8_t *scales = p, *q = p + 16;
        const float d = half_at(p + 80), least = half_at(p + 82);
        for (int group = 0; group < 16; ++group) {   // of 16 values
            const uint8_t* from = q + group / 8 * 32 + group % 2 * 16;
            const int shift = group % 8 / 2 * 2;
            const float scale = d * static_cast<float>(scales[group] & 15), m = least * static_cast<float>(scales[group] >> 4);
            for (int i = 0; i < 16; ++i) to[group * 16 + i] = scale * static_cast<float>(from[i] >> shift & 3) - m;
        }
    }
};

struct Q3_K {
    static constexpr int values = 256, bytes = 110;
    static void block(const uint8_t* p, float* to) {
        const uint8_t *mask = p, *q = p + 32, *scales = p + 96;
        const float d = half_at(p + 108);
        for (int group = 0; group < 16; ++group) {
            const uint8_t* from = q + group / 8 * 32 + group % 2 * 16;
            const uint8_t* high = mask + group % 2 * 16;
            const int shift = group % 8 / 2 * 2, bit = group / 2;
            const int low = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
            const int scale = (low | (scales[8 + group % 4] >> group / 4 * 2 & 3) << 4) - 32;
            const float by = d * static_cast<float>(scale);
            for (int i = 0; i < 16; ++i)
                to[group * 16 + i] = by * static_cast<float>((from[i] >> shift & 3) - (high[i] >> bit & 1 ? 0 : 4));
        }
    }
};

struct Q4_K {
    static constexpr int values = 256, bytes = 144;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p), least = half_at(p + 2);
        for (int group = 0; group < 8; ++group) {   // of 32 values
            int s, m;
            scale_and_least(p + 4, group, s, m);
            const float scale = d * static_cast<float>(s), under = least * static_cast<float>(m);
            const uint8_t* q = p + 16 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i) to[group * 32 + i] = scale * static_cast<float>(q[i] >> shift & 15) - under;
        }
    }
};

struct Q5_K {
    static constexpr int values = 256, bytes = 176;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p), least = half_at(p + 2);
        for (int group = 0; group < 8; ++group) {
            int s, m;
            scale_and_least(p + 4, group, s, m);
            const float scale = d * static_cast<float>(s), under = least * static_cast<float>(m);
            const uint8_t *high = p + 16, *q = p + 48 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i)
                to[group * 32 + i] = scale * static_cast<float>((q[i] >> shift & 15) | (high[i] >> group & 1) << 4) - under;
        }
    }
};

struct Q6_K {
    static constexpr int values = 256, bytes = 210;
    static void block(const uint8_t* p, float* to) {
        const uint8_t *low = p, *high = p + 128, *scales = p + 192;
        const float d = half_at(p + 208);
        for (int group = 0; group < 16; ++group) {   // of 16 values
            const int half = group / 8, part = group % 8 / 2, at = group % 2 * 16;   // part: of 32 values
            const uint8_t* q = low + half * 64 + part % 2 * 32 + at;
            const uint8_t* more = high + half * 32 + at;
            const int shift = part / 2 * 4, more_shift = part * 2;
            const float by = d * static_cast<float>(static_cast<int8_t>(scales[group]));
            for (int i = 0; i < 16; ++i)
                to[group * 16 + i] = by * static_cast<float>(((q[i] >> shift & 15) | (more[i] >> more_shift & 3) << 4) - 32);
        }
    }
};

constexpr float kUneven[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};   // what IQ4's codes stand for

struct IQ4_NL {
    static constexpr int values = 32, bytes = 18;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p);
        nibbles(p + 2, 0, to, [=](int q) QUIRE_LAMBDA { return d * kUneven[q]; });
    }
};

struct IQ4_XS {
    static constexpr int values = 256, bytes = 136;
    static void block(const uint8_t* p, float* to) {
        const float d = half_at(p);
        for (int group = 0; group < 8; ++group) {
            const int low = p[4 + group / 2] >> group % 2 * 4 & 15, high = p[2 + group / 4] >> group % 4 * 2 & 3;
            const float by = d * static_cast<float>((low | high << 4) - 32);
            nibbles(p + 8 + group * 16, 0, to + group * 32, [=](int q) QUIRE_LAMBDA { return by * kUneven[q]; });
        }
    }
};

constexpr float kMxfp4[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

struct MXFP4 {
    static constexpr int values = 32, bytes = 17;
    static void block(const uint8_t* p, float* to) {
        const float d = power_at(p);
        nibbles(p + 1, 0, to, [=](int q) QUIRE_LAMBDA { return d * kMxfp4[q]; });
    }
};

template <class Format> void rows(const DequantizeArgs& a, int64_t begin, int64_t end) {
    float values[kLargest];
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* from = a.data + row * a.stride;
        f16* to = a.out + row * a.k;
        for (int64_t at = 0; at < a.k; at += Format::values, from += Format::bytes) {
            Format::block(from, values);
            for (int i = 0; i < Format::values; i += kWidth) store_n(to + at + i, load(values + i), kWidth);
        }
    }
}

void task(const void* context, int64_t number, int64_t) {
    const DequantizeArgs& a = *static_cast<const DequantizeArgs*>(context);
    const int64_t each = a.k < kValues ? kValues / a.k : 1;
    const int64_t begin = number * each, end = begin + each < a.n ? begin + each : a.n;
    switch (a.format) {
        case Format::Q4_0: return rows<Q4_0>(a, begin, end);
        case Format::Q4_1: return rows<Q4_1>(a, begin, end);
        case Format::Q5_0: return rows<Q5_0>(a, begin, end);
        case Format::Q5_1: return rows<Q5_1>(a, begin, end);
        case Format::Q8_0: return rows<Q8_0>(a, begin, end);
        case Format::Q2_K: return rows<Q2_K>(a, begin, end);
        case Format::Q3_K: return rows<Q3_K>(a, begin, end);
        case Format::Q4_K: return rows<Q4_K>(a, begin, end);
        case Format::Q5_K: return rows<Q5_K>(a, begin, end);
        case Format::Q6_K: return rows<Q6_K>(a, begin, end);
        case Format::IQ4_NL: return rows<IQ4_NL>(a, begin, end);
        case Format::IQ4_XS: return rows<IQ4_XS>(a, begin, end);
        case Format::MXFP4: return rows<MXFP4>(a, begin, end);
        case Format::Numbers: return;
    }
}

}  // namespace

void dequantize(const DequantizeArgs& a) {
    const int64_t each = a.k < kValues ? kValues / a.k : 1;
    run_tasks((a.n + each - 1) / each, task, &a);
}

}  // namespace quire::QUIRE_NS
