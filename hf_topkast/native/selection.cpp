#include "selection.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "memory.h"

namespace hf_topkast {
namespace {

constexpr int MOST_SETS = 2;
constexpr int64_t STRIDE = 16;  // numbers that the compiler compares at once
constexpr int64_t PIECE = 4096;  // numbers that the first cache holds
// From so many numbers on a sample says about where the thresholds are, and one pass takes out the numbers near them. If
// it misleads, or too many numbers lie there, they are sought digit by digit, of 16 bits: two passes then do for fp32, and
// the counters stay in the second cache. Fewer numbers have a first digit of 11 bits, and those that share it are few
// enough to be copied.
constexpr int64_t MANY = int64_t(1) << 17;
constexpr int64_t SAMPLE = int64_t(1) << 18;  // numbers at most, and no more than one of SPARSEST
constexpr int64_t SPARSEST = 17;              // odd, as all steps: columns of any number are all met
constexpr int64_t FEW_KEYS = 1 << 13;         // that are put in order as they are
constexpr double DEVIATIONS = 5;              // of its own, by which a sample may err

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

// A set of the largest: what lies above the threshold and, before index `until`, what equals it.
template <class Word>
struct Bound {
    Word threshold;
    int64_t until;
};

// Finds thresholds digit by digit, the highest first, counting the keys that share the digits found so far.
template <class Word, bool MAGNITUDES>
class Search {
   public:
    // `counters` has room for `room(numel, parts)` integers, and a part fewer than 2³² numbers.
    Search(const Word* scores, int64_t numel, int parts, int threads, uint32_t* counters)
        : scores(scores), numel(numel), parts(parts), threads(threads), counters(counters) {}

    static int64_t room(int64_t numel, int parts) { return counters_room(numel, parts) + (numel < MANY ? numel : 0); }

    int64_t begin(int part) const { return numel * part / parts; }

    // The bounds of sets of so many members, each between none and all.
    void find(const int64_t* counts, int sets, Bound<Word>* bounds) {
        if (numel >= MANY && find_by_sample(counts, sets, bounds)) return;
        int64_t missing[MOST_SETS];
        for (int set = 0; set < sets; ++set) bounds[set].threshold = 0, missing[set] = counts[set];
        for (int below = BITS, bits = digit(numel); below > 0; below -= bits) {
            bits = std::min(bits, below);
            int searches = below == BITS ? 1 : sets;  // the first digit of all is counted once
            count(bounds, searches, below, bits);
            for (int set = 0; set < sets; ++set) {
                int search = std::min(set, searches - 1);
                int64_t value = (int64_t(1) << bits) - 1;
                for (; value > 0; --value) {
                    int64_t found = total(search, bits, value);
                    if (found >= missing[set]) break;
                    missing[set] -= found;
                }
                bounds[set].threshold |= Word(value << (below - bits));
                if (numel < MANY)
                    finish(bounds[set], missing[set], below - bits);
                else if (below == bits)
                    bounds[set].until = end_of_ties(bounds[set].threshold, missing[set], search, bits);
            }
            if (numel < MANY) return;
        }
    }

    void mark(const Bound<Word>& bound, int64_t begin, int64_t end, uint8_t* mask) const {
        int64_t middle = std::min(std::max(bound.until, begin), end);
        mark_from<MAGNITUDES>(scores + begin, middle - begin, bound.threshold, mask + begin);
        mark_above<MAGNITUDES>(scores + middle, end - middle, bound.threshold, mask + middle);
    }

   private:
    static constexpr int BITS = 8 * sizeof(Word), FIRST_OF_FEW = 11;

    static int64_t counters_room(int64_t numel, int parts) { return (int64_t(parts) * MOST_SETS) << digit(numel); }

    const Word* scores;
    int64_t numel;
    int parts, threads;
    uint32_t* counters;

    static int digit(int64_t numel) { return numel < MANY ? FIRST_OF_FEW : 16; }

    // Of few numbers: those that share the first digit are taken out, and divided at the one that is sought.
    void finish(Bound<Word>& bound, int64_t wanted, int below) {
        if (wanted == 0) {
            bound = {Word(~Word(0)), 0};
            return;
        }
        Word* keys = (Word*)(counters + counters_room(numel, parts));
        divide(bound, wanted, keys, take_matches<MAGNITUDES>(scores, numel, below, Word(bound.threshold >> below), keys));
    }

    // The bound of the `wanted` largest of some keys, where all that equal the threshold are among these.
    void divide(Bound<Word>& bound, int64_t wanted, Word* keys, Word* end) const {
        if (end - keys > FEW_KEYS) end = keep_bucket(wanted, keys, end);
        Word* sought = keys + wanted - 1;
        std::nth_element(keys, sought, end, std::greater<Word>());
        bound.threshold = *sought;
        int64_t ties = 1;
        for (Word* key = keys; key < end; ++key) {
            wanted -= *key > *sought;
            ties += key != sought && *key == *sought;
        }
        bound.until = ties == wanted ? numel : behind_ties(*sought, wanted, 0);
    }

    // The same as `find`, from the numbers near where a sample has the thresholds; false if they are not there.
    bool find_by_sample(const int64_t* counts, int sets, Bound<Word>* bounds) {
        constexpr int DIGIT = 16, SHIFT = BITS - DIGIT;
        int64_t step = std::max(SPARSEST, numel / SAMPLE | 1), sampled = 0;
        std::fill(counters, counters + (1 << DIGIT), 0);
        for (int64_t i = 0; i < numel; i += step, ++sampled)
            ++counters[key_of<Word, MAGNITUDES>(scores[i]) >> SHIFT];
        Window<Word> windows[MOST_SETS];
        int64_t rooms[MOST_SETS + 1] = {0};  // where the keys of each window begin
        for (int set = 0; set < sets; ++set) {
            double share = double(counts[set]) / numel, expected = share * sampled;
            double error = DEVIATIONS * std::sqrt(expected * (1 - share)) + 2;
            int64_t digit = (1 << DIGIT) - 1, larger = counters[digit];
            while (digit > 0 && larger < expected - error) larger += counters[--digit];
            int64_t high = digit, inside = counters[digit];
            while (digit > 0 && larger < expected + error) inside += counters[--digit], larger += counters[digit];
            if (inside * 8 > sampled) return false;
            windows[set] = {Word(digit), Word(high - digit)};
            rooms[set + 1] = rooms[set] + (inside * step * 3 / 2 / parts + STRIDE * 64) * parts;
        }
        std::unique_ptr<Word[]> keys(new Word[rooms[sets]]);
        struct Found {
            int64_t above[MOST_SETS] = {0};
            Word *begins[MOST_SETS], *ends[MOST_SETS];
        };
        std::vector<Found> found(parts);
        bool fits = true;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(&& : fits)
        for (int part = 0; part < parts; ++part) {
            Found& own = found[part];
            Word* rooms_end[MOST_SETS];
            for (int set = 0; set < sets; ++set) {
                int64_t share = (rooms[set + 1] - rooms[set]) / parts;
                own.begins[set] = own.ends[set] = keys.get() + rooms[set] + part * share;
                rooms_end[set] = own.begins[set] + share;
            }
            for_pieces(begin(part), begin(part + 1), [&](int64_t from, int64_t to) {
                for (int set = 0; set < sets && fits; ++set) {
                    Window<Word> window = windows[set];
                    own.above[set] += count_above<MAGNITUDES>(scores + from, to - from, SHIFT,
                                                              Word(window.low + window.width));
                    own.ends[set] = take_window<MAGNITUDES>(scores + from, to - from, SHIFT, window, own.ends[set],
                                                            rooms_end[set]);
                    fits = own.ends[set];
                }
            });
        }
        if (!fits) return false;
        for (int set = 0; set < sets; ++set) {
            int64_t wanted = counts[set];
            Word *first = keys.get() + rooms[set], *last = first;
            for (const Found& own : found) {
                wanted -= own.above[set];
                last = std::copy(own.begins[set], own.ends[set], last);
            }
            if (wanted < 1 || wanted > last - first) return false;
            divide(bounds[set], wanted, first, last);
        }
        return true;
    }

    uint32_t* counters_of(int part, int search, int bits) const {
        return counters + ((int64_t(part) * MOST_SETS + search) << bits);
    }

    int64_t total(int search, int bits, int64_t value) const {
        int64_t sum = 0;
        for (int part = 0; part < parts; ++part) sum += counters_of(part, search, bits)[value];
        return sum;
    }

    // Counts, by the digit that ends `below` bits from the lowest, the keys whose higher bits are those of a bound.
    void count(const Bound<Word>* bounds, int searches, int below, int bits) {
        Word mask = Word((int64_t(1) << bits) - 1);
        int shift = below - bits;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
        for (int part = 0; part < parts; ++part) {
            uint32_t* first = counters_of(part, 0, bits);
            std::fill(first, first + (int64_t(searches) << bits), 0);
            for_pieces(begin(part), begin(part + 1), [&](int64_t from, int64_t to) {
                if (below == BITS) return count_first_digits<MAGNITUDES>(scores + from, to - from, shift, first);
                for (int search = 0; search < searches; ++search)
                    count_digits<MAGNITUDES>(scores + from, to - from, below, Word(bounds[search].threshold >> below),
                                             shift, mask, counters_of(part, search, bits));
            });
        }
    }

    // The index behind the `wanted`-th key that equals the threshold, of which the last digits were just counted.
    int64_t end_of_ties(Word threshold, int64_t wanted, int search, int bits) const {
        int64_t digit = threshold & Word((int64_t(1) << bits) - 1);
        if (wanted == total(search, bits, digit)) return numel;
        int part = 0;
        for (int64_t ties; wanted > (ties = counters_of(part, search, bits)[digit]); ++part) wanted -= ties;
        return behind_ties(threshold, wanted, begin(part));
    }

    int64_t behind_ties(Word threshold, int64_t wanted, int64_t i) const {
        while (wanted > 0) {
            if (i + STRIDE <= numel && !meets<MAGNITUDES>(scores + i, 0, threshold))
                i += STRIDE;
            else
                wanted -= key_of<Word, MAGNITUDES>(scores[i++]) == threshold;
        }
        return i;
    }
};

template <class Word, bool MAGNITUDES>
void mark(const Word* scores, int64_t rows, int64_t columns, const Marking* markings, int sets, int threads) {
    using Finder = Search<Word, MAGNITUDES>;
    bool within = rows == 1;  // threads share the row, or the rows
    int parts = within ? std::max<int64_t>(threads, columns >> 31) : 1;
    int64_t room = Finder::room(columns, parts);
    // Zeroed where they are used.
    std::unique_ptr<uint32_t[]> counters(new uint32_t[within ? room : room * threads]);
#pragma omp parallel for schedule(static) num_threads(threads) if (!within)
    for (int64_t row = 0; row < rows; ++row) {
        uint32_t* own = within ? counters.get() : counters.get() + omp_get_thread_num() * room;
        Finder search(scores + row * columns, columns, parts, within ? threads : 1, own);
        int64_t counts[MOST_SETS];
        Bound<Word> bounds[MOST_SETS];
        for (int set = 0; set < sets; ++set)
            counts[set] = markings[set].count / rows + (row < markings[set].count % rows);
        search.find(counts, sets, bounds);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (within && threads > 1)
        for (int part = 0; part < parts; ++part)
            for_pieces(search.begin(part), search.begin(part + 1), [&](int64_t from, int64_t to) {
                for (int set = 0; set < sets; ++set)
                    search.mark(bounds[set], from, to, markings[set].mask + row * columns);
            });
    }
}

}  // namespace

FOR_EVERY_CPU
void add_squares(const float* numbers, int64_t count, double* sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] += double(numbers[i]) * double(numbers[i]);
}

void block_norms(const float* theta, int64_t rows, int64_t columns, int64_t height, int64_t width, float* norms,
                 int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> sums(columns);  // of the columns of a row of blocks
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows / height; ++row) {
            std::fill(sums.begin(), sums.end(), 0);
            for (int64_t i = 0; i < height; ++i)
                add_squares(theta + (row * height + i) * columns, columns, sums.data());
            for (int64_t block = 0; block < columns / width; ++block) {
                double sum = 0;
                for (int64_t j = 0; j < width; ++j) sum += sums[block * width + j];
                norms[row * (columns / width) + block] = float(std::sqrt(sum));
            }
        }
    }
}

void mark_largest(const Array& scores, bool magnitudes, int64_t rows, int64_t columns, const Marking* markings,
                  int sets, int threads) {
    for (int set = 0; set < sets; ++set) expect_large_pages({(uintptr_t)markings[set].mask, 1}, rows * columns);
    auto with = [&](auto* words, auto by_magnitude) {
        mark<std::remove_const_t<std::remove_pointer_t<decltype(words)>>, decltype(by_magnitude)::value>(
            words, rows, columns, markings, sets, threads);
    };
    auto with_order = [&](auto* words) {
        if (magnitudes)
            with(words, std::true_type());
        else
            with(words, std::false_type());
    };
    if (scores.itemsize == 4)
        with_order((const uint32_t*)scores.address);
    else
        with_order((const uint16_t*)scores.address);
}

}  // namespace hf_topkast
