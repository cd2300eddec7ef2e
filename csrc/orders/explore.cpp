#include "orders/explore.h"

#include <stdexcept>
#include <vector>

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
    for (uint64_t k = 0; k < count;) {
        const uint64_t number = stream.below(n), bit = uint64_t{1} << (number % 64);
        uint64_t& word = drawn[number / 64];
        if ((word & bit) == 0) out[k++] = static_cast<Id>(number);
        word |= bit;
    }
}

template void draw_distinct<uint32_t>(uint64_t, uint64_t, uint64_t, int, uint32_t*);
template void draw_distinct<uint64_t>(uint64_t, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
