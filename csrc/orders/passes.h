// Samples as complete passes over blocks, and a part of one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace mlfr {

// Fills out[0, samples) with passes of `size` ids: one_pass(number, to) writes a complete one, and
// part(number, count, to) the `count` ids of a last, partial one.
template <class Id, class OnePass, class Part>
void fill_passes(uint64_t size, uint64_t samples, OnePass one_pass, Part part, Id* out) {
    uint64_t number = 0;
    for (; size > 0 && samples >= size; samples -= size, out += size) one_pass(number++, out);
    if (samples > 0) part(number, samples, out);
}

// Does the same, with the beginning of a complete pass as the last, partial one.
template <class Id, class OnePass>
void fill_passes(uint64_t size, uint64_t samples, OnePass one_pass, Id* out) {
    auto cut_short = [&](uint64_t number, uint64_t count, Id* to) {
        const std::unique_ptr<Id[]> pass(new Id[size]);
        one_pass(number, pass.get());
        std::copy_n(pass.get(), count, to);
    };
    fill_passes(size, samples, one_pass, cut_short, out);
}

}  // namespace mlfr
