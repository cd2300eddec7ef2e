// What makes some blocks count more than others in every phase: static weights, and copies.
#pragma once

#include <cstdint>

namespace mlfr {

// Raises weights to a power, and lets none count as more than `cap` times the mean of the result; writes them
// relative to the largest: in [0, 1], 0 where a weight is 0 and nowhere else. Throws std::invalid_argument
// for a weight that is negative or not finite, and where all are 0.
void temper_weights(const float* weights, uint64_t n, double power, double cap, int threads, float* out);

// Chooses the copies that count in a turn: of each group of blocks with the same number, one, or with
// `logarithmic` 1 + floor(log2 of its size). Each copy has its turn: over as many turns as a group has
// copies, each of them counts equally often. Writes 1 for those that count, else 0. A block whose factor is 0
// is no copy of anything, and does not count (null: all do). One thread: the two passes wait for memory.
void take_turns(const uint32_t* groups, const float* factors, uint64_t n, uint64_t turn, bool logarithmic,
                uint32_t* visits);

// Writes the visits of each block in `passes` passes from pass `first` on: over any number of passes, a block
// comes in a share `factors[i]`, in [0, 1], of them, as evenly as can be. So in passes 0 to k - 1 it comes k
// times its factor, rounded up or down; a factor below 2^-32 is none. In which of them is drawn by the seed,
// for each block by itself.
void visits_in_passes(const float* factors, uint64_t n, uint64_t first, uint64_t passes, uint64_t seed,
                      int threads, uint32_t* visits);

}  // namespace mlfr
