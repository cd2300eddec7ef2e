// Thresholds and percentiles of scores, and the order of what a threshold keeps.
#include <algorithm>
#include <memory>
#include <stdexcept>

#include "common/detmath.h"
#include "orders/order.h"
#include "orders/passes.h"
#include "orders/rank.h"
#include "orders/shuffle.h"

namespace mlfr {

namespace {

RankedScore rank_threshold(Scores scores, double drop, int threads) {
    if (!(drop >= 0.0 && drop < 1.0)) throw std::invalid_argument("drop: must be at least 0 and below 1");
    auto dropped = [drop](uint64_t seen) {
        return std::min(floor_share(drop, seen), seen - std::min<uint64_t>(seen, 1));
    };
    return rank_score(scores, dropped, threads);
}

}  // namespace

// Blocks whose rank is below that of the cut are dropped.
Threshold threshold(Scores scores, double drop, int threads) {
    const RankedScore cut = rank_threshold(scores, drop, threads);
    return {cut.score, cut.rank - cut.smaller(), cut.rank, cut.seen};
}

float percentile(Scores scores, double q, int threads) {
    if (!(q >= 0.0 && q <= 1.0)) throw std::invalid_argument("q: must lie between 0 and 1");
    auto rank = [q](uint64_t seen) { return std::max<uint64_t>(ceil_share(q, seen), 1) - 1; };
    const RankedScore ranked = rank_score(scores, rank, threads);
    if (ranked.seen == 0) throw std::invalid_argument("scores: no block has one");
    return ranked.score;
}

namespace {

// Emits the blocks that a threshold keeps, for shuffle_multiset.
class KeptBlocks {
  public:
    KeptBlocks(Scores scores, const RankedScore& cut, bool keep_unseen)
        : scores_(scores), cut_(cut.score), keep_unseen_(keep_unseen) {
        uint64_t ties_left = cut.rank - cut.smaller();  // to drop, lowest ids first
        for (size_t c = 0; c < cut.chunks.size(); ++c) {
            const CutChunk& chunk = cut.chunks[c];
            const uint64_t dropped_ties = std::min(ties_left, chunk.ties);
            ties_left -= dropped_ties;
            const uint64_t blocks = std::min(kChunk, scores.n - c * kChunk);
            const uint64_t dropped = chunk.smaller + dropped_ties + (keep_unseen ? 0 : chunk.none);
            chunks_.push_back({blocks - dropped, dropped_ties});
        }
    }

    uint64_t count(uint64_t chunk) const { return chunks_[chunk].kept; }

    template <class Sink>
    void operator()(uint64_t number, uint64_t begin, uint64_t end, Sink&& sink) const {
        const Chunk& chunk = chunks_[number];
        const float cut = cut_;
        if (chunk.dropped_ties == 0 && keep_unseen_) {
            choose(begin, end, sink, [=](float score) { return !(score < cut); });
        } else if (chunk.dropped_ties == 0) {
            choose(begin, end, sink, [=](float score) { return score >= cut; });
        } else {  // few chunks have blocks that equal the cut exactly
            uint64_t left = chunk.dropped_ties;
            choose(begin, end, sink, [left, cut, unseen = keep_unseen_](float score) mutable {
                const bool dropped = (score == cut) & (left > 0);
                left -= dropped;
                return ((score >= cut) & !dropped) | (unseen & (score != score));
            });
        }
    }

  private:
    struct Chunk {
        uint64_t kept;  // blocks
        uint64_t dropped_ties;
    };

    template <class Sink, class IsKept>
    void choose(uint64_t begin, uint64_t end, Sink& sink, IsKept is_kept) const {
        uint32_t offsets[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const float* batch = scores_.data + first;
            const auto base = static_cast<uint32_t>(first - begin);
            uint32_t chosen = 0;
            for (uint32_t j = 0; j < count; ++j) {  // without branches, which nothing could predict
                offsets[chosen] = base + j;
                chosen += is_kept(batch[j]);
            }
            sink(offsets, chosen);
        });
    }

    Scores scores_;
    float cut_;
    bool keep_unseen_;
    std::vector<Chunk> chunks_;
};

}  // namespace

template <class Id>
void order_threshold(Scores scores, double drop, bool keep_unseen, uint64_t samples, uint64_t seed,
                     int threads, Id* out) {
    const RankedScore cut = rank_threshold(scores, drop, threads);
    const uint64_t kept = (keep_unseen ? scores.n : cut.seen) - cut.rank;
    if (kept == 0 && samples > 0)
        throw std::invalid_argument("scores: no block has one, so none can be drawn");
    const KeptBlocks blocks(scores, cut, keep_unseen);
    fill_passes(
        kept, samples,
        [&](uint64_t pass, Id* to) {
            shuffle_multiset(scores.n, kept, derive(seed, pass), threads, blocks, to);
        },
        out);
}

template void order_threshold<uint32_t>(Scores, double, bool, uint64_t, uint64_t, int, uint32_t*);
template void order_threshold<uint64_t>(Scores, double, bool, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
