// Vectors of VECTOR_WIDTH floats on the compiler's own vector types (GCC 12 or clang), so that one source serves every
// instruction set. Everything here has internal linkage: units compiled for different CPUs must never share a function.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hf_topkast {
namespace {

constexpr int W = VECTOR_WIDTH;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef float Quad __attribute__((vector_size(16)));

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <class T>
INLINE T load_as(const void* from) {
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

INLINE Vec load(const float* from) { return load_as<Vec>(from); }

template <class T>
INLINE void store(void* to, T value) {
    __builtin_memcpy(to, &value, sizeof value);
}

template <int... I>
INLINE Vec broadcast(float x, std::integer_sequence<int, I...>) {
    return Vec{((void)I, x)...};
}

INLINE Vec broadcast(float x) { return broadcast(x, std::make_integer_sequence<int, W>()); }

struct BFloat16 {
    uint16_t bits;
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    return load_as<float>(&bits);
}

// W numbers of memory as floats.
INLINE Vec widen(const float* from) { return load(from); }
INLINE Vec widen(const BFloat16* from) {
    return (Vec)(__builtin_convertvector(load_as<Halves>(from), Words) << 16);
}

INLINE void narrow(float* to, Vec x) { store(to, x); }
INLINE void narrow(BFloat16* to, Vec x) {  // to the nearest, ties to even; a NaN stays one
    Words bits = (Words)x;
    Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
    Words quiet = bits | 0x400000;
    Words is_nan = (Words)(x != x);
    store(to, __builtin_convertvector(((rounded & ~is_nan) | (quiet & is_nan)) >> 16, Halves));
}

// W floats of a table, at given places.
template <class Index>
INLINE Vec gather(const float* table, const Index* places) {
    typedef Index Places __attribute__((vector_size(sizeof(Index) * W)));
    typedef int32_t Wide __attribute__((vector_size(4 * W)));
    Wide wide = __builtin_convertvector(load_as<Places>(places), Wide);
#if defined(__AVX512F__)
    return (Vec)_mm512_mask_i32gather_ps(__m512{}, 0xffff, (__m512i)wide, table, 4);
#elif defined(__AVX2__)
    return (Vec)_mm256_i32gather_ps(table, (__m256i)wide, 4);
#else
    Vec result;
    for (int i = 0; i < W; ++i) result[i] = table[wide[i]];
    return result;
#endif
}

// Lane i of `a` or `b`, whichever bit H of i names; and the same of the lane across.
template <int H, int... I>
INLINE Vec straight(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I & H ? I + W : I)...);
}
template <int H, int... I>
INLINE Vec across(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I & H ? (I ^ H) + W : I ^ H)...);
}
template <int H, int... I>
INLINE Vec low(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I & H ? (I ^ H) + W : I)...);
}
template <int H, int... I>
INLINE Vec high(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I & H ? I + W : I ^ H)...);
}

constexpr std::make_integer_sequence<int, W> LANES{};

// Sums of pairs of lanes H apart: those of `a` in the lanes without bit H, those of `b` in the lanes with it.
template <int H>
INLINE Vec add_pairs(Vec a, Vec b) {
    return straight<H>(a, b, LANES) + across<H>(a, b, LANES);
}

template <int... I>
INLINE Vec last_lanes(Vec x, int count, std::integer_sequence<int, I...>) {
    constexpr Words lanes = {I...};
    return (Vec)((Words)x & (Words)(lanes >= uint32_t(W - count)));
}

// The last `count` lanes, and zeros before them.
INLINE Vec last_lanes(Vec x, int count) { return last_lanes(x, count, LANES); }

// Transposes a W × W square held in W vectors.
template <int H = W / 2>
INLINE void transpose(Vec* rows) {
    if constexpr (H > 0) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
            if (j & H) continue;
            Vec a = rows[j], b = rows[j | H];
            rows[j] = low<H>(a, b, LANES);
            rows[j | H] = high<H>(a, b, LANES);
        }
        transpose<H / 2>(rows);
    }
}

template <int H>
INLINE Vec fold(Vec x) {  // adds the lanes that differ in bit H and above
    if constexpr (H < W) return fold<2 * H>(x + across<H>(x, x, LANES));
    return x;
}

}  // namespace
}  // namespace hf_topkast
