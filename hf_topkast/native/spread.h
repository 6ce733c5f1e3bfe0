// Numbers that go, in their order, to the places of a row that are not marked, and back: the reservoir of a layer.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX512_ROWS
#endif

namespace hf_topkast {
namespace {

// Both go without a branch for each number, which would be guessed wrong too often, and touch nothing from `end` on.

template <class Item>
inline void spread_rest(const Item* next, const Item* end, const uint8_t* mask, Item* line) {
    while (next < end) {
        *line++ = *next;
        next += !*mask++;
    }
}

template <class Item>
inline void gather_rest(const Item* line, const uint8_t* mask, Item* next, Item* end) {
    while (next < end) {
        *next = *line++;
        next += !*mask++;
    }
}

#if defined(HAS_AVX512_ROWS)
#define AVX512_ROWS __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))

inline bool has_avx512_rows() {
    static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
    return has;
}

constexpr int64_t LANES = 16;

AVX512_ROWS inline void spread_lanes(uint32_t* line, __mmask16 free, const uint32_t* next) {
    _mm512_storeu_si512(line, _mm512_maskz_expand_epi32(free, _mm512_loadu_si512(next)));
}
AVX512_ROWS inline void spread_lanes(uint16_t* line, __mmask16 free, const uint16_t* next) {
    _mm256_storeu_si256((__m256i*)line, _mm256_maskz_expand_epi16(free, _mm256_loadu_si256((const __m256i*)next)));
}
AVX512_ROWS inline void gather_lanes(const uint32_t* line, __mmask16 free, uint32_t* next) {
    _mm512_storeu_si512(next, _mm512_maskz_compress_epi32(free, _mm512_loadu_si512(line)));
}
AVX512_ROWS inline void gather_lanes(const uint16_t* line, __mmask16 free, uint16_t* next) {
    _mm256_storeu_si256((__m256i*)next, _mm256_maskz_compress_epi16(free, _mm256_loadu_si256((const __m256i*)line)));
}

AVX512_ROWS inline __mmask16 free_lanes(const uint8_t* mask) {
    __m128i marks = _mm_loadu_si128((const __m128i*)mask);
    return _mm_cmpeq_epi8_mask(marks, _mm_setzero_si128());
}

template <class Item>
AVX512_ROWS void spread_rest_by_lanes(const Item* next, const Item* end, const uint8_t* mask, Item* line) {
    for (; next + LANES <= end; mask += LANES, line += LANES) {  // so many places there are at least
        __mmask16 free = free_lanes(mask);
        spread_lanes(line, free, next);
        next += __builtin_popcount(free);
    }
    spread_rest<Item>(next, end, mask, line);
}

template <class Item>
AVX512_ROWS void gather_rest_by_lanes(const Item* line, const uint8_t* mask, Item* next, Item* end) {
    for (; next + LANES <= end; mask += LANES, line += LANES) {
        __mmask16 free = free_lanes(mask);
        gather_lanes(line, free, next);
        next += __builtin_popcount(free);
    }
    gather_rest<Item>(line, mask, next, end);
}

inline void spread_rest(const uint32_t* next, const uint32_t* end, const uint8_t* mask, uint32_t* line) {
    has_avx512_rows() ? spread_rest_by_lanes(next, end, mask, line) : spread_rest<uint32_t>(next, end, mask, line);
}
inline void spread_rest(const uint16_t* next, const uint16_t* end, const uint8_t* mask, uint16_t* line) {
    has_avx512_rows() ? spread_rest_by_lanes(next, end, mask, line) : spread_rest<uint16_t>(next, end, mask, line);
}
inline void gather_rest(const uint32_t* line, const uint8_t* mask, uint32_t* next, uint32_t* end) {
    has_avx512_rows() ? gather_rest_by_lanes(line, mask, next, end) : gather_rest<uint32_t>(line, mask, next, end);
}
inline void gather_rest(const uint16_t* line, const uint8_t* mask, uint16_t* next, uint16_t* end) {
    has_avx512_rows() ? gather_rest_by_lanes(line, mask, next, end) : gather_rest<uint16_t>(line, mask, next, end);
}
#endif

}  // namespace
}  // namespace hf_topkast
