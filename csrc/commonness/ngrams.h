// A hashed 4-gram model: what is likely, by the counts of a corpus.
#pragma once

#include <cstdint>

#include "commonness/counters.h"
#include "commonness/spans.h"

namespace mlfr {

// Probabilities by recursive Dirichlet smoothing (MacKay & Peto 1995): with h the last n - 1 tokens and h'
// the last n - 2, P_n(w | h) = (c(h w) + a_n P_{n-1}(w | h')) / (c(h) + a_n), and P_0 = 1 / vocabulary.
// Unigrams are counted exactly, longer n-grams in one table by their hash alone: n-grams may share a counter,
// which is why a count of h w is taken as no more than that of h. No n-gram crosses the beginning of a span.
class NgramModel {
  public:
    static constexpr int kOrder = 4;

    // log2_slots: the table has 2^log2_slots counters of 4 bytes, 1 <= log2_slots <= 31; with the vocabulary,
    // at most 2^32.
    NgramModel(int log2_slots, uint64_t vocab_size);

    // Counts all n-grams of the spans. Throws std::out_of_range for a token outside of the vocabulary.
    void count(const SpanReader& reader, const Spans& spans, int threads);

    // Writes ln P_4 of every token of the spans, one after another, and its ln P_1. leave_out: without the
    // counts of the token's span, which must be among those counted.
    void score(const SpanReader& reader, const Spans& spans, bool leave_out, int threads, float* out,
               float* unigram) const;

    uint64_t tokens() const { return tokens_; }

  private:
    class Section;

    Counters counts_;  // the table, then the unigrams
    int shift_;
    uint64_t slots_, vocab_size_, tokens_ = 0;
};

}  // namespace mlfr
