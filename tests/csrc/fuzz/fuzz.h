// What the fuzz targets and their drivers share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/random.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

using Bytes = std::vector<uint8_t>;

// A random input of the target: legal, or legal and then damaged, so that most are only a little wrong.
Bytes make_input(mlfr::Stream& random);

// `least` bytes and fewer than `more` others, each of them any byte.
inline Bytes random_bytes(mlfr::Stream& random, size_t least, size_t more) {
    Bytes bytes(least + random.below(more));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next() >> 56);
    return bytes;
}

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::abort();
}

// Calls work(); whether it threw `Error`. Any other exception is a failure.
template <class Error, class Work>
bool throws(Work work) {
    try {
        work();
    } catch (const Error& error) {
        require(*error.what() != 0, "an error has a message");
        return true;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "FAILED: an exception of another type: %s\n", error.what());
        std::abort();
    }
    return false;
}

// Values from an input; zeros when it is used up.
class Reader {
  public:
    Reader(const uint8_t* data, size_t size) : data_(data), left_(size) {}

    template <class T>
    T take() {
        T value{};
        const size_t count = sizeof value < left_ ? sizeof value : left_;
        if (count > 0) std::memcpy(&value, data_, count);
        data_ += count;
        left_ -= count;
        return value;
    }

    Bytes rest() const { return Bytes(data_, data_ + left_); }

  private:
    const uint8_t* data_;
    size_t left_;
};

}  // namespace fuzz
