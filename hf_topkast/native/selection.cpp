#include "selection.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "keys.h"
#include "memory.h"

namespace hf_topkast {
namespace {

constexpr int MOST_SETS = 2;
// From so many numbers on a sample says about where the thresholds are, and one pass takes out the numbers near them. If
// it misleads, or too many numbers lie there, they are sought digit by digit, of 16 bits: two passes then do for fp32, and
// the counters stay in the second cache. Fewer numbers have a first digit of 11 bits, and those that share it are few
// enough to be copied.
constexpr int64_t MANY = int64_t(1) << 17;
constexpr int64_t SAMPLE = int64_t(1) << 18;  // numbers at most, and no more than one of SPARSEST
constexpr int64_t SPARSEST = 17;              // odd, as all steps: columns of any number are all met
constexpr int64_t FEW_KEYS = 1 << 13;         // that are put in order as they are
constexpr int REACH = 16;                     // first digits, about a tenth, that thresholds of two rows lie apart
constexpr double DEVIATIONS = 5;              // of its own, by which a sample may err

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

    // The bounds of sets of so many members, each between none and all; perhaps not far from those that are `near`.
    void find(const int64_t* counts, int sets, Bound<Word>* bounds, const Bound<Word>* near) {
        if (numel >= MANY ? find_by_sample(counts, sets, bounds) : near && find_near(near, counts, sets, bounds)) return;
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
    static constexpr int DIGIT = 16, SHIFT = BITS - DIGIT;  // of windows

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
        int64_t step = std::max(SPARSEST, numel / SAMPLE | 1), sampled = 0;
        std::fill(counters, counters + (1 << DIGIT), 0);
        for (int64_t i = 0; i < numel; i += step, ++sampled)
            ++counters[key_of<Word, MAGNITUDES>(scores[i]) >> SHIFT];
        Window<Word> windows[MOST_SETS] = {};
        int64_t rooms[MOST_SETS] = {0};
        for (int set = 0; set < sets; ++set) {
            double share = double(counts[set]) / numel, expected = share * sampled;
            double error = DEVIATIONS * std::sqrt(expected * (1 - share)) + 2;
            int64_t digit = (1 << DIGIT) - 1, larger = counters[digit];
            while (digit > 0 && larger < expected - error) larger += counters[--digit];
            int64_t high = digit, inside = counters[digit];
            while (digit > 0 && larger < expected + error) inside += counters[--digit], larger += counters[digit];
            if (inside * 8 > sampled) return false;
            windows[set] = {Word(digit), Word(high - digit)};
            rooms[set] = inside * step * 3 / 2;
        }
        return find_inside(windows, rooms, counts, sets, bounds);
    }

    // The same of few numbers, if the bounds are not far from others.
    bool find_near(const Bound<Word>* near, const int64_t* counts, int sets, Bound<Word>* bounds) {
        Window<Word> windows[MOST_SETS] = {};
        int64_t rooms[MOST_SETS] = {0};
        for (int set = 0; set < sets; ++set) {
            int digit = near[set].threshold >> SHIFT, low = std::max(0, digit - REACH);
            windows[set] = {Word(low), Word(std::min((1 << DIGIT) - 1, digit + REACH) - low)};
            rooms[set] = numel / 4;
        }
        return find_inside(windows, rooms, counts, sets, bounds);
    }

    // The same from the numbers inside windows, for about as many of which there is room; false if it cannot be.
    bool find_inside(const Window<Word>* windows, const int64_t* rooms, const int64_t* counts, int sets,
                     Bound<Word>* bounds) {
        int64_t shares[MOST_SETS] = {0}, firsts[MOST_SETS + 1] = {0};  // of a part; where the keys of windows begin
        for (int set = 0; set < sets; ++set) {
            shares[set] = rooms[set] / parts + STRIDE * 64;
            firsts[set + 1] = firsts[set] + shares[set] * parts;
        }
        std::unique_ptr<Word[]> keys(new Word[firsts[sets]]);
        struct Found {
            int64_t above[MOST_SETS] = {0};
            Word *begins[MOST_SETS], *ends[MOST_SETS];
        };
        std::vector<Found> found(parts);
        bool fits = true;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(&& : fits)
        for (int part = 0; part < parts; ++part) {
            Found& own = found[part];
            for (int set = 0; set < sets; ++set)
                own.begins[set] = own.ends[set] = keys.get() + firsts[set] + part * shares[set];
            for_pieces(begin(part), begin(part + 1), [&](int64_t from, int64_t to) {
                for (int set = 0; set < sets && fits; ++set) {
                    Window<Word> window = windows[set];
                    own.above[set] += count_above<MAGNITUDES>(scores + from, to - from, SHIFT,
                                                              Word(window.low + window.width));
                    own.ends[set] = take_window<MAGNITUDES>(scores + from, to - from, SHIFT, window, own.ends[set],
                                                            own.begins[set] + shares[set]);
                    fits = own.ends[set];
                }
            });
        }
        if (!fits) return false;
        for (int set = 0; set < sets; ++set) {
            int64_t wanted = counts[set];
            Word *first = keys.get() + firsts[set], *last = first;
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
    auto mark_row = [&](int64_t row, uint32_t* own, int sharing, Bound<Word>* bounds, bool near) {
        Finder search(scores + row * columns, columns, parts, sharing, own);
        int64_t counts[MOST_SETS] = {0};
        for (int set = 0; set < sets; ++set)
            counts[set] = markings[set].count / rows + (row < markings[set].count % rows);
        search.find(counts, sets, bounds, near ? bounds : nullptr);
#pragma omp parallel for schedule(static, 1) num_threads(sharing) if (sharing > 1)
        for (int part = 0; part < parts; ++part)
            for_pieces(search.begin(part), search.begin(part + 1), [&](int64_t from, int64_t to) {
                for (int set = 0; set < sets; ++set)
                    search.mark(bounds[set], from, to, markings[set].mask + row * columns);
            });
    };
    if (within) {  // in no region: one inside another would make its threads anew
        Bound<Word> bounds[MOST_SETS];
        return mark_row(0, counters.get(), threads, bounds, false);
    }
#pragma omp parallel num_threads(threads)
    {
        Bound<Word> bounds[MOST_SETS];
        bool near = false;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            mark_row(row, counters.get() + omp_get_thread_num() * room, 1, bounds, near);
            near = columns >= PIECE / 8;  // of fewer it is not worth the memory
        }
    }
}

}  // namespace

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
