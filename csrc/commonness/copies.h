// Which items (documents, blocks) are copies of others, and which are nearly.
#pragma once

#include <cstdint>
#include <string>

namespace mlfr {

// Items with equal hashes are copies: representative[i] becomes the lowest id among them, count[i] their
// number.
void exact_copies(const uint64_t* hashes, uint64_t n, int threads, uint32_t* representative, uint32_t* count);

// Bytes for each item that near_copies takes beyond its arguments.
constexpr uint64_t kNearCopyBytes = 72;

// Joins what is nearly equal, by locality-sensitive hashing of the signatures [n, kBins], which lie in a
// file: 32 bands of 4 bins, and of those that agree in a band, pairs with an estimated Jaccard similarity of
// `threshold` at least. representative [n]: what exact_copies gave; becomes the lowest id of the connected
// component.
void near_copies(const std::string& signatures, uint64_t n, double threshold, int threads,
                 uint32_t* representative);

}  // namespace mlfr
