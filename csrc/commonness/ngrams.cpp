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
constexpr uint32_t kMostCounted = 0xF0000000u;
// a_2, a_3 and a_4; a_1 is a tenth of the vocabulary.
constexpr double kPseudoCounts[] = {100.0, 20.0, 10.0};

// Adds to a counter that other threads add to as well. At kMostCounted it stays, in whatever order they come.
void add_to(uint32_t& counter, uint32_t number) {
    uint32_t before = __atomic_load_n(&counter, __ATOMIC_RELAXED), after;
    do {
        after = before > kMostCounted - number ? kMostCounted : before + number;
    } while (
        !__atomic_compare_exchange_n(&counter, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

// How often each counter's number was seen, in a table with open addressing that needs no clearing.
class LocalCounts {
  public:
    void begin(uint64_t most) {
        uint64_t size = 64;
        while (size < 2 * most) size *= 2;
        if (entries_.size() < size) entries_.assign(size, Entry{0, 0, 0});
        mask_ = size - 1;
        ++generation_;
        used_.clear();
    }

    // Counts one, and returns the number of its entry.
    uint32_t add(uint64_t key) {
        uint64_t at = (key * kGolden) >> 20 & mask_;
        while (entries_[at].generation == generation_ && entries_[at].key != key) at = (at + 1) & mask_;
        if (entries_[at].generation != generation_) {
            entries_[at] = {key, 0, generation_};
            used_.push_back(static_cast<uint32_t>(at));
        }
        ++entries_[at].count;
        return static_cast<uint32_t>(at);
    }

    uint32_t count(uint32_t entry) const { return entries_[entry].count; }

    template <class Take>
    void for_each(Take take) const {
        for (const uint32_t at : used_) take(entries_[at].key, entries_[at].count);
    }

  private:
    struct Entry {
        uint64_t key;
        uint32_t count, generation;
    };

    std::vector<Entry> entries_;
    std::vector<uint32_t> used_;
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

// One span: the counters of its n-grams, and how often it has each itself.
class NgramModel::Section {
  public:
    explicit Section(const NgramModel& model) : model_(model) {}

    void read(const SpanReader& reader, int64_t start, uint64_t length) {
        tokens_.resize(length);
        reader.read(start, length, tokens_.data());
        counters_.resize(length);
        entries_.resize(length);
        local_.begin(kOrder * length);
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
                counters_[i][n] = n == 0 ? model_.slots_ + token : hashes[n] >> model_.shift_;
                entries_[i][n] = local_.add(counters_[i][n]);
            }
            previous = hashes;
        }
    }

    const LocalCounts& local() const { return local_; }

    void score(bool leave_out, float* out, float* unigram) const {
        const double tokens = static_cast<double>(model_.tokens_ - (leave_out ? tokens_.size() : 0));
        const double vocab = static_cast<double>(model_.vocab_size_), unigram_pseudo = vocab / 10;
        std::array<double, kOrder> before{};  // counts of the 1-, 2-, ... grams that end at the token before
        for (uint64_t i = 0; i < tokens_.size(); ++i) {
            if (i + kAhead < tokens_.size()) {
                for (int n = 1; n < kOrder; ++n)
                    __builtin_prefetch(&model_.counts_[counters_[i + kAhead][n]]);
            }
            std::array<double, kOrder> counts{};
            double probability = 1 / vocab;
            for (int n = 0; n < kOrder && static_cast<uint64_t>(n) <= i; ++n) {
                const uint32_t own = leave_out ? local_.count(entries_[i][n]) : 0;
                counts[n] = static_cast<double>(model_.counts_[counters_[i][n]] - own);
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
    const NgramModel& model_;
    std::vector<uint32_t> tokens_;
    std::vector<std::array<uint64_t, kOrder>> counters_;
    std::vector<std::array<uint32_t, kOrder>> entries_;
    LocalCounts local_;
};

NgramModel::NgramModel(int log2_slots, uint64_t vocab_size)
    : shift_(64 - log2_slots), slots_(uint64_t{1} << log2_slots), vocab_size_(vocab_size) {
    counts_.resize(slots_ + vocab_size);
}

void NgramModel::count(const SpanReader& reader, const Spans& spans, int threads) {
    const std::vector<uint64_t> bounds = tasks_of(spans);
    parallel_for(bounds.size() - 1, threads, [&](uint64_t task) {
        Section section(*this);
        for (uint64_t i = bounds[task]; i < bounds[task + 1]; ++i) {
            section.read(reader, spans.starts[i], static_cast<uint64_t>(spans.lengths[i]));
            section.local().for_each([&](uint64_t at, uint32_t count) { add_to(counts_[at], count); });
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
        Section section(*this);
        for (uint64_t i = bounds[task]; i < bounds[task + 1]; ++i) {
            section.read(reader, spans.starts[i], static_cast<uint64_t>(spans.lengths[i]));
            section.score(leave_out, out + offsets[i], unigram + offsets[i]);
        }
    });
}

}  // namespace mlfr
