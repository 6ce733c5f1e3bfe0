#include "passes.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "memory.h"

namespace hf_topkast {
namespace {

constexpr int64_t WORD = 8;  // bytes
constexpr uint64_t LOWEST = 0x0101010101010101u, TOP = LOWEST << 7;  // bit of each byte

uint64_t word_at(const uint8_t* bytes) {
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
uint64_t bits_of(uint64_t bytes) { return (bytes * 0x0102040810204080u) >> 56; }

template <class Half, class Column>
void list_members(const uint8_t* active, const uint8_t* backward, int64_t count, Column* columns) {
    constexpr int64_t BITS = 64;
    for (int64_t first = 0; first < count; first += BITS) {
        uint64_t members = 0;
        if (first + BITS <= count)
            for (int64_t i = 0; i < BITS; i += WORD)
                members |= bits_of(Half::of(word_at(active + first + i), word_at(backward + first + i))) << i;
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

Line line_of(const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int64_t row, uint8_t* scratch) {
    int64_t in = pattern.in_features, blocks = in / pattern.width;
    const uint8_t *a = active + row * pattern.height * in, *b = backward + row * pattern.height * in;
    if (pattern.width == 1) return {a, b};
    for (int64_t block = 0; block < blocks; ++block) {
        scratch[block] = a[block * pattern.width];
        scratch[blocks + block] = b[block * pattern.width];
    }
    return {scratch, scratch + blocks};
}

// Whether every weight of a line of blocks is where the first one of its block is.
bool is_whole(const Line& line, const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int64_t row) {
    int64_t in = pattern.in_features, blocks = in / pattern.width;
    uint8_t differs = 0;
    for (int64_t i = row * pattern.height; i < (row + 1) * pattern.height; ++i) {
        const uint8_t *a = active + i * in, *b = backward + i * in;
        for (int64_t block = 0; block < blocks; ++block) {
            uint8_t in_a = line.active[block], in_rest = line.backward[block] & ~in_a;
            for (int64_t j = block * pattern.width; j < (block + 1) * pattern.width; ++j)
                differs |= (a[j] ^ in_a) | ((b[j] & ~a[j]) ^ in_rest);
        }
    }
    return !(differs & 1);
}

// Calls visit(columns) with the type of the columns.
template <class Visit>
void with_columns(const Pattern& pattern, Visit visit) {
    if (pattern.columns.itemsize == 2)
        visit((int16_t*)pattern.columns.address);
    else
        visit((int32_t*)pattern.columns.address);
}

int64_t blocks_of(const Pattern& pattern) { return pattern.in_features / pattern.width; }

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

bool count_rows(const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int threads) {
    int64_t rows = pattern.rows(), blocks = blocks_of(pattern);
    int64_t* begins = (int64_t*)pattern.row_offsets.address;
    Rows<uint8_t> scratch(threads, 2 * blocks, 0);
    bool whole = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : whole)
    for (int64_t row = 0; row < rows; ++row) {
        Line line = line_of(active, backward, pattern, row, scratch.own());
        if (!pattern.unstructured()) whole = whole && is_whole(line, active, backward, pattern, row);
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

void assemble(const Pattern& pattern, const Array& values, const Array& reservoir, const Array& theta, int threads) {
    int64_t in = pattern.in_features, width = pattern.width, height = pattern.height, rows = pattern.rows();
    expect_large_pages(theta, pattern.out_features * in);
    Rows<uint8_t> scratch(threads, in, 0);
    auto fill = [&](auto* columns, auto* item) {
        auto *own = (decltype(item))values.address, *rest = (decltype(item))reservoir.address;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            uint8_t* taken = scratch.own();
            std::memset(taken, 0, in);
            int64_t members = 0;
            for (int64_t half : {row, rows + row})
                for (int64_t block = pattern.begin(half), end = pattern.end(half); block < end; ++block, members += width)
                    for (int64_t j = 0; j < width; ++j) taken[columns[block] * width + j] = 1;
            int64_t before = (pattern.begin(row) + pattern.begin(rows + row) - pattern.begin(rows)) * height * width;
            for (int64_t i = 0; i < height; ++i) {
                auto* line = (decltype(item))theta.address + (row * height + i) * in;
                if (rest) {
                    auto* next = rest + (row * height + i) * in - before - i * members;
                    auto* end = next + in - members;
                    for (int64_t j = 0; next < end; ++j) {  // without a branch: it would be guessed wrong too often
                        line[j] = *next;
                        next += !taken[j];
                    }
                } else {
                    std::fill(line, line + in, 0);
                }
                for (int64_t half : {row, rows + row})
                    for (int64_t block = pattern.begin(half), end = pattern.end(half); block < end; ++block)
                        for (int64_t j = 0; j < width; ++j)
                            line[columns[block] * width + j] = own[(block * height + i) * width + j];
            }
        }
    };
    with_columns(pattern,
                 [&](auto* columns) { with_items(theta.itemsize, [&](auto* item) { fill(columns, item); }); });
}

void leave_out(const Array& numbers, const uint8_t* mask, int64_t numel, int64_t marked, const Array& rest,
               int threads) {
    std::vector<int64_t> begins(threads + 1, 0);
    expect_large_pages(rest, numel - marked);
    auto first = [&](int part) { return numel * part / threads; };
    with_items(numbers.itemsize, [&](auto* item) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static, 1)
            for (int part = 0; part < threads; ++part) {
                int64_t count = first(part + 1) - first(part);
                const uint8_t* members = mask + first(part);
                begins[part + 1] = count - count_members<InA>(members, members, count);
            }
#pragma omp single
            for (int part = 0; part < threads; ++part) begins[part + 1] += begins[part];
#pragma omp for schedule(static, 1)
            for (int part = 0; part < threads; ++part) {
                auto* from = (decltype(item))numbers.address + first(part);
                auto *next = (decltype(item))rest.address + begins[part], *end = next + begins[part + 1] - begins[part];
                for (const uint8_t* member = mask + first(part); next < end; ++member) {
                    *next = *from++;
                    next += !*member;
                }
            }
        }
    });
}

void find_sources(const Pattern& before, const Pattern& now, int64_t* sources, int threads) {
    int64_t rows = now.rows(), size = now.height * now.width;
    expect_large_pages({(uintptr_t)sources, sizeof *sources}, now.begin(2 * rows) * size);
    Rows<int64_t> scratch(threads, blocks_of(now), -1);
    auto find = [&](auto* old_columns, auto* columns) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            int64_t* places = scratch.own();
            for (int64_t half : {row, rows + row})
                for (int64_t block = before.begin(half), end = before.end(half); block < end; ++block)
                    places[old_columns[block]] = block * size;
            for (int64_t half : {row, rows + row})
                for (int64_t block = now.begin(half), end = now.end(half); block < end; ++block) {
                    int64_t source = places[columns[block]];
                    for (int64_t j = 0; j < size; ++j) sources[block * size + j] = source < 0 ? -1 : source + j;
                }
            for (int64_t half : {row, rows + row})
                for (int64_t block = before.begin(half), end = before.end(half); block < end; ++block)
                    places[old_columns[block]] = -1;
        }
    };
    with_columns(before, [&](auto* old) { with_columns(now, [&](auto* columns) { find(old, columns); }); });
}

bool carry(const Array& numbers, int64_t former, const int64_t* sources, int64_t count, const Array& fresh, int step,
           const Array& moved, int threads) {
    bool inside = true;
    expect_large_pages(moved, count);
    with_items(numbers.itemsize, [&](auto* item) {
        auto *from = (decltype(item))numbers.address, *start = (decltype(item))fresh.address;
        auto* to = (decltype(item))moved.address;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : inside)
        for (int64_t slot = 0; slot < count; ++slot) {
            int64_t source = sources[slot];
            to[slot] = uint64_t(source) < uint64_t(former) ? from[source] : start[slot * step];
            inside = inside && source < former;
        }
    });
    return inside;
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
