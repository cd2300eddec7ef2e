// Spans of a token file (documents, sections of them, blocks), read as u32 whatever type they are stored in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "io/dataset.h"

namespace mlfr {

// Spans [starts[i], starts[i] + lengths[i]) of one file.
struct Spans {
    const int64_t* starts;
    const int64_t* lengths;
    uint64_t n;
};

class SpanReader {
  public:
    // dtype_code: Megatron's, of integers. Throws std::invalid_argument for another, or one of another size
    // than the file's tokens.
    SpanReader(const TokenFile& file, int dtype_code);

    // Fills `out` with tokens from `start` on. Throws std::invalid_argument for one outside of u32.
    void read(int64_t start, uint64_t length, uint32_t* out) const;

    // Calls take(tokens, count) with the tokens of a span, a piece at a time: memory does not grow with it.
    template <class Take>
    void for_pieces(int64_t start, int64_t length, Take take) const {
        thread_local std::vector<uint32_t> piece(kPiece);
        for (int64_t done = 0; done < length; done += kPiece) {
            const auto count = static_cast<uint64_t>(std::min<int64_t>(kPiece, length - done));
            read(start + done, count, piece.data());
            take(piece.data(), count);
        }
    }

  private:
    static constexpr int64_t kPiece = 1 << 15;

    const TokenFile& file_;
    int dtype_code_;
};

// The largest token of the spans; 0 where they hold none.
uint32_t largest_token(const SpanReader& reader, const Spans& spans, int threads);

}  // namespace mlfr
