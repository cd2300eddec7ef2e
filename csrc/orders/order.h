// The orders of the phases. Every function is deterministic in its arguments, for any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "orders/scores.h"

namespace mlfr {

// What a threshold drops at one end of the scores.
struct Tail {
    float cut;           // the last score that is kept: the lowest one, or the highest
    uint64_t tie_quota;  // this many blocks that equal the cut are dropped as well
    uint64_t dropped;    // blocks, those ties included
};

struct Threshold {
    Tail lowest;    // of those that equal its cut, the lowest ids are dropped
    Tail highest;   // of those that equal its cut, the highest ids are dropped
    uint64_t seen;  // blocks that have a score
};

// Drops floor(drop * seen) blocks, the lowest scores first, and floor(drop_hardest * seen), the highest
// first, but never all: the blocks that have a score are ranked by it, equal ones by id. Where no block has a
// score, and at an end where nothing is to be dropped: a cut of -inf or inf, nothing dropped there.
Threshold threshold(Scores scores, double drop, double drop_hardest, int threads);

// Finds the score at rank ceil(q * seen), counted from 1, for each q.
std::vector<float> percentiles(Scores scores, const std::vector<double>& shares, int threads);

// How weighted sampling divides the samples among the clusters of blocks: the mass of each cluster, up to a
// common factor; 0 leaves it out. The mass of an empty cluster is ignored.
struct Mass {
    std::vector<double> clusters;
    double unseen;  // of the blocks without a score
};

class BlockWeights;

// Shuffles 0 ... n-1, and writes the first `count`.
template <class Id>
void permutation(uint64_t n, uint64_t seed, int threads, uint64_t count, Id* out);

template <class Id>
void permutation(uint64_t n, uint64_t seed, int threads, Id* out) {
    permutation(n, seed, threads, n, out);
}

uint64_t sum_visits(const uint32_t* visits, uint64_t n, int threads);

// Shuffles visits[i] times block i, and writes the first `count`; `samples` is the sum of visits.
template <class Id>
void shuffle_visits(const uint32_t* visits, uint64_t n, uint64_t samples, uint64_t seed, int threads,
                    uint64_t count, Id* out);

template <class Id>
void shuffle_visits(const uint32_t* visits, uint64_t n, uint64_t samples, uint64_t seed, int threads,
                    Id* out) {
    shuffle_visits(visits, n, samples, seed, threads, samples, out);
}

// Makes passes over the blocks that a threshold keeps, each shuffled anew; the last may be partial.
template <class Id>
void order_threshold(Scores scores, double drop, double drop_hardest, bool keep_unseen, uint64_t samples,
                     uint64_t seed, int threads, Id* out);

// Systematic sampling: block i occurs floor(e_i) or ceil(e_i) times, e_i = samples x its probability. The
// same holds for each cluster.
template <class Id>
void order_visits(const BlockWeights& weights, const Mass& mass, uint64_t samples, uint64_t seed, int threads,
                  Id* out);

// Weighted choice without replacement; where `samples` exceeds the number of blocks, complete passes come
// first.
template <class Id>
void order_choice(const BlockWeights& weights, const Mass& mass, uint64_t samples, uint64_t seed, int threads,
                  Id* out);

// Merges sequences of counts[0], counts[1] ... items, which lie one after another, into one: every merger
// that keeps the order within each is equally likely.
template <class Id>
void interleave(const Id* items, const std::vector<uint64_t>& counts, uint64_t seed, int threads, Id* out);

// Counts the ids in each of the parts of sizes[0], sizes[1] ... into which [0, sum of sizes) is divided.
// Throws std::invalid_argument for an id outside of them.
template <class Id>
std::vector<uint64_t> count_parts(const Id* ids, uint64_t n, const std::vector<uint64_t>& sizes, int threads);

// 64-bit hash of a sequence of ids; the same for both types.
template <class Id>
uint64_t order_hash(const Id* ids, uint64_t n, int threads);

}  // namespace mlfr
