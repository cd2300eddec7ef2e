#include "commonness/sketch.h"

#include <algorithm>
#include <array>
#include <vector>

#include "common/parallel.h"
#include "common/random.h"

namespace mlfr {
namespace {

constexpr uint64_t kOdd = 0xD6E8FEB86659FD93ull;
constexpr uint64_t kSpansOfTask = 64;

// Fast similarity sketching (Dahlgaard, Knudsen & Thorup 2017). In round r every shingle falls into one bin
// by a hash of its own; a bin keeps the least value of the first round that reaches it. One round does for
// most spans; where bins stay empty, as in short spans, the shingles take part in further rounds, and from
// round kBins on all of them fall into bin r - kBins, so that none stays empty.
class Sketch {
  public:
    void reset() {
        least_.fill(kEmpty);
        empty_ = kBins;
        kept_.clear();
    }

    void add(uint64_t hash) {
        uint64_t& least = least_[hash >> kValueBits];
        empty_ -= least == kEmpty;
        least = std::min(least, hash & kValue);
        if (empty_ > 0 && !overflows()) keep(hash);
    }

    void finish(uint16_t* out) {
        compact();
        for (uint64_t round = 1; empty_ > 0 && !kept_.empty() && round < 2 * kBins; ++round) fill(round);
        for (uint32_t bin = 0; bin < kBins; ++bin) out[bin] = static_cast<uint16_t>(least_[bin]);
    }

  private:
    static constexpr int kValueBits = 57;  // 64 less those that number kBins
    static constexpr uint64_t kValue = (uint64_t{1} << kValueBits) - 1, kEmpty = UINT64_MAX;
    // That a bin stays empty beside so many different shingles has a chance of 128 e^-32.
    static constexpr uint64_t kMostKept = 4096;

    bool overflows() const { return kept_.size() == 2 * kMostKept; }

    void keep(uint64_t hash) {
        kept_.push_back(hash);
        if (!overflows()) return;
        compact();
        if (kept_.size() > kMostKept) kept_.resize(2 * kMostKept);  // stays full: no more are kept
    }

    void compact() {
        std::sort(kept_.begin(), kept_.end());
        kept_.erase(std::unique(kept_.begin(), kept_.end()), kept_.end());
    }

    void fill(uint64_t round) {
        const std::array<uint64_t, kBins> before = least_;
        for (const uint64_t hash : kept_) {
            const uint64_t word = mix(hash + round * kGolden);
            const uint64_t bin = round < kBins ? word >> kValueBits : round - kBins;
            if (before[bin] == kEmpty) least_[bin] = std::min(least_[bin], word & kValue);
        }
        empty_ = static_cast<uint32_t>(std::count(least_.begin(), least_.end(), kEmpty));
    }

    std::array<uint64_t, kBins> least_;
    uint32_t empty_ = kBins;
    std::vector<uint64_t> kept_;
};

// Rolling hashes of shingles: a polynomial of the tokens' hashes, mixed.
class Shingles {
  public:
    explicit Shingles(uint32_t length) : recent_(length), length_(length) {
        for (uint32_t i = 0; i < length; ++i) leaving_ *= kOdd;
    }

    void reset() {
        std::fill(recent_.begin(), recent_.end(), 0);
        sum_ = seen_ = 0;
        at_ = 0;
    }

    void add(const uint32_t* tokens, uint64_t count, Sketch& sketch) {
        for (uint64_t i = 0; i < count; ++i) {
            const uint64_t entering = mix(tokens[i] + kGolden);
            sum_ = sum_ * kOdd + entering - leaving_ * recent_[at_];
            recent_[at_] = entering;
            at_ = at_ + 1 == length_ ? 0 : at_ + 1;
            if (++seen_ >= length_) sketch.add(mix(sum_));
        }
    }

    void finish(Sketch& sketch) const {
        if (seen_ > 0 && seen_ < length_) sketch.add(mix(sum_));
    }

  private:
    std::vector<uint64_t> recent_;
    uint32_t length_, at_ = 0;
    uint64_t leaving_ = 1, sum_ = 0, seen_ = 0;
};

}  // namespace

void sketch_spans(const SpanReader& reader, const Spans& spans, uint32_t shingle, int threads,
                  uint64_t* hashes, uint16_t* signatures) {
    parallel_for((spans.n + kSpansOfTask - 1) / kSpansOfTask, threads, [&](uint64_t task) {
        Sketch sketch;
        Shingles shingles(shingle);
        for (uint64_t i = task * kSpansOfTask; i < std::min(spans.n, (task + 1) * kSpansOfTask); ++i) {
            uint64_t hash = mix(static_cast<uint64_t>(spans.lengths[i]) + kGolden);
            sketch.reset();
            shingles.reset();
            reader.for_pieces(spans.starts[i], spans.lengths[i], [&](const uint32_t* tokens, uint64_t count) {
                for (uint64_t j = 0; j < count; ++j) {
                    hash = (hash ^ tokens[j]) * kOdd;  // both steps are bijections of the hash
                    hash ^= hash >> 32;
                }
                shingles.add(tokens, count, sketch);
            });
            shingles.finish(sketch);
            sketch.finish(signatures + i * kBins);
            hashes[i] = mix(hash);
        }
    });
}

}  // namespace mlfr
