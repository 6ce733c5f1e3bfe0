#include "passes.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "clones.h"
#include "lines.h"
#include "memory.h"

namespace hf_topkast {
namespace {

FOR_EVERY_CPU
bool differ(const uint8_t* active, const uint8_t* backward, const uint8_t* in_a, const uint8_t* in_rest, int64_t count) {
    uint8_t differs = 0;
    for (int64_t i = 0; i < count; ++i) differs |= (active[i] ^ in_a[i]) | ((backward[i] & ~active[i]) ^ in_rest[i]);
    return differs & 1;
}

// Whether every weight of a line of blocks is where the first one of its block is; `scratch` holds two rows.
bool is_whole(const Line& line, const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int64_t row,
              uint8_t* scratch) {
    int64_t in = pattern.in_features, width = pattern.width;
    uint8_t *in_a = scratch, *in_rest = scratch + in;
    for (int64_t block = 0; block < in / width; ++block) {
        std::fill_n(in_a + block * width, width, line.active[block]);
        std::fill_n(in_rest + block * width, width, line.backward[block] & ~line.active[block]);
    }
    bool whole = true;
    for (int64_t i = row * pattern.height; i < (row + 1) * pattern.height; ++i)
        whole = whole && !differ(active + i * in, backward + i * in, in_a, in_rest, in);
    return whole;
}

}  // namespace

bool count_rows(const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int threads) {
    int64_t rows = pattern.rows(), blocks = blocks_of(pattern);
    int64_t* begins = (int64_t*)pattern.row_offsets.address;
    Rows<uint8_t> scratch(threads, 2 * blocks, 0), weights(threads, 2 * pattern.in_features, 0);
    bool whole = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : whole)
    for (int64_t row = 0; row < rows; ++row) {
        Line line = line_of(active, backward, pattern, row, scratch.own());
        if (!pattern.unstructured())
            whole = whole && is_whole(line, active, backward, pattern, row, weights.own());
        begins[row + 1] = count_members<InA>(line.active, line.backward, blocks);
        begins[rows + row + 1] = count_members<InRest>(line.active, line.backward, blocks);
    }
    begins[0] = 0;
    for (int64_t row = 0; row < 2 * rows; ++row) begins[row + 1] += begins[row];
    return whole;
}

void fill_columns(const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int threads) {
    int64_t blocks = blocks_of(pattern);
    Rows<uint8_t> scratch(threads, 2 * blocks, 0);
    with_columns(pattern, [&](auto* columns) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < pattern.rows(); ++row) {
            Line line = line_of(active, backward, pattern, row, scratch.own());
            list_members<InA>(line.active, line.backward, blocks, columns + pattern.begin(row));
            list_members<InRest>(line.active, line.backward, blocks, columns + pattern.begin(pattern.rows() + row));
        }
    });
}

bool is_sound(const Pattern& pattern, int64_t stored) {
    int64_t rows = pattern.rows();
    bool sound = pattern.begin(0) == 0 && pattern.begin(2 * rows) == stored;
    for (int64_t row = 0; row < 2 * rows; ++row) sound = sound && pattern.begin(row) <= pattern.end(row);
    with_columns(pattern, [&](auto* columns) {
        std::remove_pointer_t<decltype(columns)> lowest = 0, highest = 0;
        for (int64_t block = 0; block < stored; ++block) {
            lowest = std::min(lowest, columns[block]);
            highest = std::max(highest, columns[block]);
        }
        sound = sound && lowest >= 0 && (stored == 0 || highest < blocks_of(pattern));
    });
    return sound;
}

void mark_members(const Pattern& pattern, bool all, uint8_t* mask, int threads) {
    int64_t in = pattern.in_features, width = pattern.width, rows = pattern.rows();
    expect_large_pages({(uintptr_t)mask, 1}, pattern.out_features * in);
    with_columns(pattern, [&](auto* columns) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            uint8_t* line = mask + row * pattern.height * in;
            std::memset(line, 0, in);
            for (int64_t half : {row, rows + row})
                for (int64_t block = pattern.begin(half), end = pattern.end(half); block < end && (half == row || all);
                     ++block)
                    for (int64_t j = 0; j < width; ++j) line[columns[block] * width + j] = 1;
            for (int64_t i = 1; i < pattern.height; ++i) std::memcpy(line + i * in, line, in);
        }
    });
}

SetSizes set_sizes(const uint8_t* active, const uint8_t* backward, int64_t numel, int threads) {
    int64_t in_a = 0, in_b = 0, torn = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : in_a, in_b, torn)
    for (int part = 0; part < threads; ++part) {
        int64_t first = numel * part / threads, count = numel * (part + 1) / threads - first;
        in_a += count_members<InA>(active + first, backward + first, count);
        in_b += count_members<InA>(backward + first, active + first, count);
        torn += count_members<InRest>(backward + first, active + first, count);
    }
    return {in_a, in_b, torn};
}

void pack_bits(const uint8_t* mask, int64_t numel, uint8_t* packed, int threads) {
    int64_t whole = numel / WORD;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t byte = 0; byte < whole; ++byte) packed[byte] = uint8_t(bits_of(word_at(mask + byte * WORD)));
    if (numel % WORD == 0) return;
    packed[whole] = 0;
    for (int64_t i = whole * WORD; i < numel; ++i) packed[whole] |= mask[i] << (i % WORD);
}

void unpack_bits(const uint8_t* packed, int64_t numel, uint8_t* mask, int threads) {
    int64_t whole = numel / WORD;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t byte = 0; byte < whole; ++byte) {
        // Eight copies of the byte, of which each keeps the bit of its own place, which adding 127 carries to the top.
        uint64_t kept = packed[byte] * LOWEST & 0x8040201008040201u;
        uint64_t word = (((kept & ~TOP) + ~TOP) | kept) >> 7 & LOWEST;
        std::memcpy(mask + byte * WORD, &word, WORD);
    }
    for (int64_t i = whole * WORD; i < numel; ++i) mask[i] = packed[whole] >> (i % WORD) & 1;
}

int64_t set_digest(const Pattern& pattern, int threads) {
    int64_t rows = pattern.rows(), in = pattern.in_features, width = pattern.width, height = pattern.height;
    uint64_t digest = 0;
    auto mix = [](uint64_t mixed) {
        mixed *= uint64_t(-7046029254386353131);
        mixed = (mixed ^ uint64_t(int64_t(mixed) >> 29)) * uint64_t(-4658895280553007687);
        return mixed ^ uint64_t(int64_t(mixed) >> 32);
    };
    with_columns(pattern, [&](auto* columns) {
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : digest)
        for (int64_t line = 0; line < 2 * rows; ++line) {
            uint64_t first = 2 * uint64_t(line % rows * height * in) + (line < rows ? 2 : 1), sum = 0;
            int64_t begin = pattern.begin(line), end = pattern.end(line);
            if (pattern.unstructured())
                for (int64_t block = begin; block < end; ++block) sum += mix(first + 2 * uint64_t(columns[block]));
            else
                for (int64_t block = begin; block < end; ++block)
                    for (int64_t i = 0; i < height; ++i)
                        for (int64_t j = 0; j < width; ++j)
                            sum += mix(first + 2 * uint64_t(columns[block] * width + i * in + j));
            digest += sum;
        }
    });
    for (int64_t line = 0; line <= 2 * rows; ++line)
        digest += uint64_t(line + 1) * uint64_t(-4265267296055464877) * uint64_t(pattern.begin(line));
    return int64_t(digest);
}

}  // namespace hf_topkast
