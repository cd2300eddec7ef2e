// Exact k-means of weighted points on a line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mlfr {

// Divides points at ascending integer positions into k intervals such that the sum of weight x squared
// distance to the mean of the interval is least; returns the first points of intervals 1 ... k-1. 1 <= k <=
// points.
std::vector<size_t> partition(const std::vector<uint64_t>& position, const std::vector<uint64_t>& weight,
                              size_t k);

}  // namespace mlfr
