// One mechanism for every order: shuffle the multiset in which block i occurs count_i times.
//
// Each sample goes to a bucket that is chosen uniformly, and each bucket is shuffled in the same way, until
// one is so small that Fisher-Yates shuffles it in the first-level cache (Rao 1961, Sandelius 1962). All
// arrangements are equally likely: given the sizes of the buckets, every assignment of samples to buckets is,
// because the choices are independent and identically distributed, and so is every order within a bucket.
// There are few buckets at a time, so memory is accessed in streams rather than at random. Each chunk of
// blocks and each bucket has its own random stream, so the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/random.h"

namespace mlfr {

// Numbers of the seeds derived for an order, so that no two of its parts share a random stream.
enum SeedPart : uint64_t { kChoice = 0, kShuffle = 1, kOffset = 2, kKeys = 3, kPasses = 16 };

constexpr uint64_t kLeafSamples = uint64_t{1} << 12;  // on average, in a bucket that is not divided
constexpr uint64_t kMostLeafSamples = 4 * kLeafSamples;
constexpr int kMaxBucketBits = 8;

// Uniform bucket numbers, eight of at most 8 bits from each random word.
class BucketChooser {
  public:
    BucketChooser(uint64_t seed, uint64_t number, int bits)
        : stream_(seed, number), mask_((1u << bits) - 1) {}

    // Calls take(k, bucket) for k = 0 ... count - 1.
    template <class Take>
    void choose(uint64_t count, Take take) {
        uint64_t k = 0;
        for (; k < count && left_ > 0; ++k, --left_) take(k, next());
        for (; k + kPerWord <= count; k += kPerWord) {
            word_ = stream_.next();
            for (uint64_t i = 0; i < kPerWord; ++i) take(k + i, next());
        }
        if (k == count) return;
        word_ = stream_.next();
        for (left_ = kPerWord; k < count; ++k, --left_) take(k, next());
    }

  private:
    static constexpr int kPerWord = 8;

    uint32_t next() {
        const uint32_t bucket = static_cast<uint32_t>(word_) & mask_;
        word_ >>= kMaxBucketBits;
        return bucket;
    }

    Stream stream_;
    uint32_t mask_;
    uint64_t word_ = 0;
    int left_ = 0;
};

// log2 of the number of buckets into which `samples` samples are divided.
inline int bucket_bits(uint64_t samples) {
    int bits = 0;
    if (samples <= kMostLeafSamples) return bits;
    while (bits < kMaxBucketBits && (samples >> bits) > kLeafSamples) ++bits;
    return bits;
}

// Shuffles n items by the random numbers of (seed, number); `scratch` has room for as many.
template <class Id>
void shuffle_bucket(Id* items, uint64_t n, uint64_t seed, uint64_t number, Id* scratch) {
    const int bits = bucket_bits(n);
    if (bits == 0) {
        Stream stream(seed, number);
        for (uint64_t left = n; left > 1; --left) std::swap(items[left - 1], items[stream.below(left)]);
        return;
    }
    const uint64_t buckets = uint64_t{1} << bits, base = derive(seed, number);
    const uint64_t choice_seed = derive(base, kChoice), order_seed = derive(base, kShuffle);
    uint64_t position[1 << kMaxBucketBits] = {};  // first counts, then the position of the next item
    BucketChooser(choice_seed, 0, bits).choose(n, [&](uint64_t, uint32_t bucket) { ++position[bucket]; });
    uint64_t total = 0;
    for (uint64_t b = 0; b < buckets; ++b) total += std::exchange(position[b], total);
    BucketChooser(choice_seed, 0, bits).choose(n, [&](uint64_t k, uint32_t bucket) {
        scratch[position[bucket]++] = items[k];
    });
    uint64_t start = 0;
    for (uint64_t b = 0; b < buckets; ++b) {
        const uint64_t end = position[b];
        shuffle_bucket(scratch + start, end - start, order_seed, b, items + start);
        std::copy(scratch + start, scratch + end, items + start);
        start = end;
    }
}

// Buffers of `size` items that tasks reuse: as many as tasks run at the same time.
template <class Id>
class Buffers {
  public:
    explicit Buffers(uint64_t size) : size_(size) {}

    template <class Use>
    void with(Use use) {
        std::unique_ptr<Id[]> buffer = take();
        use(buffer.get());
        std::lock_guard<std::mutex> guard(lock_);
        free_.push_back(std::move(buffer));
    }

  private:
    std::unique_ptr<Id[]> take() {
        std::lock_guard<std::mutex> guard(lock_);
        if (free_.empty()) return std::unique_ptr<Id[]>(new Id[size_]);
        std::unique_ptr<Id[]> buffer = std::move(free_.back());
        free_.pop_back();
        return buffer;
    }

    uint64_t size_;
    std::mutex lock_;
    std::vector<std::unique_ptr<Id[]>> free_;
};

constexpr uint64_t kAll = UINT64_MAX;

// Writes the first `wanted` of the shuffled multiset, all by default, to out[0, min(wanted, samples)).
// emit.count(chunk) is how many samples a chunk of blocks has, and emit(chunk, first, last, sink) calls
// sink(offsets, count) with the blocks, counted from `first`, once for each sample and in an order that is
// always the same. Buckets beyond what is wanted are neither filled nor shuffled.
template <class Id, class Emit>
void shuffle_multiset(uint64_t n, uint64_t samples, uint64_t seed, int threads, const Emit& emit, Id* out,
                      uint64_t wanted = kAll) {
    const int bits = bucket_bits(samples);
    const uint64_t buckets = uint64_t{1} << bits;
    const uint64_t chunks = num_chunks(n);
    const uint64_t choice_seed = derive(seed, kChoice), order_seed = derive(seed, kShuffle);

    // First counts, then the position at which a chunk writes into a bucket.
    std::vector<uint64_t> position(chunks * buckets, 0);
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t, uint64_t) {
        uint64_t counts[1 << kMaxBucketBits] = {};
        BucketChooser(choice_seed, chunk, bits).choose(emit.count(chunk), [&](uint64_t, uint32_t bucket) {
            ++counts[bucket];
        });
        std::copy(counts, counts + buckets, &position[chunk * buckets]);
    });
    std::vector<uint64_t> bucket_start(buckets + 1);
    uint64_t total = 0, largest = 0, filled = 0;
    for (uint64_t b = 0; b < buckets; ++b) {
        bucket_start[b] = total;
        filled += total < wanted;
        for (uint64_t c = 0; c < chunks; ++c) {
            total += std::exchange(position[c * buckets + b], total);
        }
        if (b < filled) largest = std::max(largest, total - bucket_start[b]);
    }
    bucket_start[buckets] = total;
    if (total != samples) throw std::logic_error("shuffle_multiset: the counts do not sum to the samples");

    // Where most buckets are wanted, it is faster to fill all of them than to ask of each sample.
    const uint64_t kept = 2 * filled > buckets ? buckets : filled;
    std::unique_ptr<Id[]> room;  // for what is filled beyond what is wanted
    Id* to = out;
    if (bucket_start[kept] > wanted) {
        room.reset(new Id[bucket_start[kept]]);
        to = room.get();
    }
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        BucketChooser chooser(choice_seed, chunk, bits);
        uint64_t next[1 << kMaxBucketBits];
        std::copy_n(&position[chunk * buckets], buckets, next);
        const Id base = static_cast<Id>(first);
        emit(chunk, first, last, [&](const uint32_t* offsets, uint64_t count) {
            if (kept == buckets) {
                chooser.choose(count, [&](uint64_t k, uint32_t bucket) {
                    to[next[bucket]++] = base + static_cast<Id>(offsets[k]);
                });
            } else {
                chooser.choose(count, [&](uint64_t k, uint32_t bucket) {
                    if (bucket < kept) to[next[bucket]++] = base + static_cast<Id>(offsets[k]);
                });
            }
        });
    });
    Buffers<Id> buffers(largest);
    parallel_for(filled, threads, [&](uint64_t b) {
        buffers.with([&](Id* scratch) {
            shuffle_bucket(to + bucket_start[b], bucket_start[b + 1] - bucket_start[b], order_seed, b,
                           scratch);
        });
    });
    if (room) std::copy_n(room.get(), wanted, out);
}

}  // namespace mlfr
