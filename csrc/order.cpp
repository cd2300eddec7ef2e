#include "order.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "detmath.h"
#include "select.h"
#include "shuffle.h"

namespace mlfr {

Threshold threshold(Scores scores, double drop, int threads) {
    if (!(drop >= 0.0 && drop < 1.0)) throw std::invalid_argument("drop: must be at least 0 and below 1");
    const uint64_t seen = count_seen(scores, threads);
    if (seen == 0) return {-std::numeric_limits<float>::infinity(), 0, 0, 0};
    const uint64_t dropped = std::min(floor_share(drop, seen), seen - 1);
    const Cut cut = key_at_rank(scores.n, dropped, threads, [&](uint64_t i) { return float_key(scores[i]); });
    return {key_float(cut.key), dropped - cut.below, dropped, seen};
}

template <class Id>
void permutation(uint64_t n, uint64_t seed, int threads, Id* out) {
    shuffle_multiset(
        n, n, seed, threads,
        [](uint64_t, uint64_t first, uint64_t last, auto&& sink) {
            for (uint64_t i = first; i < last; ++i) sink(i);
        },
        out);
}

uint64_t sum_visits(const uint32_t* visits, uint64_t n, int threads) {
    std::vector<uint64_t> sums(num_chunks(n));
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        sums[chunk] = std::accumulate(visits + first, visits + last, uint64_t{0});
    });
    return std::accumulate(sums.begin(), sums.end(), uint64_t{0});
}

template <class Id>
void shuffle_visits(const uint32_t* visits, uint64_t n, uint64_t draws, uint64_t seed, int threads, Id* out) {
    shuffle_multiset(
        n, draws, seed, threads,
        [visits](uint64_t, uint64_t first, uint64_t last, auto&& sink) {
            for (uint64_t i = first; i < last; ++i) {
                for (uint32_t v = 0; v < visits[i]; ++v) sink(i);
            }
        },
        out);
}

namespace {

// Whole passes of `size` draws and a part of one. one_pass(number, out) writes a pass.
template <class Id, class OnePass>
void fill_with_passes(uint64_t size, uint64_t draws, OnePass one_pass, Id* out) {
    uint64_t number = 0;
    for (; size > 0 && draws >= size; draws -= size, out += size) one_pass(number++, out);
    if (draws > 0) {
        const std::unique_ptr<Id[]> last(new Id[size]);
        one_pass(number, last.get());
        std::copy_n(last.get(), draws, out);
    }
}

}  // namespace

template <class Id>
void order_threshold(Scores scores, double drop, bool keep_unseen, uint64_t draws, uint64_t seed, int threads,
                     Id* out) {
    const Threshold cut = threshold(scores, drop, threads);
    const uint64_t kept = (keep_unseen ? scores.n : cut.seen) - cut.dropped;
    if (kept == 0 && draws > 0) throw std::invalid_argument("scores: no block has one, so none can be drawn");
    // Unscored blocks have the largest key: above every cut where they are kept, below where they are not.
    auto key_of = [scores, keep_unseen](uint64_t i) {
        const uint32_t key = float_key(scores[i]);
        return key == kNoKey && !keep_unseen ? 0u : key;
    };
    const KeyFilter filter(scores.n, float_key(cut.cut), cut.tie_quota, Side::kAbove, threads, key_of);
    fill_with_passes(
        kept, draws,
        [&](uint64_t pass, Id* to) {
            shuffle_multiset(scores.n, kept, derive(seed, pass), threads, filter, to);
        },
        out);
}

// A sum over hashes of (position, id): it depends on the order of the ids, not on the order of the additions.
template <class Id>
uint64_t order_hash(const Id* ids, uint64_t n, int threads) {
    std::vector<uint64_t> sums(num_chunks(n));
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        uint64_t sum = 0;
        for (uint64_t i = first; i < last; ++i) sum += mix(mix(kGolden * (i + 1)) + ids[i]);
        sums[chunk] = sum;
    });
    return derive(std::accumulate(sums.begin(), sums.end(), uint64_t{0}), n);
}

#define MLFR_INSTANTIATE(Id)                                                                   \
    template void permutation<Id>(uint64_t, uint64_t, int, Id*);                               \
    template void shuffle_visits<Id>(const uint32_t*, uint64_t, uint64_t, uint64_t, int, Id*); \
    template void order_threshold<Id>(Scores, double, bool, uint64_t, uint64_t, int, Id*);     \
    template uint64_t order_hash<Id>(const Id*, uint64_t, int);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)
#undef MLFR_INSTANTIATE

}  // namespace mlfr
