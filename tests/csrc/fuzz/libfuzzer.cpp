// Under libFuzzer, one mutation in eight starts anew from an input of the target's own making.
#include <algorithm>

#include "fuzz.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t capacity);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t capacity, unsigned int seed) {
    mlfr::Stream random(seed, 0);
    if (random.below(8) != 0 && size > 0) return LLVMFuzzerMutate(data, size, capacity);
    const fuzz::Bytes made = fuzz::make_input(random);
    const size_t count = std::min(capacity, made.size());
    std::copy_n(made.begin(), count, data);
    return count;
}
