#include "moves.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "lines.h"
#include "memory.h"
#include "spread.h"

namespace hf_topkast {
namespace {

// Calls visit(sources) with their type.
template <class Visit>
void with_sources(const Array& sources, Visit visit) {
    if (sources.itemsize == 4)
        visit((int32_t*)sources.address);
    else
        visit((int64_t*)sources.address);
}

template <class Source>
FOR_EVERY_CPU
int64_t count_before(const Source* sources, int64_t count, int64_t former) {
    int64_t found = 0;
    for (int64_t slot = 0; slot < count; ++slot) found += sources[slot] >= 0 && sources[slot] < former;
    return found;
}

}  // namespace

void assemble(const Pattern& pattern, const Array& values, const Array& reservoir, const Array& theta, int threads) {
    int64_t in = pattern.in_features, rows = pattern.rows();
    expect_large_pages(theta, pattern.out_features * in);
    Rows<uint8_t> scratch(threads, in, 0);
    auto fill = [&](auto* columns, auto* item, auto height, auto width) {
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
                    spread_rest(next, next + in - members, taken, line);
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
    with_columns(pattern, [&](auto* columns) {
        with_items(theta.itemsize, [&](auto* item) {
            with_sides(pattern, [&](auto height, auto width) { fill(columns, item, height, width); });
        });
    });
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
                gather_rest(from, mask + first(part), next, end);
            }
        }
    });
}

void rearrange(const Pattern& before, const Pattern& now, const Array& theta, const uint8_t* backward,
               const Array& sources, const Array& values, const Array& reservoir, int threads) {
    int64_t rows = now.rows(), in = now.in_features, blocks = blocks_of(now);
    int64_t stored = now.begin(2 * rows) * now.height * now.width;
    expect_large_pages(sources, stored);
    expect_large_pages(values, stored);
    Rows<int32_t> former(threads, blocks, 0);  // place in the old row, A before B\A, of what is there
    auto rearrange = [&](auto* old_columns, auto* columns, auto* item, auto* source, auto height, auto width) {
        using Item = std::remove_pointer_t<decltype(item)>;
        int64_t size = height * width;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            const Item* weights = (const Item*)theta.address + row * height * in;
            int32_t *places = former.own(), in_a = 0;
            std::fill(places, places + blocks, -1);
            for (int64_t block = before.begin(row); block < before.end(row); ++block)
                places[old_columns[block]] = in_a++;
            int32_t place = in_a;
            for (int64_t block = before.begin(rows + row); block < before.end(rows + row); ++block)
                places[old_columns[block]] = place++;
            int64_t from_a = before.begin(row) * size, from_rest = (before.begin(rows + row) - in_a) * size;
            for (int64_t half : {row, rows + row})
                for (int64_t block = now.begin(half), end = now.end(half); block < end; ++block) {
                    int64_t column = columns[block], place = places[column];
                    int64_t first = (place < in_a ? from_a : from_rest) + place * size;
                    auto* own_sources = (decltype(source))sources.address + block * size;
                    Item* own = (Item*)values.address + block * size;
                    for (int64_t j = 0; j < size; ++j) own_sources[j] = place < 0 ? -1 : first + j;
                    for (int64_t i = 0; i < height; ++i)
                        for (int64_t j = 0; j < width; ++j) own[i * width + j] = weights[i * in + column * width + j];
                }
            if (!reservoir.address) continue;
            int64_t members = (now.end(row) - now.begin(row) + now.end(rows + row) - now.begin(rows + row)) * width;
            int64_t earlier = (now.begin(row) + now.begin(rows + row) - now.begin(rows)) * size;
            Item* rest = (Item*)reservoir.address + row * height * in - earlier;
            for (int64_t i = 0; i < height; ++i, rest += in - members)
                gather_rest(weights + i * in, backward + (row * height + i) * in, rest, rest + in - members);
        }
    };
    auto with_types = [&](auto* old, auto* columns, auto* item, auto* source) {
        with_sides(now, [&](auto height, auto width) { rearrange(old, columns, item, source, height, width); });
    };
    with_columns(before, [&](auto* old) {
        with_columns(now, [&](auto* columns) {
            with_items(theta.itemsize, [&](auto* item) {
                with_sources(sources, [&](auto* source) { with_types(old, columns, item, source); });
            });
        });
    });
}

int64_t count_from(const Array& sources, int64_t count, int64_t former) {
    int64_t found = 0;
    with_sources(sources, [&](auto* source) { found = count_before(source, count, former); });
    return found;
}

bool carry(const Array& numbers, int64_t former, const Array& sources, int64_t count, const Array& fresh, int step,
           const Array& moved, int threads) {
    bool inside = true;
    expect_large_pages(moved, count);
    auto take = [&](auto* source, auto* item) {
        auto *from = (decltype(item))numbers.address, *start = (decltype(item))fresh.address;
        auto* to = (decltype(item))moved.address;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : inside)
        for (int64_t slot = 0; slot < count; ++slot) {
            int64_t place = source[slot];
            to[slot] = uint64_t(place) < uint64_t(former) ? from[place] : start[slot * step];
            inside = inside && place < former;
        }
    };
    with_sources(sources, [&](auto* source) { with_items(numbers.itemsize, [&](auto* item) { take(source, item); }); });
    return inside;
}

}  // namespace hf_topkast
