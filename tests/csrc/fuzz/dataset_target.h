// The input of the dataset's target: these fields, then the bytes of the .idx file.
#pragma once

#include <cstdint>

namespace fuzz {

struct Control {
    uint64_t start;       // first token of a row
    uint64_t ask;         // a document, and a sequence
    uint16_t row_length;  // tokens
    uint16_t later_at;    // where a file that is open is changed
    uint8_t bin;       // size of the .bin file: 0 off by bin_delta, 1 `start`, else what the .idx file says
    int8_t bin_delta;  // bytes
    uint8_t later;     // 0 to 3: cut .idx, overwrite .idx, cut .bin; others: nothing
    uint8_t rows;
    uint8_t unused[8];
};
static_assert(sizeof(Control) == 32, "inputs must not depend on padding");

}  // namespace fuzz
