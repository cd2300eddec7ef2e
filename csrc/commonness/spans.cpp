#include "commonness/spans.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/parallel.h"

namespace mlfr {
namespace {

template <class T>
void widen(const char* bytes, uint64_t n, uint32_t* out) {
    const T* in = reinterpret_cast<const T*>(bytes);
    bool outside = false;
    for (uint64_t i = 0; i < n; ++i) {
        out[i] = static_cast<uint32_t>(in[i]);
        if constexpr (std::is_signed_v<T>) {
            outside |= in[i] < 0 || (sizeof(T) > 4 && static_cast<int64_t>(in[i]) > INT64_C(0xFFFFFFFF));
        }
    }
    if (outside) throw std::invalid_argument("the corpus holds a negative token id, or one above 2^32 - 1");
}

// By Megatron's code of the type.
struct Type {
    uint64_t size;
    void (*widen)(const char*, uint64_t, uint32_t*);
};

Type type_of(int code) {
    switch (code) {
        case 1:
            return {1, widen<uint8_t>};
        case 2:
            return {1, widen<int8_t>};
        case 3:
            return {2, widen<int16_t>};
        case 4:
            return {4, widen<int32_t>};
        case 5:
            return {8, widen<int64_t>};
        case 8:
            return {2, widen<uint16_t>};
        default:
            throw std::invalid_argument("dtype_code: " + std::to_string(code) + " is no integer type");
    }
}

}  // namespace

SpanReader::SpanReader(const TokenFile& file, int dtype_code) : file_(file), dtype_code_(dtype_code) {
    if (type_of(dtype_code).size != file.item_size()) {
        throw std::invalid_argument("dtype_code: its size is not that of the file's tokens");
    }
}

void SpanReader::read(int64_t start, uint64_t length, uint32_t* out) const {
    if (length == 0) return;
    thread_local std::vector<uint64_t> stored;  // of this type, so that any token is aligned
    stored.resize((length * file_.item_size() + 7) / 8);
    char* bytes = reinterpret_cast<char*>(stored.data());
    file_.read(&start, 1, length, 1, bytes);
    type_of(dtype_code_).widen(bytes, length, out);
}

uint32_t largest_token(const SpanReader& reader, const Spans& spans, int threads) {
    std::vector<uint32_t> largest(spans.n);
    parallel_for(spans.n, threads, [&](uint64_t i) {
        uint32_t most = 0;
        reader.for_pieces(spans.starts[i], spans.lengths[i], [&](const uint32_t* tokens, uint64_t count) {
            for (uint64_t j = 0; j < count; ++j) most = std::max(most, tokens[j]);
        });
        largest[i] = most;
    });
    return spans.n == 0 ? 0 : *std::max_element(largest.begin(), largest.end());
}

}  // namespace mlfr
