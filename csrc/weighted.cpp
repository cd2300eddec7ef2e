// Weighted sampling: systematic visits, and choice without replacement.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "order.h"
#include "select.h"
#include "shuffle.h"
#include "weights.h"

namespace mlfr {

namespace {

constexpr int kLineBits = 61;  // the line of all draws is at most 2^61 units long
constexpr int kDrawBits = 40;  // so that a unit is at most 2^-21 draws

// Seeds of the parts of an order, so that none shares a random stream with another.
enum SeedPart : uint64_t { kOffset = 2, kKeys = 3, kPasses = 16 };

// The line of systematic sampling (Madow 1949): each block owns a stretch of e_i draws, first all of cluster
// 0 by id, then of cluster 1, and so on; a block is visited once for each point offset + 0, 1, 2 ... in its
// stretch. That is floor(e_i) or ceil(e_i) times, and the same holds for the clusters. Ends of stretches are
// rounded to units of 2^-fraction_bits draws, never accumulated, so the last one is the end of the line
// exactly and the points number `draws`.
class VisitLine {
  public:
    VisitLine(const BlockWeights& weights, std::vector<uint64_t> chunk_sums, uint64_t draws, uint64_t seed)
        : clusters_(weights.clusters()), before_(std::move(chunk_sums)) {
        if (draws >> kDrawBits) throw std::invalid_argument("draws: at most 2^40 - 1");
        while ((draws >> (kLineBits - fraction_bits_)) > 0) --fraction_bits_;
        const std::vector<uint64_t> total = totals_of_clusters();
        const uint64_t length = draws << fraction_bits_;
        std::vector<uint64_t> start(clusters_ + 1, length);
        double share = 0.0;
        for (size_t c = 0; c < clusters_ && !is_last(weights, c); ++c) {
            share += weights.share(c);
            start[c + 1] = std::min(length, static_cast<uint64_t>(share * static_cast<double>(length)));
        }
        start[0] = 0;
        const uint64_t offset = derive(seed, kOffset) >> (64 - fraction_bits_);
        for (size_t c = 0; c < clusters_; ++c) {
            parts_.push_back(make_part(start[c] + offset, start[c + 1] - start[c], total[c]));
        }
    }

    // Sum of integer weights of a cluster in the chunks before this one.
    const uint64_t* before(uint64_t chunk) const { return &before_[chunk * clusters_]; }

    // Points before the place in a cluster's part of the line that a running sum of integer weights has
    // reached.
    uint64_t points(size_t cluster, uint64_t sum) const {
        const Part& part = parts_[cluster];
        const auto product = static_cast<unsigned __int128>(sum << part.shift) * part.rate;
        return (part.start + static_cast<uint64_t>(product >> 64)) >> fraction_bits_;
    }

  private:
    // A cluster's part of the line.
    struct Part {
        uint64_t start;  // in units, the offset included
        uint64_t rate;
        int shift;
    };

    // The last cluster that has a share: its part ends where the line does, however the shares were rounded.
    static bool is_last(const BlockWeights& weights, size_t cluster) {
        for (size_t c = cluster + 1; c < weights.clusters(); ++c) {
            if (weights.share(c) > 0.0) return false;
        }
        return true;
    }

    // Turns the sums of the chunks into sums of all chunks before; returns those of all.
    std::vector<uint64_t> totals_of_clusters() {
        std::vector<uint64_t> total(clusters_, 0);
        for (size_t i = 0; i < before_.size(); ++i) {
            uint64_t& sum = total[i % clusters_];
            sum += std::exchange(before_[i], sum);
        }
        return total;
    }

    // points() multiplies a sum by length / total as ceil(2^64 length / total'), total' = total << shift in
    // [2^62, 2^63). At sum = total that is `length` exactly: the excess of the ceiling, total' / 2^64, is
    // below 1.
    static Part make_part(uint64_t start, uint64_t length, uint64_t total) {
        if (length == 0 || total == 0) return {start, 0, 0};
        int shift = 0;
        while ((total << shift) < (uint64_t{1} << 62)) ++shift;
        const auto divisor = static_cast<unsigned __int128>(total << shift);
        const auto rate = ((static_cast<unsigned __int128>(length) << 64) + divisor - 1) / divisor;
        return {start, static_cast<uint64_t>(rate), shift};
    }

    size_t clusters_;
    int fraction_bits_ = 32;
    std::vector<uint64_t> before_;
    std::vector<Part> parts_;
};

// The draws of every chunk, as offsets from its first block. An emitter for shuffle_multiset, which takes
// memory for what is drawn alone.
class DrawLists {
  public:
    explicit DrawLists(uint64_t n) : lists_(num_chunks(n)) {}

    std::vector<uint32_t>& of(uint64_t chunk) { return lists_[chunk]; }

    uint64_t count(uint64_t chunk) const { return lists_[chunk].size(); }

    template <class Sink>
    void operator()(uint64_t chunk, uint64_t, uint64_t, Sink&& sink) const {
        sink(lists_[chunk].data(), lists_[chunk].size());
    }

  private:
    std::vector<std::vector<uint32_t>> lists_;
};

DrawLists list_visits(uint64_t n, const BlockWeights& weights, const VisitLine& line, int threads) {
    DrawLists lists(n);
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        std::vector<uint64_t> sum(line.before(chunk), line.before(chunk) + weights.clusters());
        std::vector<uint64_t> points(weights.clusters());
        for (size_t c = 0; c < sum.size(); ++c) points[c] = line.points(c, sum[c]);
        std::vector<uint32_t>& list = lists.of(chunk);
        uint32_t cluster[kBatch];
        uint64_t weight[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            weights.read_integers(first, count, cluster, weight);
            for (uint64_t j = 0; j < count; ++j) {
                const size_t c = cluster[j];
                sum[c] += weight[j];
                const uint64_t now = line.points(c, sum[c]);
                for (; points[c] < now; ++points[c]) list.push_back(static_cast<uint32_t>(first - begin + j));
            }
        });
    });
    return lists;
}

// What divides a block's weight relative to its cluster's heaviest block to give its weight in the corpus, up
// to a common factor: at least 1; 0 where the cluster has no share.
std::vector<double> corpus_factors(const BlockWeights& weights, int threads) {
    const size_t k = weights.clusters();
    std::vector<double> factor(k, 0.0);
    size_t drawn = 0;
    for (size_t c = 0; c < k; ++c) drawn += weights.share(c) > 0.0;
    if (drawn == 1) {  // there is nothing to compare it with
        for (size_t c = 0; c < k; ++c) factor[c] = weights.share(c) > 0.0 ? 1.0 : 0.0;
        return factor;
    }
    const std::vector<uint64_t> sums = weights.chunk_sums(threads);
    for (size_t i = 0; i < sums.size(); ++i) factor[i % k] += static_cast<double>(sums[i]);
    double smallest = std::numeric_limits<double>::infinity();
    for (size_t c = 0; c < k; ++c) {
        factor[c] = weights.share(c) > 0.0 ? factor[c] / weights.share(c) : 0.0;
        if (factor[c] > 0.0) smallest = std::min(smallest, factor[c]);
    }
    for (double& f : factor) f /= smallest;
    return factor;
}

// Exponential keys (Efraimidis & Spirakis 2006): the k smallest of E_i / w_i, E_i standard exponential
// numbers, are a weighted choice without replacement. In fp32 there are few ties, which go by id; keys beyond
// its range are all its largest number. They are made anew whenever they are read.
class ExponentialKeys {
  public:
    ExponentialKeys(uint64_t n, const BlockWeights& weights, uint64_t seed, int threads)
        : n_(n), weights_(&weights), seed_(seed) {
        for (const double factor : corpus_factors(weights, threads)) {
            factors_.push_back(static_cast<float>(std::min(factor, 1e38)));
        }
    }

    uint64_t size() const { return n_; }

    const uint32_t* read(uint64_t first, uint64_t count, uint32_t* keys) const {
        uint32_t cluster[kBatch];
        float log_relative[kBatch], factor[kBatch], uniform[kBatch], rest[kBatch];
        weights_->read(first, count, cluster, log_relative);
        for (uint64_t j = 0; j < count; ++j) factor[j] = factors_[cluster[j]];
        for (uint64_t j = 0; j < count; ++j) {  // short loops: vector instructions
            const Uniform draw(derive(seed_, first + j));
            uniform[j] = draw.number;
            rest[j] = draw.rest;
        }
        for (uint64_t j = 0; j < count; ++j) {
            const float number = det_exponential(uniform[j], rest[j]);
            const float key = number * factor[j] * det_expf(-log_relative[j]);
            const float finite = std::min(key, std::numeric_limits<float>::max());
            keys[j] = factor[j] == 0.0f ? kNoKey : float_key(finite);
        }
        return keys;
    }

  private:
    uint64_t n_;
    const BlockWeights* weights_;
    uint64_t seed_;
    std::vector<float> factors_;
};

// A key that is probably above the `share` smallest ones, and not far: from a sample of the batches.
uint32_t guess_bound(const ExponentialKeys& keys, double share, int threads) {
    constexpr uint64_t kEvery = 64 * kBatch;
    std::vector<uint32_t> sample;
    uint32_t buffer[kBatch];
    for (uint64_t first = 0; first + kBatch <= keys.size(); first += kEvery) {
        const uint32_t* batch = keys.read(first, kBatch, buffer);
        sample.insert(sample.end(), batch, batch + kBatch);
    }
    const KeyRanks<StoredKeys> ranks(StoredKeys(sample.data(), sample.size()), threads);
    const auto count = static_cast<double>(ranks.count());
    const auto rank = static_cast<uint64_t>(share * count + 6.0 * std::sqrt(count * share) + 16.0);
    return rank < ranks.count() ? ranks.at(rank).key : kNoKey - 1;
}

// Blocks and their keys, those up to a bound.
struct Candidates {
    DrawLists blocks;
    std::vector<std::vector<uint32_t>> keys;  // of each chunk
    uint64_t count;
};

Candidates find_candidates(const ExponentialKeys& keys, uint32_t bound, int threads) {
    const uint64_t n = keys.size();
    Candidates found{DrawLists(n), std::vector<std::vector<uint32_t>>(num_chunks(n)), 0};
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        uint32_t buffer[kBatch], offsets[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const uint32_t* batch = keys.read(first, count, buffer);
            uint32_t chosen = 0;
            for (uint32_t j = 0; j < count; ++j) {  // without branches, as in KeyFilter
                offsets[chosen] = static_cast<uint32_t>(first - begin) + j;
                buffer[chosen] = batch[j];  // never ahead of what is read
                chosen += batch[j] <= bound;
            }
            auto append = [chosen](std::vector<uint32_t>& to, const uint32_t* from) {
                to.insert(to.end(), from, from + chosen);
            };
            append(found.blocks.of(chunk), offsets);
            append(found.keys[chunk], buffer);
        });
    });
    for (uint64_t chunk = 0; chunk < found.keys.size(); ++chunk) found.count += found.blocks.count(chunk);
    return found;
}

// The `draws` blocks with the smallest keys of `all` that have one; equal keys go by id.
DrawLists choose_smallest(const ExponentialKeys& keys, uint64_t draws, uint64_t all, int threads) {
    const double share = static_cast<double>(draws) / static_cast<double>(all);
    Candidates found = find_candidates(keys, guess_bound(keys, share, threads), threads);
    if (found.count < draws) found = find_candidates(keys, kNoKey - 1, threads);
    std::vector<uint32_t> flat;
    flat.reserve(found.count);
    for (const auto& part : found.keys) flat.insert(flat.end(), part.begin(), part.end());
    const Cut cut = KeyRanks(StoredKeys(flat.data(), flat.size()), threads).at(draws - 1);
    uint64_t ties = draws - cut.below;
    for (uint64_t chunk = 0; chunk < found.keys.size(); ++chunk) {
        std::vector<uint32_t>& blocks = found.blocks.of(chunk);
        size_t kept = 0;
        for (size_t i = 0; i < blocks.size(); ++i) {
            const uint32_t key = found.keys[chunk][i];
            const bool tie = (key == cut.key) & (ties > 0);
            ties -= tie;
            blocks[kept] = blocks[i];
            kept += (key < cut.key) | tie;
        }
        blocks.resize(kept);
    }
    return std::move(found.blocks);
}

}  // namespace

template <class Id>
void order_visits(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads,
                  Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const VisitLine line(weights, weights.chunk_sums(threads), draws, seed);
    shuffle_multiset(scores.n, draws, seed, threads, list_visits(scores.n, weights, line, threads), out);
}

// The order of the keys is biased towards heavy blocks, so what was chosen is shuffled.
template <class Id>
void order_choice(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads,
                  Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const ExponentialKeys keys(scores.n, weights, derive(seed, kKeys), threads);
    const uint64_t all = weights.drawable();
    uint64_t pass = 0;
    if (draws >= all) {
        const KeyFilter drawable(keys, kNoKey, 0, Side::kBelow, threads);
        for (; draws >= all; draws -= all, out += all) {
            shuffle_multiset(scores.n, all, derive(seed, kPasses + pass++), threads, drawable, out);
        }
    }
    if (draws == 0) return;
    const DrawLists chosen = choose_smallest(keys, draws, all, threads);
    shuffle_multiset(scores.n, draws, derive(seed, kPasses + pass), threads, chosen, out);
}

#define MLFR_INSTANTIATE(Id)                                                                \
    template void order_visits<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*); \
    template void order_choice<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)
#undef MLFR_INSTANTIATE

}  // namespace mlfr
