#include "orders/explore.h"

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/random.h"
#include "orders/order.h"

namespace mlfr {

namespace {

class BitSet {
  public:
    explicit BitSet(uint64_t n) : words_((n + 63) / 64, 0) {}

    bool has(uint64_t i) const { return words_[i / 64] >> (i % 64) & 1; }

    // Whether the number was not there before.
    bool add(uint64_t i) {
        uint64_t& word = words_[i / 64];
        const uint64_t bit = uint64_t{1} << (i % 64);
        const bool is_new = (word & bit) == 0;
        word |= bit;
        return is_new;
    }

  private:
    std::vector<uint64_t> words_;
};

}  // namespace

// The different ones among uniform numbers, in the order in which they first come, are a uniform sequence
// without repetition.
template <class Id>
void draw_distinct(uint64_t n, uint64_t count, uint64_t seed, int threads, Id* out) {
    if (count > n) throw std::invalid_argument("count: more than there are to draw from");
    if (count > n / 2) return permutation(n, seed, threads, count, out);
    Stream stream(seed, 0);
    BitSet drawn(n);
    for (uint64_t k = 0; k < count;) {
        const uint64_t number = stream.below(n);
        if (drawn.add(number)) out[k++] = static_cast<Id>(number);
    }
}

template <class Id>
void mix_in(const Id* items, uint64_t count, const Id* extra, uint64_t extra_count, uint64_t seed,
            int threads, Id* out) {
    const uint64_t total = count + extra_count;
    if (count == 0) {
        std::copy_n(extra, extra_count, out);
        return;
    }
    std::vector<uint64_t> positions(extra_count);
    draw_distinct(total, extra_count, seed, threads, positions.data());
    BitSet is_extra(total);
    std::vector<uint64_t> before(num_chunks(total), 0);  // items, not extra ones, before each chunk
    for (uint64_t k = 0; k < extra_count; ++k) {
        is_extra.add(positions[k]);
        out[positions[k]] = extra[k];
        ++before[positions[k] / kChunk];
    }
    uint64_t items_before = 0;
    for (uint64_t chunk = 0; chunk < before.size(); ++chunk) {
        const uint64_t size = std::min(kChunk, total - chunk * kChunk);
        items_before += size - std::exchange(before[chunk], items_before);
    }
    for_chunks(total, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        uint64_t next = before[chunk];
        for (uint64_t i = first; i < last; ++i) {  // without branches, which nothing could predict
            const bool has_extra = is_extra.has(i);
            const Id item = items[std::min(next, count - 1)];
            out[i] = has_extra ? out[i] : item;
            next += !has_extra;
        }
    });
}

#define MLFR_INSTANTIATE(Id)                                                 \
    template void draw_distinct<Id>(uint64_t, uint64_t, uint64_t, int, Id*); \
    template void mix_in<Id>(const Id*, uint64_t, const Id*, uint64_t, uint64_t, int, Id*);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)
#undef MLFR_INSTANTIATE

}  // namespace mlfr
