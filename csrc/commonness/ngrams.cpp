#include "commonness/ngrams.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/random.h"

namespace mlfr {
namespace {

constexpr uint64_t kOdd = 0xD6E8FEB86659FD93ull;
constexpr uint64_t kAhead = 16;  // tokens whose counters are fetched ahead
constexpr uint64_t kTokensOfTask = 1 << 14;
constexpr uint32_t kMostCounted = 0x80000000u;
constexpr uint64_t kLongest = uint64_t{1} << 18;  // tokens of a span
// a_2, a_3 and a_4; a_1 is a tenth of the vocabulary.
constexpr double kPseudoCounts[] = {100.0, 20.0, 10.0};

// Adds one to a counter that other threads add to as well. It is read as kMostCounted at most, from where on
// it grows no further: what is read does not depend on the order of the threads.
void add_one(uint32_t& counter) {
    if (__atomic_fetch_add(&counter, 1u, __ATOMIC_RELAXED) >= kMostCounted) {
        __atomic_fetch_sub(&counter, 1u, __ATOMIC_RELAXED);
    }
}

// How often each counter's number was seen, in a table with open addressing that is cleared only at times.
class LocalCounts {
  public:
    void begin(uint64_t most) {
        uint64_t size = 64;
        while (size < 2 * most) size *= 2;
        if (entries_.size() < size || generation_ == kGenerations - 1) {
            entries_.assign(std::max<uint64_t>(size, entries_.size()), Entry{0, 0, 0});
            generation_ = 0;
        }
        mask_ = size - 1;
        ++generation_;
    }

    // Counts one, and returns the number of its entry.
    uint32_t add(uint32_t key) {
        uint64_t at = (key * kGolden) >> 32 & mask_;
        while (entries_[at].generation == generation_ && entries_[at].key != key) at = (at + 1) & mask_;
        if (entries_[at].generation != generation_) {
            entries_[at] = {key, 0, generation_};
        }
        ++entries_[at].count;
        return static_cast<uint32_t>(at);
    }

    uint32_t count(uint32_t entry) const { return entries_[entry].count; }

  private:
    static constexpr int kCountBits = 20;  // for NgramModel::kOrder * kLongest
    static constexpr uint32_t kGenerations = 1u << (32 - kCountBits);

    struct Entry {
        uint32_t key;
        uint32_t count : kCountBits;
        uint32_t generation : 32 - kCountBits;
    };

    std::vector<Entry> entries_;
    uint64_t mask_ = 0;
    uint32_t generation_ = 0;
};

// Spans are worked on in tasks of about kTokensOfTask tokens: task i has those from bounds[i] on.
std::vector<uint64_t> tasks_of(const Spans& spans) {
    std::vector<uint64_t> bounds{0};
    uint64_t tokens = 0;
    for (uint64_t i = 0; i < spans.n; ++i) {
        tokens += static_cast<uint64_t>(spans.lengths[i]);
        if (tokens >= kTokensOfTask || i + 1 == spans.n) {
            bounds.push_back(i + 1);
            tokens = 0;
        }
    }
    return bounds;
}

}  // namespace

// One span: the counters of its n-grams, and, where that is asked for, how often it has each itself.
class NgramModel::Section {
  public:
    Section(const NgramModel& model, bool counts_own) : model_(model), counts_own_(counts_own) {}

    void read(const SpanReader& reader, int64_t start, uint64_t length) {
        if (length > kLongest) {
            throw std::invalid_argument("lengths: a span has more than " + std::to_string(kLongest) +
                                        " tokens");
        }
        tokens_.resize(length);
        reader.read(start, length, tokens_.data());
        counters_.resize(length);
        if (counts_own_) {
            entries_.resize(length);
            local_.begin(kOrder * length);
        }
        std::array<uint64_t, kOrder>
            previous{};  // hashes of the 1-, 2-, ... grams that end at the token before
        for (uint64_t i = 0; i < length; ++i) {
            const uint32_t token = tokens_[i];
            if (token >= model_.vocab_size_) {
                throw std::out_of_range("token " + std::to_string(token) + " is not in a vocabulary of " +
                                        std::to_string(model_.vocab_size_));
            }
            std::array<uint64_t, kOrder> hashes{};
            for (int n = 0; n < kOrder && static_cast<uint64_t>(n) <= i; ++n) {
                hashes[n] = mix((n == 0 ? 0 : previous[n - 1] * kOdd) + token + kGolden);
                counters_[i][n] =
                    static_cast<uint32_t>(n == 0 ? model_.slots_ + token : hashes[n] >> model_.shift_);
                if (counts_own_) entries_[i][n] = local_.add(counters_[i][n]);
            }
            previous = hashes;
        }
    }

    // Counts every n-gram of the span.
    void count(uint32_t* counters) const {
        for (uint64_t i = 0; i < counters_.size(); ++i) {
            fetch(counters, i + kAhead);
            for (int n = 0; n < kOrder && static_cast<uint64_t>(n) <= i; ++n) {
                add_one(counters[counters_[i][n]]);
            }
        }
    }

    // Without what the span has itself, where that was counted.
    void score(float* out, float* unigram) const {
        const double tokens = static_cast<double>(model_.tokens_ - (counts_own_ ? tokens_.size() : 0));
        const double vocab = static_cast<double>(model_.vocab_size_), unigram_pseudo = vocab / 10;
        const uint32_t* global = model_.counts_.data();
        std::array<double, kOrder> before{};  // counts of the 1-, 2-, ... grams that end at the token before
        for (uint64_t i = 0; i < tokens_.size(); ++i) {
            fetch(global, i + kAhead);
            std::array<double, kOrder> counts{};
            double probability = 1 / vocab;
            for (int n = 0; n < kOrder && static_cast<uint64_t>(n) <= i; ++n) {
                const uint32_t own = counts_own_ ? local_.count(entries_[i][n]) : 0;
                counts[n] = static_cast<double>(std::min(global[counters_[i][n]], kMostCounted) - own);
                const double context = n == 0 ? tokens : before[n - 1];
                const double pseudo = n == 0 ? unigram_pseudo : kPseudoCounts[n - 1];
                counts[n] = std::min(counts[n], context);
                probability = (counts[n] + pseudo * probability) / (context + pseudo);
                if (n == 0) unigram[i] = static_cast<float>(std::log(probability));
            }
            out[i] = static_cast<float>(std::log(probability));
            before = counts;
        }
    }

  private:
    void fetch(const uint32_t* counters, uint64_t token) const {
        if (token >= counters_.size()) return;
        for (int n = 1; n < kOrder; ++n) __builtin_prefetch(&counters[counters_[token][n]]);
    }

    const NgramModel& model_;
    const bool counts_own_;
    std::vector<uint32_t> tokens_;
    std::vector<std::array<uint32_t, kOrder>> counters_;
    std::vector<std::array<uint32_t, kOrder>> entries_;
    LocalCounts local_;
};

NgramModel::NgramModel(int log2_slots, uint64_t vocab_size)
    : counts_((uint64_t{1} << log2_slots) + vocab_size),
      shift_(64 - log2_slots),
      slots_(uint64_t{1} << log2_slots),
      vocab_size_(vocab_size) {}

void NgramModel::count(const SpanReader& reader, const Spans& spans, int threads) {
    const std::vector<uint64_t> bounds = tasks_of(spans);
    parallel_for(bounds.size() - 1, threads, [&](uint64_t task) {
        Section section(*this, false);
        for (uint64_t i = bounds[task]; i < bounds[task + 1]; ++i) {
            section.read(reader, spans.starts[i], static_cast<uint64_t>(spans.lengths[i]));
            section.count(counts_.data());
        }
    });
    tokens_ = std::accumulate(spans.lengths, spans.lengths + spans.n, tokens_);
}

void NgramModel::score(const SpanReader& reader, const Spans& spans, bool leave_out, int threads, float* out,
                       float* unigram) const {
    std::vector<uint64_t> offsets(spans.n + 1);
    std::partial_sum(spans.lengths, spans.lengths + spans.n, offsets.begin() + 1);
    const std::vector<uint64_t> bounds = tasks_of(spans);
    parallel_for(bounds.size() - 1, threads, [&](uint64_t task) {
        Section section(*this, leave_out);
        for (uint64_t i = bounds[task]; i < bounds[task + 1]; ++i) {
            section.read(reader, spans.starts[i], static_cast<uint64_t>(spans.lengths[i]));
            section.score(out + offsets[i], unigram + offsets[i]);
        }
    });
}

}  // namespace mlfr
