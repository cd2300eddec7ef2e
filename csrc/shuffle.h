// One mechanism for every order: shuffle the multiset in which block i occurs count_i times.
//
// Each draw goes to a bucket that is chosen uniformly, then each bucket is shuffled by Fisher-Yates (Rao
// 1961, Sandelius 1962). Uniform over all arrangements: given the sizes of the buckets, every assignment of
// draws to buckets is equally likely, because the choices are independent and alike, and within a bucket
// every order is. Buckets fit into a cache, so the memory is walked in streams rather than at random; choices
// are made from a random stream for each chunk of blocks and each bucket, so the result does not depend on
// the number of threads.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.h"
#include "random.h"

namespace mlfr {

constexpr uint64_t kBucketDraws = uint64_t{1} << 16;
constexpr int kMaxBucketBits = 12;

// Uniform bucket numbers, four of at most 16 bits from each random word.
class BucketChooser {
  public:
    BucketChooser(uint64_t seed, uint64_t chunk, int bits) : stream_(seed, chunk), mask_((1u << bits) - 1) {}

    // Calls take(k, bucket) for k = 0 ... count - 1.
    template <class Take>
    void choose(uint64_t count, Take take) {
        uint64_t k = 0;
        for (; k < count && left_ > 0; ++k, --left_) take(k, next());
        for (; k + 4 <= count; k += 4) {
            word_ = stream_.next();
            for (uint64_t i = 0; i < 4; ++i) take(k + i, next());
        }
        if (k == count) return;
        word_ = stream_.next();
        for (left_ = 4; k < count; ++k, --left_) take(k, next());
    }

  private:
    uint32_t next() {
        const uint32_t bucket = static_cast<uint32_t>(word_) & mask_;
        word_ >>= 16;
        return bucket;
    }

    Stream stream_;
    uint32_t mask_;
    uint64_t word_ = 0;
    int left_ = 0;
};

inline int bucket_bits(uint64_t draws) {
    int bits = 0;
    while (bits < kMaxBucketBits && (draws >> bits) > kBucketDraws) ++bits;
    return bits;
}

// Writes the shuffled multiset to out[0, draws). emit.count(chunk) is how many draws a chunk of blocks has,
// and emit(chunk, first, last, sink) calls sink(offsets, count) with the blocks, counted from `first`, once
// for each draw and in an order that is always the same.
template <class Id, class Emit>
void shuffle_multiset(uint64_t n, uint64_t draws, uint64_t seed, int threads, const Emit& emit, Id* out) {
    const int bits = bucket_bits(draws);
    const uint64_t buckets = uint64_t{1} << bits;
    const uint64_t chunks = num_chunks(n);
    const uint64_t choice_seed = derive(seed, 0), order_seed = derive(seed, 1);

    std::vector<uint64_t> position(chunks * buckets,
                                   0);  // first counts, then where a chunk writes in a bucket
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t, uint64_t) {
        uint64_t* counts = &position[chunk * buckets];
        BucketChooser(choice_seed, chunk, bits).choose(emit.count(chunk), [&](uint64_t, uint32_t bucket) {
            ++counts[bucket];
        });
    });
    std::vector<uint64_t> bucket_start(buckets + 1);
    uint64_t total = 0;
    for (uint64_t b = 0; b < buckets; ++b) {
        bucket_start[b] = total;
        for (uint64_t c = 0; c < chunks; ++c) {
            total += std::exchange(position[c * buckets + b], total);
        }
    }
    bucket_start[buckets] = total;
    if (total != draws) throw std::logic_error("shuffle_multiset: the counts do not sum to the draws");

    for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        BucketChooser chooser(choice_seed, chunk, bits);
        uint64_t* place = &position[chunk * buckets];
        const Id base = static_cast<Id>(first);
        emit(chunk, first, last, [&](const uint32_t* offsets, uint64_t count) {
            chooser.choose(count, [&](uint64_t k, uint32_t bucket) {
                out[place[bucket]++] = base + static_cast<Id>(offsets[k]);
            });
        });
    });
    parallel_for(buckets, threads, [&](uint64_t b) {
        Stream stream(order_seed, b);
        Id* items = out + bucket_start[b];
        for (uint64_t left = bucket_start[b + 1] - bucket_start[b]; left > 1; --left) {
            std::swap(items[left - 1], items[stream.below(left)]);
        }
    });
}

}  // namespace mlfr
