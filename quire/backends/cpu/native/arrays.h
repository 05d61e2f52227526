// Checked views of numpy arrays: a wrong call ends in a TypeError or a ValueError that names the argument, never in a
// crash. Dtypes say what they are: float32, float16, and uint16 for the bits of a bfloat16.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>

#include "kernels.h"

namespace quire {

namespace nb = nanobind;

using Array = nb::ndarray<nb::ro, nb::device::cpu>;    // read only or not
using OutArray = nb::ndarray<nb::device::cpu>;         // writable
using MaybeArray = std::optional<Array>;

[[noreturn]] inline void fail_type(const std::string& message) { throw nb::type_error(message.c_str()); }
[[noreturn]] inline void fail(const std::string& message) { throw nb::value_error(message.c_str()); }
// A macro, so that a message is put together only where it is needed: dozens of checks go by in each step.
#define require(ok, ...) ((ok) ? static_cast<void>(0) : ::quire::fail(__VA_ARGS__))

template <class A> std::string shape_of(const A& a) {
    std::string text = "[";
    for (size_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
    return text + "]";
}

template <class A> int64_t dim(const A& a, size_t i) { return static_cast<int64_t>(a.shape(i)); }

template <class T, class A> void require_dtype(const A& a, const char* name, const char* dtype) {
    if (a.dtype() != nb::dtype<T>()) fail_type(std::string(name) + " must be a " + dtype + " array");
}

// f32, f16 or bf16, as the array's dtype says.
template <class A> DType float_dtype(const A& a, const char* name) {
    const nb::dlpack::dtype d = a.dtype();
    if (d == nb::dtype<float>()) return DType::f32;
    if (d == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1}) return DType::f16;
    if (d == nb::dtype<uint16_t>()) return DType::bf16;
    fail_type(std::string(name) + " must be float32, float16, or uint16 (the bits of bfloat16)");
}
inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Elements from one index to the next along an axis; what an axis of length 1 says does not matter.
template <class A> int64_t stride(const A& a, size_t axis, int64_t packed) {
    return a.size() > 0 && a.shape(axis) > 1 ? a.stride(axis) : packed;
}

template <class A> void require_ndim(const A& a, size_t ndim, const char* name) {
    require(a.ndim() == ndim, std::string(name) + " must have " + std::to_string(ndim) + " dimensions, not " + shape_of(a));
}

template <class A> void require_contiguous(const A& a, const char* name) {
    int64_t packed = 1;
    for (size_t i = a.ndim(); i-- > 0; packed *= dim(a, i))
        require(stride(a, i, packed) == packed, std::string(name) + " must be C-contiguous");
}

template <class T, class A> void require_aligned(const A& a, const char* name) {
    require(reinterpret_cast<uintptr_t>(a.data()) % alignof(T) == 0, std::string(name) + " must be aligned");
}

// A vector of `n` elements (any number where n is -1), contiguous.
template <class T, class A> auto* vector(const A& a, const char* name, const char* dtype, int64_t n) {
    require_dtype<T>(a, name, dtype);
    require_ndim(a, 1, name);
    require_contiguous(a, name);
    require_aligned<T>(a, name);
    require(n < 0 || dim(a, 0) == n, std::string(name) + " must have length " + std::to_string(n) + ", not " + shape_of(a));
    return static_cast<T*>(const_cast<std::remove_const_t<std::remove_pointer_t<decltype(a.data())>>*>(a.data()));
}

struct Matrix2 { float* data; int64_t rows, cols, stride; };
struct Heads { float* data; int64_t rows, heads, dim, stride, head_stride; };

template <class A> float* float_data(const A& a, const char* name) {
    require_dtype<float>(a, name, "float32");
    require_aligned<float>(a, name);
    return static_cast<float*>(const_cast<void*>(static_cast<const void*>(a.data())));
}

// [rows, cols] of float32; rows may be further apart than cols, but elements of a row may not.
template <class A> Matrix2 matrix(const A& a, const char* name) {
    float* data = float_data(a, name);
    require_ndim(a, 2, name);
    Matrix2 m{data, dim(a, 0), dim(a, 1), 0};
    m.stride = stride(a, 0, m.cols);
    require(stride(a, 1, 1) == 1, std::string(name) + ": the elements of a row must be adjacent");
    require(m.stride >= m.cols || m.rows <= 1, std::string(name) + ": rows must not overlap");
    return m;
}

// [rows, heads, dim] of float32, or [rows, dim] as one head; the last axis adjacent, the others anyhow apart.
template <class A> Heads heads(const A& a, const char* name) {
    if (a.ndim() == 2) {
        const Matrix2 m = matrix(a, name);
        return {m.data, m.rows, 1, m.cols, m.stride, m.cols};
    }
    float* data = float_data(a, name);
    require_ndim(a, 3, name);
    Heads h{data, dim(a, 0), dim(a, 1), dim(a, 2), 0, 0};
    h.head_stride = stride(a, 1, h.dim);
    h.stride = stride(a, 0, h.heads * h.head_stride);
    require(stride(a, 2, 1) == 1, std::string(name) + ": the elements of a head must be adjacent");
    require((h.head_stride >= h.dim || h.heads <= 1) && (h.stride >= (h.heads - 1) * h.head_stride + h.dim || h.rows <= 1),
            std::string(name) + ": rows and heads must not overlap");
    return h;
}

inline void require_ids(const int32_t* ids, int64_t n, int64_t limit, const char* name, const char* what) {
    for (int64_t i = 0; i < n; ++i)
        if (ids[i] < 0 || ids[i] >= limit)
            fail(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(ids[i]) + ", outside the " +
                 std::to_string(limit) + " " + what);
}

void bind_layers(nb::module_& m);
void bind_cache(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_limits(nb::module_& m);

}  // namespace quire
