// 1-D k-means on the scores.
#pragma once

#include <cstdint>
#include <vector>

#include "scores.h"

namespace mlfr {

struct Clusters {
    std::vector<double> cuts;  // ascending; cluster of a score = number of cuts <= score
    std::vector<int64_t> counts;
    std::vector<double> mean_perplexity;  // mean of exp(min(score, cap)), exponentials to 3e-7 (relative)
    uint64_t unseen;
    double mse;  // mean squared distance of a score to its cluster's mean
};

// Exact k-means of the scores, put into `bins` equal bins: fewer than k clusters where fewer bins are
// occupied. Counts, means and the mean squared distance are those of the scores themselves.
Clusters cluster(Scores scores, int k, int bins, double cap, int threads);

}  // namespace mlfr
