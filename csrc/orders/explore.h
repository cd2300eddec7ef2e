// Samples that are drawn at random, and mixed into an order.
#pragma once

#include <cstdint>

namespace mlfr {

// Writes `count` different numbers below n, every sequence of which is equally likely. count <= n. Up to half
// of n it takes time and memory for `count` numbers, and n bits.
template <class Id>
void draw_distinct(uint64_t n, uint64_t count, uint64_t seed, int threads, Id* out);

// Merges `extra` into `items` at random positions, keeping the order of the items: which positions the extra
// ones get, and in which order, is uniform.
template <class Id>
void mix_in(const Id* items, uint64_t count, const Id* extra, uint64_t extra_count, uint64_t seed,
            int threads, Id* out);

}  // namespace mlfr
