// Samples that are drawn at random.
#pragma once

#include <cstdint>

namespace mlfr {

// Writes `count` different numbers below n, every sequence of which is equally likely. count <= n. Up to half
// of n it takes time and memory for `count` numbers, and n bits.
template <class Id>
void draw_distinct(uint64_t n, uint64_t count, uint64_t seed, int threads, Id* out);

}  // namespace mlfr
