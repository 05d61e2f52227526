// The kernels of one instruction set, as a table.
#include "simd.h"

namespace quire::QUIRE_NS {

void linear(const LinearArgs&);
void linear_quantized(const LinearArgs&);
void pack_quantized(const QuantizeArgs&);
void repack(const RepackArgs&);
void dequantize(const DequantizeArgs&);
void norm(const NormArgs&);
void rotary(const RotaryArgs&);
void embed(const EmbedArgs&);
void combine(const CombineArgs&);
void convert(const ConvertArgs&);
void softcap(const SoftcapArgs&);
void write_kv(const WriteKvArgs&);
void attention_shared(const AttentionArgs&);
void attention(const AttentionArgs&);
void attention_merge(const AttentionArgs&, const AttentionWork*, int64_t);
RowScan scan(const float*, int64_t);
double exp_row(const float*, int64_t, float, float, float*, double*);
double mass_at_least(const float*, int64_t, float);
int64_t count_greater(const float*, int64_t, float);
int64_t select_at_least(const float*, int64_t, float, int32_t*);
int64_t find_equal(const float*, int64_t, float);
void run_maxima(const float*, int64_t, float*);
double read_sum(const float*, int64_t, bool);
int64_t fma_loop(int64_t);
int64_t int8_loop(int64_t);

#define QUIRE_STRING_(x) #x
#define QUIRE_STRING(x) QUIRE_STRING_(x)

const Kernels kernels = {
    .name = QUIRE_STRING(QUIRE_NS),
    .panel = 4 * kWidth,
    .linear = linear,
    .linear_quantized = linear_quantized,
    .pack_quantized = pack_quantized,
    .repack = repack,
    .dequantize = dequantize,
    .norm = norm,
    .rotary = rotary,
    .embed = embed,
    .combine = combine,
    .convert = convert,
    .softcap = softcap,
    .write_kv = write_kv,
    .attention_shared = attention_shared,
    .attention = attention,
    .attention_merge = attention_merge,
    .scan = scan,
    .exp_row = exp_row,
    .mass_at_least = mass_at_least,
    .count_greater = count_greater,
    .select_at_least = select_at_least,
    .find_equal = find_equal,
    .run_maxima = run_maxima,
    .read_sum = read_sum,
    .fma_loop = fma_loop,
    .bf16_loop = fma_loop,
    .int8_loop = int8_loop,
};

}  // namespace quire::QUIRE_NS
