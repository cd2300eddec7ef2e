// Samples that are drawn at random, and given places in an order.
#pragma once

#include <cstdint>

namespace mlfr {

// Writes `count` different numbers below n, every sequence of which is equally likely. count <= n. Up to half
// of n it takes time and memory for `count` numbers, and n bits.
template <class Id>
void draw_distinct(uint64_t n, uint64_t count, uint64_t seed, int threads, Id* out);

// Writes items[i] to order[floor(i * samples / count)], for i below `count`. count <= samples.
template <class Id>
void place_evenly(const Id* items, uint64_t count, uint64_t samples, int threads, Id* order);

}  // namespace mlfr
