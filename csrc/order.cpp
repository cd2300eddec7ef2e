#include "order.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "detmath.h"
#include "select.h"
#include "shuffle.h"

namespace mlfr {

namespace {

// The score at the rank (from 0) that rank_of(seen) says, as a key; seen: blocks that have a score.
struct ScoreRank {
    uint64_t seen;
    Cut cut;  // where seen > 0
};

// Throws std::invalid_argument for an infinite score. One pass over the scores, where a sample leads near
// the rank; two otherwise.
template <class RankOf>
ScoreRank rank_score(Scores scores, RankOf rank_of, int threads) {
    const ScoreKeys keys(scores);
    if (const auto bounds = guess_rank(keys, rank_of)) {
        NearKeys near = find_near(keys, *bounds, threads);
        if (near.infinite) count_seen(scores, threads);  // names the block
        const uint64_t rank = rank_of(near.count);
        if (near.below <= rank && rank - near.below < near.between.size()) {
            const auto place = near.between.begin() + static_cast<std::ptrdiff_t>(rank - near.below);
            std::nth_element(near.between.begin(), place, near.between.end());
            const uint32_t key = *place;
            const auto less =
                std::count_if(near.between.begin(), place, [key](uint32_t k) { return k < key; });
            return {near.count, {key, near.below + static_cast<uint64_t>(less)}};
        }
    }
    const KeyRanks<ScoreKeys> ranks(keys, threads);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    // NaN apart, only infinities share the upper half of their keys.
    if (ranks.count_near(float_key(kInfinity)) + ranks.count_near(float_key(-kInfinity)) > 0) {
        count_seen(scores, threads);
    }
    return {ranks.count(), ranks.count() > 0 ? ranks.at(rank_of(ranks.count())) : Cut{}};
}

}  // namespace

Threshold threshold(Scores scores, double drop, int threads) {
    if (!(drop >= 0.0 && drop < 1.0)) throw std::invalid_argument("drop: must be at least 0 and below 1");
    auto dropped = [drop](uint64_t seen) {
        return std::min(floor_share(drop, seen), seen - std::min<uint64_t>(seen, 1));
    };
    const auto [seen, cut] = rank_score(scores, dropped, threads);
    if (seen == 0) return {-std::numeric_limits<float>::infinity(), 0, 0, 0};
    return {key_float(cut.key), dropped(seen) - cut.below, dropped(seen), seen};
}

float percentile(Scores scores, double q, int threads) {
    if (!(q >= 0.0 && q <= 1.0)) throw std::invalid_argument("q: must lie between 0 and 1");
    auto rank = [q](uint64_t seen) { return std::max<uint64_t>(ceil_share(q, seen), 1) - 1; };
    const ScoreRank found = rank_score(scores, rank, threads);
    if (found.seen == 0) throw std::invalid_argument("scores: no block has one");
    return key_float(found.cut.key);
}

namespace {

// Every block once.
class AllBlocks {
  public:
    explicit AllBlocks(uint64_t n) : n_(n) {}

    uint64_t count(uint64_t chunk) const { return std::min(kChunk, n_ - chunk * kChunk); }

    template <class Sink>
    void operator()(uint64_t, uint64_t begin, uint64_t end, Sink&& sink) const {
        uint32_t offsets[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            std::iota(offsets, offsets + count, static_cast<uint32_t>(first - begin));
            sink(offsets, count);
        });
    }

  private:
    uint64_t n_;
};

// Block i visits[i] times.
class Visits {
  public:
    Visits(const uint32_t* visits, uint64_t n, int threads) : visits_(visits), counts_(num_chunks(n)) {
        for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
            counts_[chunk] = std::accumulate(visits + first, visits + last, uint64_t{0});
        });
    }

    uint64_t count(uint64_t chunk) const { return counts_[chunk]; }

    uint64_t sum() const { return std::accumulate(counts_.begin(), counts_.end(), uint64_t{0}); }

    template <class Sink>
    void operator()(uint64_t, uint64_t begin, uint64_t end, Sink&& sink) const {
        uint32_t offsets[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const uint32_t* visits = visits_ + first;
            const auto base = static_cast<uint32_t>(first - begin);
            uint64_t chosen = 0;
            for (uint32_t j = 0; j < count; ++j) {  // no branch where a block is visited once or not at all
                offsets[chosen] = base + j;
                chosen += visits[j] > 0;
                for (uint32_t more = visits[j]; more > 1; --more) {
                    if (chosen == kBatch) {
                        sink(offsets, chosen);
                        chosen = 0;
                    }
                    offsets[chosen++] = base + j;
                }
                if (chosen == kBatch) {
                    sink(offsets, chosen);
                    chosen = 0;
                }
            }
            sink(offsets, chosen);
        });
    }

  private:
    const uint32_t* visits_;
    std::vector<uint64_t> counts_;
};

}  // namespace

template <class Id>
void permutation(uint64_t n, uint64_t seed, int threads, Id* out) {
    shuffle_multiset(n, n, seed, threads, AllBlocks(n), out);
}

uint64_t sum_visits(const uint32_t* visits, uint64_t n, int threads) {
    return Visits(visits, n, threads).sum();
}

template <class Id>
void shuffle_visits(const uint32_t* visits, uint64_t n, uint64_t draws, uint64_t seed, int threads, Id* out) {
    shuffle_multiset(n, draws, seed, threads, Visits(visits, n, threads), out);
}

namespace {

// Whole passes of `size` draws and a part of one. one_pass(number, out) writes a pass.
template <class Id, class OnePass>
void fill_with_passes(uint64_t size, uint64_t draws, OnePass one_pass, Id* out) {
    uint64_t number = 0;
    for (; size > 0 && draws >= size; draws -= size, out += size) one_pass(number++, out);
    if (draws > 0) {
        const std::unique_ptr<Id[]> last(new Id[size]);
        one_pass(number, last.get());
        std::copy_n(last.get(), draws, out);
    }
}

}  // namespace

template <class Id>
void order_threshold(Scores scores, double drop, bool keep_unseen, uint64_t draws, uint64_t seed, int threads,
                     Id* out) {
    const Threshold cut = threshold(scores, drop, threads);
    const uint64_t kept = (keep_unseen ? scores.n : cut.seen) - cut.dropped;
    if (kept == 0 && draws > 0) throw std::invalid_argument("scores: no block has one, so none can be drawn");
    // Unscored blocks have the largest key: above every cut where they are kept, below where they are not.
    const ScoreKeys keys(scores, keep_unseen ? kNoKey : 0u);
    const KeyFilter filter(keys, float_key(cut.cut), cut.tie_quota, Side::kAbove, threads);
    fill_with_passes(
        kept, draws,
        [&](uint64_t pass, Id* to) {
            shuffle_multiset(scores.n, kept, derive(seed, pass), threads, filter, to);
        },
        out);
}

// A sum over hashes of (position, id): it depends on the order of the ids, not on the order of the additions.
template <class Id>
uint64_t order_hash(const Id* ids, uint64_t n, int threads) {
    std::vector<uint64_t> sums(num_chunks(n));
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        uint64_t sum = 0;
        for (uint64_t i = first; i < last; ++i) sum += mix(mix(kGolden * (i + 1)) + ids[i]);
        sums[chunk] = sum;
    });
    return derive(std::accumulate(sums.begin(), sums.end(), uint64_t{0}), n);
}

#define MLFR_INSTANTIATE(Id)                                                                   \
    template void permutation<Id>(uint64_t, uint64_t, int, Id*);                               \
    template void shuffle_visits<Id>(const uint32_t*, uint64_t, uint64_t, uint64_t, int, Id*); \
    template void order_threshold<Id>(Scores, double, bool, uint64_t, uint64_t, int, Id*);     \
    template uint64_t order_hash<Id>(const Id*, uint64_t, int);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)
#undef MLFR_INSTANTIATE

}  // namespace mlfr
