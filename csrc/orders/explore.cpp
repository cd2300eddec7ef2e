#include "orders/explore.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "common/random.h"
#include "orders/order.h"

namespace mlfr {

// The different ones among uniform numbers, in the order in which they first come, are a uniform sequence
// without repetition.
template <class Id>
void draw_distinct(uint64_t n, uint64_t count, uint64_t seed, int threads, Id* out) {
    if (count > n) throw std::invalid_argument("count: more than there are to draw from");
    if (count > n / 2) return permutation(n, seed, threads, count, out);
    Stream stream(seed, 0);
    std::vector<uint64_t> drawn((n + 63) / 64, 0);  // a bit for each number
    constexpr uint64_t kAhead = 64;                 // whose words are fetched at the same time
    uint64_t numbers[kAhead];
    for (uint64_t k = 0; k < count;) {
        const uint64_t ahead = std::min(kAhead, count - k);
        for (uint64_t j = 0; j < ahead; ++j) {
            numbers[j] = stream.below(n);
            __builtin_prefetch(&drawn[numbers[j] / 64], 1);
        }
        for (uint64_t j = 0; j < ahead; ++j) {
            const uint64_t bit = uint64_t{1} << (numbers[j] % 64);
            uint64_t& word = drawn[numbers[j] / 64];
            if ((word & bit) == 0) out[k++] = static_cast<Id>(numbers[j]);
            word |= bit;
        }
    }
}

template <class Id>
void place_evenly(const Id* items, uint64_t count, uint64_t samples, int threads, Id* order) {
    if (count > samples) throw std::invalid_argument("items: more than there are places");
    if (count == 0) return;
    const uint64_t step = samples / count, rest = samples % count;
    for_chunks(count, threads, [=](uint64_t, uint64_t first, uint64_t last) {
        const auto begin = static_cast<unsigned __int128>(first) * samples;
        auto place = static_cast<uint64_t>(begin / count), beyond = static_cast<uint64_t>(begin % count);
        for (uint64_t i = first; i < last; ++i) {
            order[place] = items[i];
            place += step;
            beyond += rest;
            if (beyond >= count) {
                beyond -= count;
                ++place;
            }
        }
    });
}

template void draw_distinct<uint32_t>(uint64_t, uint64_t, uint64_t, int, uint32_t*);
template void draw_distinct<uint64_t>(uint64_t, uint64_t, uint64_t, int, uint64_t*);
template void place_evenly<uint32_t>(const uint32_t*, uint64_t, uint64_t, int, uint32_t*);
template void place_evenly<uint64_t>(const uint64_t*, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
