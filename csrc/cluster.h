// 1-D k-means on the scores, and exact quantiles.
#pragma once

#include <cstdint>
#include <vector>

#include "scores.h"

namespace mlfr {

struct Clusters {
    std::vector<double> cuts;  // ascending; cluster of a score = number of cuts <= score
    std::vector<int64_t> counts;
    std::vector<double> mean_perplexity;  // mean of exp(min(score, cap))
    uint64_t unseen;
    double mse;  // mean squared distance of a score to its cluster's mean
};

// The best partition of the scores, put into `bins` equal bins, into at most k intervals, by dynamic programming.
Clusters cluster(Scores scores, int k, int bins, double cap, int threads);

// The score at rank ceil(q * seen), counted from 1.
float percentile(Scores scores, double q, int threads);

}  // namespace mlfr
