// Exact order statistics of 32-bit keys by a two-level radix histogram: two passes, no sorting, any number of
// threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "orders/scores.h"

namespace mlfr {

constexpr uint32_t kNoKey = 0xFFFFFFFFu;  // an item that is not considered

// Maps a float to a key of the same order; NaN has no key, and -0 counts as 0. Without branches, so that
// loops over it become vector instructions.
inline uint32_t float_key(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    bits = magnitude == 0 ? 0 : bits;
    const uint32_t key = bits ^ (0x80000000u | static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31));
    return magnitude > 0x7F800000u ? kNoKey : key;
}

inline float key_float(uint32_t key) {
    const uint32_t bits = (key & 0x80000000u) ? key & 0x7FFFFFFFu : ~key;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Keys of items are read in batches, which stay in the first-level cache: keys.read(first, count, buffer)
// returns those of [first, first + count), in the buffer or where they are stored.

// The keys of scores.
class ScoreKeys {
  public:
    explicit ScoreKeys(Scores scores) : scores_(scores) {}

    uint64_t size() const { return scores_.n; }

    const uint32_t* read(uint64_t first, uint64_t count, uint32_t* buffer) const {
        const float* from = scores_.data + first;
        for (uint64_t j = 0; j < count; ++j) buffer[j] = float_key(from[j]);
        return buffer;
    }

  private:
    Scores scores_;
};

// Counts the items of [0, n) in each bin; fill(first, count, bins) writes the bins of a batch, and an item of
// bin `bins` is not counted.
template <class Fill>
std::vector<uint64_t> histogram(uint64_t n, uint64_t bins, int threads, Fill fill) {
    std::vector<uint64_t> total(bins, 0);
    std::mutex lock;
    constexpr uint64_t kStride = 16 * kChunk;  // few merges, and the counts of a part fit 32 bits
    parallel_for(n / kStride + 1, threads, [&](uint64_t part) {
        // Neighbours are counted in two tables, so that none has to wait for the store of the one before.
        std::vector<uint32_t> even(bins + 1, 0), odd(bins + 1, 0);
        uint32_t batch[kBatch];
        const uint64_t begin = part * kStride;
        for_batches(begin, begin + std::min(kStride, n - begin), [&](uint64_t first, uint64_t count) {
            fill(first, count, batch);
            uint64_t j = 0;
            for (; j + 1 < count; j += 2) {
                ++even[batch[j]];
                ++odd[batch[j + 1]];
            }
            if (j < count) ++even[batch[j]];
        });
        std::lock_guard<std::mutex> guard(lock);
        for (uint64_t b = 0; b < bins; ++b) total[b] += even[b] + odd[b];
    });
    return total;
}

// Appends the keys of a batch that match; there are few.
template <class Matches>
void append_matching(const uint32_t* batch, uint64_t count, std::vector<uint32_t>& to, Matches matches) {
    constexpr uint64_t kGroup = 16;  // most groups have none
    uint64_t j = 0;
    for (; j + kGroup <= count; j += kGroup) {
        uint32_t any = 0;
        for (uint64_t i = j; i < j + kGroup; ++i) any |= matches(batch[i]);
        if (any == 0) continue;
        for (uint64_t i = j; i < j + kGroup; ++i) {
            if (matches(batch[i])) to.push_back(batch[i]);
        }
    }
    for (; j < count; ++j) {
        if (matches(batch[j])) to.push_back(batch[j]);
    }
}

struct Cut {
    uint32_t key;    // the key at the rank
    uint64_t below;  // how many keys are smaller
};

// Exact order statistics of the keys other than kNoKey.
template <class Keys>
class KeyRanks {
  public:
    KeyRanks(Keys keys, int threads)
        : keys_(keys),
          threads_(threads),
          highs_(histogram(keys.size(), kHalf, threads, [&](uint64_t first, uint64_t count, uint32_t* bins) {
              const uint32_t* batch = keys.read(first, count, bins);
              for (uint64_t j = 0; j < count; ++j) {
                  bins[j] = batch[j] == kNoKey ? kHalf : batch[j] >> 16;
              }
          })) {}

    // The key of rank `rank` (from 0), which must be below the number of keys.
    Cut at(uint64_t rank) const {
        uint64_t rest = rank;
        const uint32_t high = locate(highs_, rest);
        const uint32_t low = locate(count_lows(high), rest);
        return {(high << 16) | low, rank - rest};
    }

  private:
    static constexpr uint32_t kHalf = 1 << 16;

    static uint32_t locate(const std::vector<uint64_t>& counts, uint64_t& rank) {
        uint32_t b = 0;
        while (rank >= counts.at(b)) rank -= counts[b++];
        return b;
    }

    // Counts the lower halves of the keys with a given upper half, which are few.
    std::vector<uint64_t> count_lows(uint32_t high) const {
        std::vector<uint64_t> total(kHalf, 0);
        std::mutex lock;
        for_chunks(keys_.size(), threads_, [&](uint64_t, uint64_t begin, uint64_t end) {
            std::vector<uint32_t> matching;
            uint32_t buffer[kBatch];
            for_batches(begin, end, [&](uint64_t first, uint64_t count) {
                const uint32_t* batch = keys_.read(first, count, buffer);
                append_matching(batch, count, matching, [high](uint32_t key) { return key >> 16 == high; });
            });
            std::lock_guard<std::mutex> guard(lock);
            for (const uint32_t key : matching) ++total[key & (kHalf - 1)];
        });
        return total;
    }

    Keys keys_;
    int threads_;
    std::vector<uint64_t> highs_;
};

// Two keys between which the key at a rank probably lies.
struct Between {
    uint32_t low, high;
};

// A sample of many short runs of keys, so that similar neighbours do not mislead it much.
class KeySample {
  public:
    template <class Keys>
    explicit KeySample(const Keys& keys) {
        constexpr uint64_t kRun = 64, kMostRuns = 1 << 13;
        const uint64_t every = kRun * std::max<uint64_t>(64, keys.size() / kRun / kMostRuns);
        uint32_t buffer[kRun];
        sample_.reserve(kRun * (keys.size() / every + 1));
        for (uint64_t first = 0; first + kRun <= keys.size(); first += every) {
            const uint32_t* run = keys.read(first, kRun, buffer);
            std::copy_if(run, run + kRun, std::back_inserter(sample_),
                         [](uint32_t key) { return key != kNoKey; });
        }
        bounds_ = {0, sample_.size()};
    }

    // rank_of(count) is the wanted rank (from 0) among `count` keys. Returns nothing where there are few.
    template <class RankOf>
    std::optional<Between> guess(RankOf rank_of) {
        const auto count = static_cast<double>(sample_.size());
        const auto rank = static_cast<double>(rank_of(sample_.size()));
        const double margin =
            6.0 * std::sqrt(std::min(rank, count - rank)) + 16.0;  // over six standard deviations
        if (rank < margin || rank + margin >= count) return std::nullopt;
        return Between{at(static_cast<size_t>(rank - margin)), at(static_cast<size_t>(rank + margin))};
    }

  private:
    // The key of a rank in the sample. What earlier calls have divided need not be divided again.
    uint32_t at(size_t rank) {
        const auto end = std::upper_bound(bounds_.begin(), bounds_.end(), rank);
        const auto iterator = [this](size_t index) {
            return sample_.begin() + static_cast<std::ptrdiff_t>(index);
        };
        std::nth_element(iterator(*(end - 1)), iterator(rank), iterator(*end));
        bounds_.insert(end, rank);
        return sample_[rank];
    }

    std::vector<uint32_t> sample_;
    std::vector<size_t>
        bounds_;  // ascending: no key before one of these positions is larger than one after it
};

// Emits the keys below a cut, and the first `quota` (in the order of ids) that equal it, for
// shuffle_multiset.
template <class Keys>
class KeyFilter {
  public:
    KeyFilter(Keys keys, uint32_t cut, uint64_t quota, int threads) : keys_(keys), cut_(cut) {
        chunks_ = map_chunks(keys.size(), threads, [&](uint64_t begin, uint64_t end) {
            uint32_t buffer[kBatch];
            Chunk here;
            for_batches(begin, end, [&](uint64_t first, uint64_t count) {
                const uint32_t* batch = keys_.read(first, count, buffer);
                uint32_t less = 0, equal = 0;
                for (uint64_t j = 0; j < count; ++j) {
                    less += batch[j] < cut_;
                    equal += batch[j] == cut_;
                }
                here.smaller += less;
                here.ties += equal;
            });
            return here;
        });
        for (Chunk& chunk : chunks_) {
            chunk.ties = std::min(quota, chunk.ties);
            quota -= chunk.ties;
        }
    }

    uint64_t count(uint64_t chunk) const { return chunks_[chunk].smaller + chunks_[chunk].ties; }

    template <class Sink>
    void operator()(uint64_t chunk, uint64_t begin, uint64_t end, Sink&& sink) const {
        uint32_t buffer[kBatch], offsets[kBatch];
        uint64_t ties = chunks_[chunk].ties;
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const uint32_t* batch = keys_.read(first, count, buffer);
            const auto base = static_cast<uint32_t>(first - begin);
            uint32_t chosen = 0;
            for (uint32_t j = 0; j < count; ++j) {  // without branches, which nothing could predict
                const bool tie = (batch[j] == cut_) & (ties > 0);
                ties -= tie;
                offsets[chosen] = base + j;
                chosen += (batch[j] < cut_) | tie;
            }
            sink(offsets, chosen);
        });
    }

  private:
    struct Chunk {
        uint64_t smaller = 0, ties = 0;  // ties: first all of them, then those that are emitted
    };

    Keys keys_;
    uint32_t cut_;
    std::vector<Chunk> chunks_;
};

}  // namespace mlfr
