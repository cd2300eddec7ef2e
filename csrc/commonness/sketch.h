// What makes copies comparable: a hash of all tokens of a span, and a min-hash signature of its shingles.
#pragma once

#include <cstdint>

#include "commonness/spans.h"

namespace mlfr {

// Bins of a signature. The share of bins in which two signatures agree estimates the Jaccard similarity J of
// the sets of shingles, with a standard deviation of sqrt(J (1 - J) / kBins) at most.
constexpr uint32_t kBins = 128;

// For each span, hashes[i] of its tokens and their number, and signatures[i * kBins ...] of its shingles, the
// runs of `shingle` consecutive tokens (all tokens are one where there are fewer).
void sketch_spans(const SpanReader& reader, const Spans& spans, uint32_t shingle, int threads,
                  uint64_t* hashes, uint16_t* signatures);

}  // namespace mlfr
