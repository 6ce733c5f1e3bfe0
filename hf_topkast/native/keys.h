// Loops over numbers as keys, unsigned integers of the same order: they count, mark and take out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "clones.h"

namespace hf_topkast {
namespace {

constexpr int64_t STRIDE = 16;   // numbers that the compiler compares at once
constexpr int64_t PIECE = 4096;  // numbers that the first cache holds

// Bits of floating-point numbers as unsigned integers of the same order.
template <class Word, bool MAGNITUDES>
inline Word key_of(Word bits) {
    if (MAGNITUDES) return Word(bits << 1);
    using Signed = std::make_signed_t<Word>;
    constexpr int LAST = 8 * sizeof(Word) - 1;
    constexpr Word SIGN = Word(Word(1) << LAST);
    bits = bits == SIGN ? Word(0) : bits;  // -0 is no less than 0
    return Word(bits ^ (Word(Signed(bits) >> LAST) | SIGN));
}

// The loops over the numbers stand alone: in a class the compiler would not vectorise them.
template <bool MAGNITUDES, class Word>
void count_first_digits(const Word* scores, int64_t count, int shift, uint32_t* counters) {
    for (int64_t i = 0; i < count; ++i) ++counters[key_of<Word, MAGNITUDES>(scores[i]) >> shift];
}

// Whether some of STRIDE keys, without their lowest bits, is the one that is sought.
template <bool MAGNITUDES, class Word>
inline bool meets(const Word* scores, int shift, Word sought) {
    Word found = 0;
    for (int64_t i = 0; i < STRIDE; ++i) found |= Word(key_of<Word, MAGNITUDES>(scores[i]) >> shift) == sought;
    return found;
}

template <bool MAGNITUDES, class Word>
void count_digits(const Word* scores, int64_t count, int below, Word sought, int shift, Word mask, uint32_t* counters) {
    auto look = [&](int64_t i) {
        Word key = key_of<Word, MAGNITUDES>(scores[i]);
        if (Word(key >> below) == sought) ++counters[Word(key >> shift) & mask];
    };
    int64_t i = 0;
    for (; i + STRIDE <= count; i += STRIDE)
        if (meets<MAGNITUDES>(scores + i, below, sought))
            for (int64_t j = i; j < i + STRIDE; ++j) look(j);
    for (; i < count; ++i) look(i);
}

template <bool MAGNITUDES, class Word>
Word* take_matches(const Word* scores, int64_t count, int below, Word sought, Word* keys) {
    for (int64_t i = 0; i < count; ++i) {  // without a branch, which would be guessed wrong too often
        *keys = key_of<Word, MAGNITUDES>(scores[i]);
        keys += Word(*keys >> below) == sought;
    }
    return keys;
}

template <bool MAGNITUDES, class Word>
FOR_EVERY_CPU
void mark_from(const Word* scores, int64_t count, Word threshold, uint8_t* mask) {
    for (int64_t i = 0; i < count; ++i) mask[i] = key_of<Word, MAGNITUDES>(scores[i]) >= threshold;
}

template <bool MAGNITUDES, class Word>
FOR_EVERY_CPU
void mark_above(const Word* scores, int64_t count, Word threshold, uint8_t* mask) {
    for (int64_t i = 0; i < count; ++i) mask[i] = key_of<Word, MAGNITUDES>(scores[i]) > threshold;
}

// Calls visit(begin, end) for pieces that the caches hold, so that each is read from memory once for all sets.
template <class Visit>
void for_pieces(int64_t begin, int64_t end, Visit visit) {
    for (int64_t i = begin; i < end; i += PIECE) visit(i, std::min(i + PIECE, end));
}

// First digits near a threshold: those of `low` and `width` more.
template <class Word>
struct Window {
    Word low, width;
};

template <bool MAGNITUDES, class Word>
FOR_EVERY_CPU
int64_t count_above(const Word* scores, int64_t count, int shift, Word high) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += Word(key_of<Word, MAGNITUDES>(scores[i]) >> shift) > high;
    return found;
}

template <bool MAGNITUDES, class Word>
FOR_EVERY_CPU
void mark_window(const Word* scores, int64_t count, int shift, Window<Word> window, uint8_t* inside) {
    for (int64_t i = 0; i < count; ++i)
        inside[i] = Word(Word(key_of<Word, MAGNITUDES>(scores[i]) >> shift) - window.low) <= window.width;
}

// Takes out the keys inside a window; null if there is no room for them.
template <bool MAGNITUDES, class Word>
Word* take_window(const Word* scores, int64_t count, int shift, Window<Word> window, Word* keys, const Word* end) {
    constexpr int64_t BYTES = 8;
    uint8_t inside[PIECE];
    mark_window<MAGNITUDES>(scores, count, shift, window, inside);
    std::fill(inside + count, inside + (count + BYTES - 1) / BYTES * BYTES, 0);
    for (int64_t i = 0; i < count; i += BYTES) {
        uint64_t members;
        std::memcpy(&members, inside + i, BYTES);
        if (!members) continue;
        if (keys + BYTES > end) return nullptr;
        for (; members; members &= members - 1)
            *keys++ = key_of<Word, MAGNITUDES>(scores[i + __builtin_ctzll(members) / BYTES]);
    }
    return keys;
}

// Of many keys in a small range, keeps those in the bucket of the `wanted`-th largest, and counts it among these.
template <class Word>
Word* keep_bucket(int64_t& wanted, Word* keys, Word* end) {
    constexpr int64_t BUCKETS = 1 << 12;
    auto [lowest, highest] = std::minmax_element(keys, end);
    Word low = *lowest;
    int shift = 0;
    while (Word(*highest - low) >> shift >= BUCKETS) ++shift;
    std::vector<int64_t> counters(BUCKETS, 0);
    for (const Word* key = keys; key < end; ++key) ++counters[Word(*key - low) >> shift];
    int64_t bucket = BUCKETS - 1;
    for (; counters[bucket] < wanted; --bucket) wanted -= counters[bucket];
    Word* next = keys;
    for (const Word* key = keys; key < end; ++key) {
        Word kept = *key;
        *next = kept;
        next += Word(kept - low) >> shift == Word(bucket);
    }
    return next;
}

}  // namespace
}  // namespace hf_topkast
