// 1-D k-means on the scores.
#pragma once

#include <cstdint>
#include <vector>

#include "orders/scores.h"

namespace mlfr {

// Exact k-means of the scores, put into `bins` equal bins. Returns the ascending cuts between clusters: fewer
// than k - 1 where fewer than k bins are occupied. The cluster of a score is the number of cuts <= it.
std::vector<double> cluster(Scores scores, int k, int bins, int threads);

}  // namespace mlfr
