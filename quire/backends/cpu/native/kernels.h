// What every kernel takes, and the table through which it is called.
//
// The files gemm, gemm_quantized, pack_quantized, dequantize, attention, kv_cache, norms, elementwise, reduce and peaks are compiled once per
// instruction set, each time in a namespace of its own (see simd.h). Nothing but plain structs of pointers crosses the border,
// and no template or inline function from here may be emitted by two of those compilations: the linker would merge them, and a machine
// without AVX-512 could end up in AVX-512 code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quire {

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };
struct i8 { int8_t value; };

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };
enum class Activation : int32_t { none, silu, gelu, gelu_tanh, relu, swiglu_oai };   // the last of gated linears only

// What a number q of 4 bits stands for: (q - 8) * scale; (q - 8) * scale + offset; or the float of 4 bits that it is (E2M1 of the OCP
// Microscaling specification, MX 1.0) times 2 * scale.
enum class Coding : int32_t { integers, offsets, mxfp4 };

// Weights in the order in which the inner loop reads them: [panel_count][k][panel], the last panel padded with 0. Gated,
// each panel has panel / 2 gates, then the columns that they gate. A quarter of a panel is a vector of float32. In bfloat16 two weights
// share 32 bits, so that a shift and a mask widen them. In the panels of AVX-512 they are those of two positions of K, [panel_count][k / 2]
// [panel][2], with a 0 for the last of an odd number: AVX-512 BF16 multiplies such pairs. In others (16 registers, too few to keep one
// position while the other is multiplied), those of two columns: the first and the second quarter of a panel take turns, and so do the
// third and the fourth.
struct Panels {
    const void* data;
    DType dtype;
    int64_t n, k, panel; // n: outputs; gated, there are 2 n columns
    int64_t bits = 0;    // 8 or 4 where weights are quantized: quantized.h has their layout, and dtype means nothing
    int64_t group = 0;   // then: positions of K that share a scale, or 0 for one scale a column
    bool gated = false;
    Coding coding = Coding::integers;   // in 4 bits
};

// Static, so that no compilation's copy can stand in for another's.
__attribute__((always_inline)) static inline int64_t panel_outputs(const Panels& w) { return w.gated ? w.panel / 2 : w.panel; }
__attribute__((always_inline)) static inline int64_t panel_count(const Panels& w) {
    return (w.n + panel_outputs(w) - 1) / panel_outputs(w);
}
__attribute__((always_inline)) static inline bool pairs_positions(const Panels& w) { return w.dtype == DType::bf16 && w.panel == 64; }
__attribute__((always_inline)) static inline int64_t panel_positions(const Panels& w) {   // of float weights
    return pairs_positions(w) ? w.k + w.k % 2 : w.k;
}

// A matrix somewhere in memory, at any address and with any strides (in bytes).
struct Matrix {
    const char* data;
    int64_t n, k, n_stride, k_stride;
};

// What a GGUF tensor's blocks are, by llama.cpp's names. Numbers are Quire's own, a group in each: its scale and, if there are offsets, its
// offset, in float32, then numbers from 0 to 15, the even ones in the low halves of bytes.
enum class Format : int32_t { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, Numbers };

struct QuantizeArgs {
    const Matrix* parts;   // concatenated along n
    DType dtype;           // of the parts
    Panels w;              // what to make, n columns
    void* out;             // [panels][panel_bytes] of quantized.h, 64-byte aligned
};

// Likewise, of parts that are blocks of 4 bits already (Q4_0, Q4_1, Q4_K, MXFP4, Numbers): n_stride is that of a row of blocks, k_stride 0 where
// there are zeros instead.
struct RepackArgs {
    const Matrix* parts;
    Format format;
    Panels w;              // with the group of the format, and its coding
    void* out;
};

struct DequantizeArgs {
    const uint8_t* data;   // [n] rows of blocks, `stride` bytes apart
    f16* out;              // [n, k]
    int64_t n, k, stride;
    Format format;
};

// How a linear goes through its weights, which is a matter of time and not of bytes: in slices of a panel that fit L2; in short ones that
// fit L1 (quantized weights: half a panel at a time); or, up to kRowsBeside rows, several panels at once, where that can be.
enum class Reading : int32_t { slices, short_slices, beside };
constexpr int kReadings = 3, kRowsBeside = 6, kRowsShort = 48;   // short slices never pay with more rows than kRowsShort

// Some rows of x and out, and the weights and the bias that they meet: those of an expert.
struct RowGroup { int64_t row, rows; const void* data; const float* bias; };

struct LinearArgs {
    Panels w;            // with groups: what the weights of each are like
    const float* x;      // [m, k], rows x_stride floats apart
    float* out;          // [m, n], rows out_stride floats apart
    const float* bias;   // [n], gated [2][n]; or null
    int64_t m, x_stride, out_stride;
    bool accumulate;     // out += instead of out =
    Activation activation;
    const void* then;    // the panels that will be read after these, to prefetch; or null
    int64_t then_panels, then_panel_bytes;
    Reading reading;
    const RowGroup* groups;   // of all rows; or null: all meet w.data and bias
    int64_t num_groups;
};

// Rows are [m][heads][dim], with strides in floats; heads is 1 for a plain matrix.
struct NormArgs {
    const float* x;
    float* out;
    const float* weight;
    const float* bias;   // layer norm only, may be null
    int64_t m, heads, dim, x_stride, x_head_stride, out_stride, out_head_stride;
    float eps;
    bool centre;         // layer norm: subtract the mean
    bool accumulate;     // out += instead of out =
};

struct RotaryArgs {
    float* x;            // [m][heads][head_dim], in place
    const int32_t* positions;
    const float* cos;    // [max_pos][half]
    const float* sin;
    int64_t m, heads, half, x_stride, x_head_stride;
    const float* scale;  // [max_pos], on what was rotated; or null
};

struct EmbedArgs {
    const int32_t* ids;
    const void* table;   // [v, dim]
    float* out;          // [m, dim]
    int64_t m, dim, table_stride, out_stride;
    DType dtype;
    float scale;
    bool add;            // out += row instead of out = row * scale
};

struct SoftcapArgs {
    float* x;            // [m, n], in place
    int64_t m, n, stride;
    float cap;
};

// out (+)= for each row the sum of weights[row][i] * y[places[row][i]] over its `taken` places, one chain of multiply-adds.
struct CombineArgs {
    const float* y;      // rows y_stride floats apart
    const int32_t* places;
    const float* weights;
    float* out;          // [m, dim]
    int64_t m, dim, taken, y_stride, out_stride;
    bool accumulate;
};

struct ConvertArgs {
    const void* x;
    void* out;
    int64_t n;
    DType from, to;
};

// Which tokens run: token i of sequence s (query_start[s] <= i < query_start[s + 1]) has the absolute position
// start[s] + i - query_start[s], and its KV lies in the blocks that row rows[s] of the block tables names.
struct Ragged {
    const int32_t* block_tables;
    const int32_t* rows;
    const int32_t* query_start;
    const int32_t* start;
    int64_t seqs, table_stride;
};

// One layer: k is [num_blocks][kv_heads][head_dim][block_size], v is [num_blocks][kv_heads][block_size][head_dim]. Where
// they are int8, each head's vector of a token has a scale: both [num_blocks][kv_heads][block_size], else null.
enum class KvType : int32_t { f32, f16, bf16, i8 };
struct Cache {
    void* k;
    void* v;
    f16* k_scales;
    f16* v_scales;
    KvType type;
    int64_t kv_heads, head_dim, block_size;
};

struct WriteKvArgs {
    Ragged seq;
    Cache cache;
    const float* k;      // [tokens][kv_heads][head_dim]
    const float* v;
    int64_t tokens, k_stride, k_head_stride, v_stride, v_head_stride;
};

// A few queries of one sequence against some KV heads, over the splits [split_begin, split_end) of the positions.
struct AttentionWork {
    int32_t seq, kv_head, kv_heads, query, count, split_begin, split_end;
    int32_t key_begin;   // whole tiles before it are done: what came of them is in `merged` and `running`
    float* partial;      // null: this work sees all splits, and writes the output itself
    float* merged;       // [kv_heads][rows] of whole splits, or null
    float* running;      // likewise, of the split that key_begin lies in
};

// A few sequences over the tiles of keys that they have in common. Rows are those of all members, one after the other; a
// run concerns some of them.
struct SharedMember { int32_t seq, query, count; float *merged, *running; };   // of all KV heads: [kv_heads][rows]
struct SharedRun { int32_t seq, row_begin, row_end, tile_begin, tile_end; };   // seq: whose table names the blocks
struct AttentionShared {
    const SharedMember* members;
    const SharedRun* runs;   // for each row in ascending order of tiles, from 0 without a gap
    int64_t num_members, num_runs, rows;
};

struct AttentionArgs {
    Ragged seq;
    Cache cache;
    const float* q;      // [tokens][heads][head_dim]
    float* out;          // [tokens][heads * head_dim]
    int64_t tokens, heads, q_stride, q_head_stride, out_stride, window;
    float scale;
    const AttentionWork* works;
    int64_t num_works;
    const AttentionShared* shared;
    int64_t num_shared;
    const float* sinks;  // [heads]: a score that takes part in the softmax and has no value; or null
    float softcap;       // scaled scores become softcap * tanh(score / softcap); 0: they stay
};

// Part of the arithmetic: changing either changes the bytes of every attention output.
constexpr int64_t kKeyTile = 64;   // keys whose scores are rescaled together, aligned to absolute positions
constexpr int64_t kSplit = 512;    // positions after which partial results are merged, aligned likewise

// Floats of one row of a partial result: maximum, sum, then the accumulators padded to whole cache lines.
inline constexpr int64_t partial_floats(int64_t head_dim) { return 16 + (head_dim + 15) / 16 * 16; }

struct RowScan { float max; int32_t bad; };   // bad: a NaN or +inf was seen

struct Kernels {
    const char* name;
    int64_t panel;       // columns of a weight panel
    void (*linear)(const LinearArgs&);
    void (*linear_quantized)(const LinearArgs&);     // w.bits is 8 or 4
    void (*pack_quantized)(const QuantizeArgs&);
    void (*repack)(const RepackArgs&);
    void (*dequantize)(const DequantizeArgs&);
    void (*norm)(const NormArgs&);
    void (*rotary)(const RotaryArgs&);
    void (*embed)(const EmbedArgs&);
    void (*combine)(const CombineArgs&);
    void (*convert)(const ConvertArgs&);
    void (*softcap)(const SoftcapArgs&);
    void (*write_kv)(const WriteKvArgs&);
    void (*attention_shared)(const AttentionArgs&);  // runs args.shared, which args.works may need
    void (*attention)(const AttentionArgs&);         // runs args.works
    void (*attention_merge)(const AttentionArgs&, const AttentionWork* splits, int64_t n);
    // Sampler primitives over one row of logits.
    RowScan (*scan)(const float* z, int64_t n);
    // w = exp((z - max) / temperature); sums[c] = sum over the c-th run of kSumRun values; returns their total.
    double (*exp_row)(const float* z, int64_t n, float max, float temperature, float* w, double* sums);
    double (*mass_at_least)(const float* w, int64_t n, float low);   // the sum of all w >= low
    int64_t (*count_greater)(const float* z, int64_t n, float than);
    // Ids with z >= low (in ascending order) into ids; at most n.
    int64_t (*select_at_least)(const float* z, int64_t n, float low, int32_t* ids);
    int64_t (*find_equal)(const float* z, int64_t n, float value);   // first index, or -1
    void (*run_maxima)(const float* z, int64_t n, float* maxima);    // of each run of kMaxRun values
    // Limits of the machine.
    double (*read_sum)(const float* p, int64_t n, bool apart);       // apart: in several places at once
    int64_t (*fma_loop)(int64_t iterations);         // returns the float32 operations that it did
    int64_t (*bf16_loop)(int64_t iterations);        // likewise, of products with weights in bfloat16
    int64_t (*int8_loop)(int64_t iterations);        // and of int8
};

constexpr int64_t kSumRun = 1024;
constexpr int64_t kMaxRun = 64;

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 {
extern const Kernels kernels;
void linear(const LinearArgs&);
}
// AVX-512 with VNNI is the table of AVX-512 with these in place of its own, and AVX-512 BF16 that of VNNI.
namespace avx512vnni {
void linear_quantized(const LinearArgs&);
int64_t int8_loop(int64_t iterations);
}
namespace avx512bf16 {
void linear(const LinearArgs&);
int64_t bf16_loop(int64_t iterations);
}

}  // namespace quire
