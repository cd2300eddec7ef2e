// 1-D k-means on the scores.
#pragma once

#include <cstdint>
#include <vector>

#include "orders/scores.h"

namespace mlfr {

// Exact k-means of the scores, put into `bins` equal bins: the ascending cuts between clusters, of which
// there are fewer than k where fewer bins are occupied. Cluster of a score: the number of cuts <= it.
std::vector<double> cluster(Scores scores, int k, int bins, int threads);

}  // namespace mlfr
