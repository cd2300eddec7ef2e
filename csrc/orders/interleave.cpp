// Makes one order from those of several corpora.
#include <algorithm>
#include <limits>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "orders/order.h"

namespace mlfr {

namespace {

// Successive parts of a line: finds the part to which a position belongs.
class Parts {
  public:
    explicit Parts(const std::vector<uint64_t>& counts) : ends_(counts.size()) {
        std::partial_sum(counts.begin(), counts.end(), ends_.begin());
        while ((size() >> shift_) >= kTable) ++shift_;
        // The part at every multiple of 2^shift: a search starts with it, and nearly always ends with it.
        uint32_t part = 0;
        for (uint64_t slot = 0; slot < kTable && slot << shift_ < size(); ++slot) {
            while (ends_[part] <= slot << shift_) ++part;
            first_.push_back(part);
        }
    }

    uint64_t size() const { return ends_.empty() ? 0 : ends_.back(); }

    uint32_t of(uint64_t position) const {
        uint32_t part = first_[position >> shift_];
        while (ends_[part] <= position) ++part;
        return part;
    }

  private:
    static constexpr uint64_t kTable = 1 << 14;

    std::vector<uint64_t> ends_;
    int shift_ = 0;
    std::vector<uint32_t> first_;
};

// Replaces shuffled positions by items: each by the next item of the part in which the position lies.
template <class Position, class Id>
void deal(const Id* items, const std::vector<uint64_t>& counts, const Parts& parts, const Position* positions,
          int threads, Id* out) {
    const uint64_t k = counts.size(), n = parts.size();
    std::vector<uint64_t> next(num_chunks(n) * k,
                               0);  // first counts, then the index of a part's first item in the chunk
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        std::vector<uint64_t> counted(k, 0);
        for (uint64_t i = first; i < last; ++i) ++counted[parts.of(positions[i])];
        std::copy(counted.begin(), counted.end(), &next[chunk * k]);
    });
    uint64_t total = 0;
    for (uint64_t part = 0; part < k; ++part) {
        for (uint64_t chunk = 0; chunk < num_chunks(n); ++chunk) {
            total += std::exchange(next[chunk * k + part], total);
        }
    }
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        std::vector<uint64_t> item(&next[chunk * k], &next[chunk * k] + k);
        for (uint64_t i = first; i < last; ++i) out[i] = items[item[parts.of(positions[i])]++];
    });
}

}  // namespace

template <class Id>
void interleave(const Id* items, const std::vector<uint64_t>& counts, uint64_t seed, int threads, Id* out) {
    const Parts parts(counts);
    if (parts.size() == 0) return;
    if (parts.size() - 1 <= std::numeric_limits<Id>::max()) {
        permutation(parts.size(), seed, threads, out);
        deal(items, counts, parts, out, threads, out);  // each position is read before its item is written
    } else {
        std::vector<uint64_t> positions(parts.size());
        permutation(parts.size(), seed, threads, positions.data());
        deal(items, counts, parts, positions.data(), threads, out);
    }
}

template <class Id>
std::vector<uint64_t> count_parts(const Id* ids, uint64_t n, const std::vector<uint64_t>& sizes,
                                  int threads) {
    std::vector<uint64_t> total(sizes.size(), 0);
    if (n == 0) return total;
    const Parts parts(sizes);
    std::mutex lock;
    for_chunks(n, threads, [&](uint64_t, uint64_t first, uint64_t last) {
        std::vector<uint64_t> counts(sizes.size(), 0);
        for (uint64_t i = first; i < last; ++i) {
            if (ids[i] >= parts.size()) throw std::invalid_argument("ids: an id lies beyond the last part");
            ++counts[parts.of(ids[i])];
        }
        std::lock_guard<std::mutex> guard(lock);
        for (size_t part = 0; part < counts.size(); ++part) total[part] += counts[part];
    });
    return total;
}

template std::vector<uint64_t> count_parts<uint32_t>(const uint32_t*, uint64_t, const std::vector<uint64_t>&,
                                                     int);
template std::vector<uint64_t> count_parts<uint64_t>(const uint64_t*, uint64_t, const std::vector<uint64_t>&,
                                                     int);
template void interleave<uint32_t>(const uint32_t*, const std::vector<uint64_t>&, uint64_t, int, uint32_t*);
template void interleave<uint64_t>(const uint64_t*, const std::vector<uint64_t>&, uint64_t, int, uint64_t*);

}  // namespace mlfr
