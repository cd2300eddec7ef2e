// Counter-based random numbers: a stream is a function of (seed, number), so that any thread can make any of
// them.
#pragma once

#include <cstdint>

namespace mlfr {

// Finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words that mixes every bit.
inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// Derives an independent seed for each (seed, number).
inline uint64_t derive(uint64_t seed, uint64_t number) {
    return mix(mix(seed + kGolden) + kGolden * (number + 1));
}

// SplitMix64 from a derived seed.
class Stream {
  public:
    Stream(uint64_t seed, uint64_t number) : state_(derive(seed, number)) {}

    uint64_t next() { return mix(state_ += kGolden); }

    // Uniform in [0, bound), exactly: Lemire's multiplication with rejection (2019).
    uint64_t below(uint64_t bound) {
        unsigned __int128 product = static_cast<unsigned __int128>(next()) * bound;
        if (static_cast<uint64_t>(product) < bound) {
            const uint64_t threshold = (0 - bound) % bound;
            while (static_cast<uint64_t>(product) < threshold) {
                product = static_cast<unsigned __int128>(next()) * bound;
            }
        }
        return static_cast<uint64_t>(product >> 64);
    }

  private:
    uint64_t state_;
};

}  // namespace mlfr
