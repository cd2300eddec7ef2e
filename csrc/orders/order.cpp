#include "orders/order.h"

#include <algorithm>
#include <numeric>

#include "orders/shuffle.h"

namespace mlfr {

namespace {

// Emits every block once.
class AllBlocks {
  public:
    explicit AllBlocks(uint64_t n) : n_(n) {}

    uint64_t count(uint64_t chunk) const { return std::min(kChunk, n_ - chunk * kChunk); }

    template <class Sink>
    void operator()(uint64_t, uint64_t begin, uint64_t end, Sink&& sink) const {
        uint32_t offsets[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            std::iota(offsets, offsets + count, static_cast<uint32_t>(first - begin));
            sink(offsets, count);
        });
    }

  private:
    uint64_t n_;
};

// Emits block i visits[i] times.
class Visits {
  public:
    Visits(const uint32_t* visits, uint64_t n, int threads)
        : visits_(visits), counts_(map_chunks(n, threads, [visits](uint64_t first, uint64_t last) {
              return std::accumulate(visits + first, visits + last, uint64_t{0});
          })) {}

    uint64_t count(uint64_t chunk) const { return counts_[chunk]; }

    uint64_t sum() const { return std::accumulate(counts_.begin(), counts_.end(), uint64_t{0}); }

    template <class Sink>
    void operator()(uint64_t, uint64_t begin, uint64_t end, Sink&& sink) const {
        uint32_t offsets[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const uint32_t* visits = visits_ + first;
            const auto base = static_cast<uint32_t>(first - begin);
            uint64_t chosen = 0;
            for (uint32_t j = 0; j < count;
                 ++j) {  // without a branch for blocks that are visited once or not at all
                offsets[chosen] = base + j;
                chosen += visits[j] > 0;
                for (uint32_t more = visits[j]; more > 1; --more) {
                    if (chosen == kBatch) {
                        sink(offsets, chosen);
                        chosen = 0;
                    }
                    offsets[chosen++] = base + j;
                }
                if (chosen == kBatch) {
                    sink(offsets, chosen);
                    chosen = 0;
                }
            }
            sink(offsets, chosen);
        });
    }

  private:
    const uint32_t* visits_;
    std::vector<uint64_t> counts_;
};

}  // namespace

template <class Id>
void permutation(uint64_t n, uint64_t seed, int threads, uint64_t count, Id* out) {
    shuffle_multiset(n, n, seed, threads, AllBlocks(n), out, count);
}

uint64_t sum_visits(const uint32_t* visits, uint64_t n, int threads) {
    return Visits(visits, n, threads).sum();
}

template <class Id>
void shuffle_visits(const uint32_t* visits, uint64_t n, uint64_t samples, uint64_t seed, int threads,
                    uint64_t count, Id* out) {
    shuffle_multiset(n, samples, seed, threads, Visits(visits, n, threads), out, count);
}

// The sum of hashes of (position, id) depends on the order of the ids, but not on the order of the additions.
template <class Id>
uint64_t order_hash(const Id* ids, uint64_t n, int threads) {
    const auto sums = map_chunks(n, threads, [ids](uint64_t first, uint64_t last) {
        uint64_t sum = 0;
        for (uint64_t i = first; i < last; ++i) sum += mix(mix(kGolden * (i + 1)) + ids[i]);
        return sum;
    });
    return derive(std::accumulate(sums.begin(), sums.end(), uint64_t{0}), n);
}

#define MLFR_INSTANTIATE(Id)                                                                             \
    template void permutation<Id>(uint64_t, uint64_t, int, uint64_t, Id*);                               \
    template void shuffle_visits<Id>(const uint32_t*, uint64_t, uint64_t, uint64_t, int, uint64_t, Id*); \
    template uint64_t order_hash<Id>(const Id*, uint64_t, int);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)
#undef MLFR_INSTANTIATE

}  // namespace mlfr
