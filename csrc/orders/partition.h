// Exact k-means of weighted points on a line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mlfr {

// The best partition into k intervals, by the sum of weight x squared distance to the interval's mean, of
// points at ascending integer places; returns the first points of the intervals 1 ... k-1. 1 <= k <= points.
std::vector<size_t> partition(const std::vector<uint64_t>& place, const std::vector<uint64_t>& weight,
                              size_t k);

}  // namespace mlfr
