// Weighted sampling without replacement: the blocks with the smallest exponential keys.
#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "common/detmath.h"
#include "common/vector.h"
#include "orders/order.h"
#include "orders/passes.h"
#include "orders/select.h"
#include "orders/shuffle.h"
#include "orders/weights.h"

namespace mlfr {

namespace {

// The divisor that turns a block's weight relative to its cluster's reference into its weight in the corpus,
// up to a common factor: at least 1; 0 where the cluster has no share.
std::vector<double> corpus_factors(const BlockWeights& weights, const Shares& shares, int threads) {
    const size_t k = weights.clusters();
    std::vector<double> factor(k, 0.0);
    if (shares.drawn() == 1) {  // a single cluster needs no common scale
        for (size_t c = 0; c < k; ++c) factor[c] = shares.of(c) > 0.0 ? 1.0 : 0.0;
        return factor;
    }
    const std::vector<uint64_t> sums = weights.chunk_sums(threads);
    for (size_t i = 0; i < sums.size(); ++i) factor[i % k] += static_cast<double>(sums[i]);
    double smallest = std::numeric_limits<double>::infinity();
    for (size_t c = 0; c < k; ++c) {
        factor[c] = shares.of(c) > 0.0 ? factor[c] / shares.of(c) : 0.0;
        if (factor[c] > 0.0) smallest = std::min(smallest, factor[c]);
    }
    for (double& f : factor) f /= smallest;
    return factor;
}

// The inverse of a relative weight, and a lower bound of it, from what BlockWeights::read gives.
struct OfLogarithm {
    static float inverse(float log_relative) { return det_expf(-log_relative); }
    static float inverse_from_below(float log_relative) { return exp_from_below(-log_relative); }
};

// A relative weight is 0 where a block is in no cluster, and what is made of its inverse does not count.
struct OfWeight {
    static float inverse(float relative) { return 1.0f / (relative > 0.0f ? relative : 1.0f); }
    static float inverse_from_below(float relative) { return inverse(relative); }
};

// Exponential keys (Efraimidis & Spirakis 2006): the k smallest of E_i / w_i, E_i standard exponential
// numbers, are a weighted choice without replacement. In fp32 there are few ties, which go by id; keys beyond
// its range all become the largest number. Keys are computed anew whenever they are read.
class ExponentialKeys {
  public:
    ExponentialKeys(const BlockWeights& weights, const Shares& shares, uint64_t seed, int threads)
        : weights_(&weights), seed_(seed) {
        for (const double factor : corpus_factors(weights, shares, threads)) {
            factors_.push_back(static_cast<float>(std::min(factor, 1e38)));
        }
    }

    uint64_t size() const { return weights_->blocks(); }

    const uint32_t* read(uint64_t first, uint64_t count, uint32_t* keys) const {
        return weights_->logarithmic() ? read_all<OfLogarithm>(first, count, keys)
                                       : read_all<OfWeight>(first, count, keys);
    }

    // Writes the keys of a batch that are at most `bound`, and their offsets in the batch; returns their
    // number. A lower bound, without exp and log, rules out most of them.
    uint32_t read_below(uint32_t bound, uint64_t first, uint64_t count, uint32_t* offsets,
                        uint32_t* keys) const {
        uint32_t chosen = 0;
        run_vectorised([&] {
            chosen = weights_->logarithmic()
                         ? read_below_here<OfLogarithm>(bound, first, count, offsets, keys)
                         : read_below_here<OfWeight>(bound, first, count, offsets, keys);
        });
        return chosen;
    }

  private:
    static constexpr uint32_t kLargest = 0xFF7FFFFFu;  // the key of the largest float

    template <class Weight>
    static uint32_t key_of(float relative, float factor, float uniform, float rest) {
        const float key = det_exponential(uniform, rest) * factor * Weight::inverse(relative);
        const float finite = std::min(key, std::numeric_limits<float>::max());
        return factor == 0.0f ? kNoKey : float_key(finite);
    }

    template <class Weight>
    const uint32_t* read_all(uint64_t first, uint64_t count, uint32_t* keys) const {
        uint32_t cluster[kBatch];
        float relative[kBatch], factor[kBatch], uniform[kBatch], rest[kBatch];
        read_weights(first, count, cluster, relative, factor);
        for (uint64_t j = 0; j < count; ++j) {  // short loops, which become vector instructions
            const Uniform draw(derive(seed_, first + j));
            uniform[j] = draw.number;
            rest[j] = draw.rest;
        }
        for (uint64_t j = 0; j < count; ++j) {
            keys[j] = key_of<Weight>(relative[j], factor[j], uniform[j], rest[j]);
        }
        return keys;
    }

    template <class Weight>
    uint32_t read_below_here(uint32_t bound, uint64_t first, uint64_t count, uint32_t* offsets,
                             uint32_t* keys) const {
        uint32_t cluster[kBatch], high_bits[kBatch];
        float relative[kBatch], factor[kBatch], uniform[kBatch], rest[kBatch], least[kBatch];
        read_weights(first, count, cluster, relative, factor);
        for (uint64_t j = 0; j < count; ++j) {
            high_bits[j] = static_cast<uint32_t>(derive(seed_, first + j) >> 40);
        }
        for (uint64_t j = 0; j < count; ++j) {
            const float t =
                static_cast<float>(static_cast<int32_t>(high_bits[j])) * 0x1p-24f;  // rounded down
            least[j] = factor[j] * Weight::inverse_from_below(relative[j]) *
                       (t + 0.5f * t * t);  // -ln(1 - t) > t + t^2 / 2
        }
        // A little more than the bound, since rounding may have raised `least`.
        const float most = bound < kLargest ? key_float(bound) * 1.0001f : std::numeric_limits<float>::max();
        uint32_t possible = 0;
        for (uint32_t j = 0; j < count; ++j) {  // without branches, which nothing could predict
            offsets[possible] = j;
            possible += (least[j] <= most) & (factor[j] > 0.0f);
        }
        for (uint32_t i = 0; i < possible; ++i) {  // forward, so that what is overwritten has been read
            const uint32_t j = offsets[i];
            relative[i] = relative[j];
            factor[i] = factor[j];
            const Uniform draw(derive(seed_, first + j));
            uniform[i] = draw.number;
            rest[i] = draw.rest;
        }
        for (uint32_t i = 0; i < possible; ++i) {
            keys[i] = key_of<Weight>(relative[i], factor[i], uniform[i], rest[i]);
        }
        uint32_t chosen = 0;
        for (uint32_t i = 0; i < possible; ++i) {
            offsets[chosen] = offsets[i];
            keys[chosen] = keys[i];
            chosen += keys[i] <= bound;
        }
        return chosen;
    }

    void read_weights(uint64_t first, uint64_t count, uint32_t* cluster, float* relative,
                      float* factor) const {
        weights_->read(first, count, cluster, relative);
        for (uint64_t j = 0; j < count; ++j) factor[j] = factors_[cluster[j]];
    }

    const BlockWeights* weights_;
    uint64_t seed_;
    std::vector<float> factors_;
};

// Emits the samples of every chunk for shuffle_multiset. They are kept as offsets from the first block of the
// chunk, so that memory is needed for the samples only.
class SampleLists {
  public:
    explicit SampleLists(uint64_t n) : lists_(num_chunks(n)) {}

    std::vector<uint32_t>& of(uint64_t chunk) { return lists_[chunk]; }

    uint64_t count(uint64_t chunk) const { return lists_[chunk].size(); }

    template <class Sink>
    void operator()(uint64_t chunk, uint64_t, uint64_t, Sink&& sink) const {
        sink(lists_[chunk].data(), lists_[chunk].size());
    }

  private:
    std::vector<std::vector<uint32_t>> lists_;
};

// A block whose key lies near the one at the wanted rank, and its position in the lists.
struct Near {
    uint32_t key;
    uint32_t position;
    uint64_t chunk;

    bool operator<(const Near& other) const {
        if (key != other.key) return key < other.key;
        return chunk != other.chunk ? chunk < other.chunk : position < other.position;
    }
};

// Removes the blocks at these positions, in any order, from the list of a chunk.
void erase_positions(std::vector<uint32_t>& list, const std::vector<uint32_t>& positions) {
    constexpr uint32_t kErased = 0xFFFFFFFFu;
    for (const uint32_t position : positions) list[position] = kErased;
    list.erase(std::remove(list.begin(), list.end(), kErased), list.end());
}

// The `samples` blocks with the smallest keys of `all` that have one; equal keys go by id. Takes one
// pass over the blocks; returns nothing if the guess at the last key was wrong.
std::optional<SampleLists> choose_by_guess(const ExponentialKeys& keys, uint64_t samples, uint64_t all,
                                           int threads) {
    const double share = static_cast<double>(samples) / static_cast<double>(all);
    const auto bounds = KeySample(keys).guess(
        [share](uint64_t count) { return static_cast<uint64_t>(share * static_cast<double>(count)); });
    if (!bounds) return std::nullopt;
    const uint64_t n = keys.size(), chunks = num_chunks(n);
    SampleLists lists(n);
    std::vector<std::vector<Near>> near_of(chunks);
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        std::vector<uint32_t> list;
        std::vector<Near> near;
        uint32_t offsets[kBatch], below_high[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const uint32_t chosen = keys.read_below(bounds->high, first, count, offsets, below_high);
            const auto size = static_cast<uint32_t>(list.size());
            for (uint32_t i = 0; i < chosen; ++i) {
                if (below_high[i] > bounds->low) near.push_back({below_high[i], size + i, chunk});
                offsets[i] += static_cast<uint32_t>(first - begin);
            }
            list.insert(list.end(), offsets, offsets + chosen);
        });
        lists.of(chunk) = std::move(list);
        near_of[chunk] = std::move(near);
    });
    uint64_t below = 0;  // how many keys are at most the lower bound
    std::vector<Near> near;
    for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
        below += lists.count(chunk) - near_of[chunk].size();
        near.insert(near.end(), near_of[chunk].begin(), near_of[chunk].end());
    }
    if (below > samples || below + near.size() < samples) return std::nullopt;
    const auto last = near.begin() + static_cast<std::ptrdiff_t>(samples - below);
    std::nth_element(near.begin(), last, near.end());
    std::vector<std::vector<uint32_t>> too_many(chunks);
    std::for_each(last, near.end(), [&](const Near& item) { too_many[item.chunk].push_back(item.position); });
    parallel_for(chunks, threads, [&](uint64_t chunk) { erase_positions(lists.of(chunk), too_many[chunk]); });
    return lists;
}

}  // namespace

// The order of the keys is biased towards heavy blocks, so the chosen blocks are shuffled.
template <class Id>
void order_choice(const BlockWeights& weights, const Mass& mass, uint64_t samples, uint64_t seed, int threads,
                  Id* out) {
    const Shares shares(weights, mass);
    const ExponentialKeys keys(weights, shares, derive(seed, kKeys), threads);
    const uint64_t n = weights.blocks(), all = shares.drawable();
    const auto pass_seed = [seed](uint64_t pass) { return derive(seed, kPasses + pass); };
    std::optional<decltype(KeyFilter(keys, kNoKey, 0, threads))> drawable;
    const auto one_pass = [&](uint64_t pass, Id* to) {
        if (!drawable) drawable.emplace(keys, kNoKey, 0, threads);
        shuffle_multiset(n, all, pass_seed(pass), threads, *drawable, to);
    };
    const auto part = [&](uint64_t pass, uint64_t count, Id* to) {
        if (const auto chosen = choose_by_guess(keys, count, all, threads)) {
            return shuffle_multiset(n, count, pass_seed(pass), threads, *chosen, to);
        }
        const Cut cut = KeyRanks(keys, threads).at(count - 1);
        const KeyFilter smallest(keys, cut.key, count - cut.below, threads);
        shuffle_multiset(n, count, pass_seed(pass), threads, smallest, to);
    };
    fill_passes(all, samples, one_pass, part, out);
}

template void order_choice<uint32_t>(const BlockWeights&, const Mass&, uint64_t, uint64_t, int, uint32_t*);
template void order_choice<uint64_t>(const BlockWeights&, const Mass&, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
