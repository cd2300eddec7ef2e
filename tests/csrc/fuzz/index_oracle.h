// A second reader of .idx files, for comparison: the whole file in memory, sums in 128 bits, no shortcuts.
#pragma once

#include <optional>
#include <vector>

#include "fuzz.h"

namespace fuzz {

constexpr size_t kHeaderBytes = 34, kCodeAt = 17, kSequencesAt = 18, kEntriesAt = 26;

// Bytes of a token by its type code; 0 where a code is not a legal one.
inline unsigned item_bytes(unsigned code) {
    constexpr unsigned kBytes[] = {0, 1, 1, 2, 4, 8, 0, 0, 2};
    return code < sizeof kBytes / sizeof *kBytes ? kBytes[code] : 0;
}

// Unsigned little-endian integer of `count` bytes.
inline uint64_t little_endian(const uint8_t* bytes, size_t count) {
    uint64_t value = 0;
    for (size_t i = count; i > 0; --i) value = value << 8 | bytes[i - 1];
    return value;
}

struct Index {
    unsigned code;
    std::vector<int64_t> lengths;
    std::vector<uint64_t> offsets;  // tokens before each document, and before the end
    uint64_t tokens;
};

// What a file says, or nothing where it must be refused.
inline std::optional<Index> parse_index(const Bytes& file) {
    using Wide = unsigned __int128;
    static const uint8_t kMagic[17] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0, 1};  // and version 1
    if (file.size() < kHeaderBytes || std::memcmp(file.data(), kMagic, sizeof kMagic) != 0) return {};
    Index index{file[kCodeAt], {}, {}, 0};
    const Wide item = item_bytes(index.code);
    const uint64_t sequences = little_endian(&file[kSequencesAt], 8),
                   entries = little_endian(&file[kEntriesAt], 8);
    if (item == 0 || entries == 0) return {};
    if (kHeaderBytes + Wide{12} * sequences + Wide{8} * entries != file.size()) return {};
    Wide tokens = 0;
    std::vector<uint64_t> before{0};
    for (uint64_t s = 0; s < sequences; ++s) {
        const auto length = static_cast<int32_t>(little_endian(&file[kHeaderBytes + 4 * s], 4));
        const uint64_t position = little_endian(&file[kHeaderBytes + 4 * sequences + 8 * s], 8);
        if (length < 0 || position != tokens * item) return {};
        tokens += static_cast<Wide>(length);
        index.lengths.push_back(length);
        before.push_back(static_cast<uint64_t>(tokens));
    }
    uint64_t previous = 0;
    for (uint64_t e = 0; e < entries; ++e) {
        const uint64_t entry = little_endian(&file[kHeaderBytes + 12 * sequences + 8 * e], 8);
        if (entry < previous || entry > sequences || (e == 0 && entry != 0)) return {};
        previous = entry;
        index.offsets.push_back(before[entry]);
    }
    if (previous != sequences) return {};
    index.tokens = static_cast<uint64_t>(tokens);
    return index;
}

}  // namespace fuzz
