// Samples as complete passes over blocks, and a part of one.
#pragma once

#include <cstdint>

namespace mlfr {

// Fills out[0, samples) with passes of `size` ids: one_pass(number, to) writes a complete one, and
// part(number, count, to) the `count` ids of a last, partial one.
template <class Id, class OnePass, class Part>
void fill_passes(uint64_t size, uint64_t samples, OnePass one_pass, Part part, Id* out) {
    uint64_t number = 0;
    for (; size > 0 && samples >= size; samples -= size, out += size) one_pass(number++, out);
    if (samples > 0) part(number, samples, out);
}

// Does the same where part(number, size, to) writes a complete pass.
template <class Id, class Part>
void fill_passes(uint64_t size, uint64_t samples, Part part, Id* out) {
    fill_passes(size, samples, [&](uint64_t number, Id* to) { part(number, size, to); }, part, out);
}

}  // namespace mlfr
