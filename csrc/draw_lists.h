// What weighted sampling shares: where it keeps what is drawn, and seeds.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace mlfr {

// Seeds of the parts of an order, so that none shares a random stream with another.
enum SeedPart : uint64_t { kOffset = 2, kKeys = 3, kPasses = 16 };

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

}  // namespace mlfr
