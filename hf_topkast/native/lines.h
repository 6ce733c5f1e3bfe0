// What passes over a layer share: masks word by word, lines of blocks, and the types of arrays.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "operands.h"

namespace hf_topkast {
namespace {

constexpr int64_t WORD = 8;  // bytes
constexpr uint64_t LOWEST = 0x0101010101010101u, TOP = LOWEST << 7;  // bit of each byte

inline uint64_t word_at(const uint8_t* bytes) {
    uint64_t word;
    std::memcpy(&word, bytes, WORD);
    return word;
}

// Calls visit(pointer) with the type of the items, of 2, 4 or 8 bytes.
template <class Visit>
void with_items(int itemsize, Visit visit) {
    if (itemsize == 2)
        visit((uint16_t*)nullptr);
    else if (itemsize == 4)
        visit((uint32_t*)nullptr);
    else
        visit((uint64_t*)nullptr);
}

// Of two masks, those of A and those of B\A.
struct InA {
    static uint64_t of(uint64_t active, uint64_t) { return active; }
};
struct InRest {
    static uint64_t of(uint64_t active, uint64_t backward) { return backward & ~active; }
};

template <class Half>
int64_t count_members(const uint8_t* active, const uint8_t* backward, int64_t count) {
    int64_t total = 0, i = 0;
    while (i + WORD <= count) {
        uint64_t sums = 0;  // of each byte of the words, which 255 ones do not overflow
        for (int64_t end = std::min(count / WORD * WORD, i + 255 * WORD); i < end; i += WORD)
            sums += Half::of(word_at(active + i), word_at(backward + i));
        for (int byte = 0; byte < WORD; ++byte) total += sums >> (8 * byte) & 0xff;
    }
    for (; i < count; ++i) total += Half::of(active[i], backward[i]) & 1;
    return total;
}

// Eight bytes of 0 and 1 as eight bits.
inline uint64_t bits_of(uint64_t bytes) { return (bytes * 0x0102040810204080u) >> 56; }

// 64 bytes of 0 and 1 as bits.
inline uint64_t bits_of_64(const uint8_t* bytes) {
    uint64_t bits = 0;
#if defined(__SSE2__)
    for (int i = 0; i < 64; i += 16) {
        __m128i tops = _mm_slli_epi16(_mm_loadu_si128((const __m128i*)(bytes + i)), 7);
        bits |= uint64_t(uint32_t(_mm_movemask_epi8(tops))) << i;
    }
#else
    for (int i = 0; i < 64; i += WORD) bits |= bits_of(word_at(bytes + i)) << i;
#endif
    return bits;
}

template <class Half, class Column>
void list_members(const uint8_t* active, const uint8_t* backward, int64_t count, Column* columns) {
    constexpr int64_t BITS = 64;
    for (int64_t first = 0; first < count; first += BITS) {
        uint64_t members = 0;
        if (first + BITS <= count)
            members = Half::of(bits_of_64(active + first), bits_of_64(backward + first));
        else
            for (int64_t i = 0; first + i < count; ++i)
                members |= (Half::of(active[first + i], backward[first + i]) & 1) << i;
        for (; members; members &= members - 1) *columns++ = Column(first + __builtin_ctzll(members));
    }
}

// The bytes of a line of blocks, one of each: of the masks themselves where a block is a weight.
struct Line {
    const uint8_t *active, *backward;
};

inline Line line_of(const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int64_t row, uint8_t* scratch) {
    int64_t in = pattern.in_features, blocks = in / pattern.width;
    const uint8_t *a = active + row * pattern.height * in, *b = backward + row * pattern.height * in;
    if (pattern.width == 1) return {a, b};
    for (int64_t block = 0; block < blocks; ++block) {
        scratch[block] = a[block * pattern.width];
        scratch[blocks + block] = b[block * pattern.width];
    }
    return {scratch, scratch + blocks};
}

// Calls visit(columns) with the type of the columns.
template <class Visit>
void with_columns(const Pattern& pattern, Visit visit) {
    if (pattern.columns.itemsize == 2)
        visit((int16_t*)pattern.columns.address);
    else
        visit((int32_t*)pattern.columns.address);
}

inline int64_t blocks_of(const Pattern& pattern) { return pattern.in_features / pattern.width; }

// Calls visit(height, width) with the sides of blocks: where both are 1 the compiler knows it, which halves the time.
template <class Visit>
void with_sides(const Pattern& pattern, Visit visit) {
    if (pattern.unstructured())
        visit(std::integral_constant<int64_t, 1>(), std::integral_constant<int64_t, 1>());
    else
        visit(pattern.height, pattern.width);
}

// A row of scratch memory for each thread.
template <class Item>
class Rows {
   public:
    Rows(int threads, int64_t size, Item value) : size(size), items(threads * size, value) {}
    Item* own() { return items.data() + omp_get_thread_num() * size; }  // of the thread that asks

   private:
    int64_t size;
    std::vector<Item> items;
};

}  // namespace
}  // namespace hf_topkast
