// Fuzz target of csrc/dataset.cpp: IndexFile takes exactly the files that a second reader takes and says the
// same of them, TokenFile reads the bytes of the .bin file or refuses, and files that change while they are
// open do no harm.
#include "dataset_target.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "index_oracle.h"
#include "io/dataset.h"
#include "memory_file.h"

namespace {

using fuzz::Bytes;
using fuzz::Control;
using fuzz::MemoryFile;
using fuzz::require;
using fuzz::throws;
using mlfr::FileError;
using mlfr::IndexFile;
using mlfr::TokenFile;

constexpr uint64_t kPattern = 4096;  // first bytes of a .bin file; all others are 0

const Bytes& pattern() {
    static const Bytes bytes = [] {
        Bytes made(kPattern);
        for (uint64_t i = 0; i < kPattern; ++i) made[i] = static_cast<uint8_t>(mlfr::mix(i));
        return made;
    }();
    return bytes;
}

// Whether these are the bytes of a token of the .bin file.
bool is_token(const char* at, uint64_t number, uint64_t size) {
    for (uint64_t i = 0; i < size; ++i) {
        const uint64_t place = number * size + i;
        const uint8_t expected = place < kPattern ? pattern()[place] : 0;
        if (static_cast<uint8_t>(at[i]) != expected) return false;
    }
    return true;
}

// Reads the same as the other reader; refuses what lies outside.
void check_index(const IndexFile& index, const fuzz::Index& expected, uint64_t ask) {
    const uint64_t sequences = expected.lengths.size(), documents = expected.offsets.size() - 1;
    require(static_cast<unsigned>(index.dtype_code()) == expected.code, "dtype_code");
    require(index.item_size() == fuzz::item_bytes(expected.code), "item_size");
    require(index.num_sequences() == sequences, "num_sequences");
    require(index.num_documents() == documents, "num_documents");
    require(index.num_tokens() == expected.tokens, "num_tokens is the sum of the lengths");
    const std::vector<int32_t> lengths = index.sequence_lengths(0, sequences);
    require(std::equal(lengths.begin(), lengths.end(), expected.lengths.begin(), expected.lengths.end()),
            "lengths");
    for (uint64_t d = 0; d <= std::min<uint64_t>(documents, 4); ++d) {
        require(index.token_offset(d) == expected.offsets[d], "token_offset");
    }
    require(index.token_offset(documents) == expected.tokens, "token_offset of the end");
    const bool outside = throws<std::out_of_range>([&] { index.token_offset(ask); });
    require(outside == (ask > documents), "documents outside are refused, no others");
    const uint64_t first = ask % 2 == 0 ? ask : 0, last = ask % 2 == 0 ? sequences : ask;
    const bool refused = throws<std::out_of_range>([&] { index.sequence_lengths(first, last); });
    require(refused == (first > last || last > sequences), "sequences outside are refused, no others");
}

uint64_t size_of_bin(const Control& control, uint64_t bytes) {
    if (control.bin == 0) return std::max<int64_t>(0, static_cast<int64_t>(bytes) + control.bin_delta);
    return control.bin == 1 ? control.start >> 2 : bytes;
}

constexpr char kUntouched = 0x5A;

// Rows that lie in the file, all but perhaps the last one.
void check_rows(const TokenFile& tokens, const fuzz::Index& expected, const Control& control, bool may_fail) {
    const uint64_t length = control.row_length % 4096, rows = control.rows % 8;
    const uint64_t bytes = fuzz::item_bytes(expected.code);
    std::vector<int64_t> starts(rows);
    std::vector<char> out(rows * length * bytes, kUntouched);
    for (uint64_t r = 0; r < rows; ++r) {
        const bool fits = length <= expected.tokens && r + 1 < rows;
        const uint64_t good =
            fits ? mlfr::mix(control.start + r) % (expected.tokens - length + 1) : control.start;
        starts[r] = static_cast<int64_t>(good);
    }
    const bool inside = length <= expected.tokens && (rows == 0 || control.start <= expected.tokens - length);
    bool read_all = false;
    auto read_or_fail = [&] {
        try {
            tokens.read(starts.data(), rows, length, 1, out.data());
            read_all = true;
        } catch (const FileError&) {
            require(may_fail, "a file that is whole can be read");
        }
    };
    require(throws<std::out_of_range>(read_or_fail) == !inside, "rows outside are refused, no others");
    for (uint64_t i = 0; i < rows * length; ++i) {
        const uint64_t place = static_cast<uint64_t>(starts[i / length]) + i % length;
        const char* at = &out[i * bytes];
        const bool untouched = std::all_of(at, at + bytes, [](char byte) { return byte == kUntouched; });
        const bool right = read_all ? is_token(at, place, bytes) : may_fail || untouched;
        require(right, "tokens are those of the .bin file, and none is written after an error");
    }
}

// A file that changes while it is open: errors are right, and numbers that lie within the .bin file.
void check_changed_index(const IndexFile& index, const fuzz::Index& expected, bool cut) {
    for (uint64_t d = 0; d < std::min<size_t>(expected.offsets.size(), 4); ++d) {
        try {
            const uint64_t offset = index.token_offset(d);
            require(cut ? offset == expected.offsets[d] : offset <= expected.tokens,
                    "token_offset after a change");
        } catch (const FileError&) {
            require(cut, "the file ends early only where it was cut");
        } catch (const std::invalid_argument&) {
            require(!cut, "what is left of a cut file is right");
        }
    }
    try {
        const std::vector<int32_t> lengths = index.sequence_lengths(0, index.num_sequences());
        require(lengths.size() == expected.lengths.size(), "number of lengths after a change");
    } catch (const FileError&) {
        require(cut, "the file ends early only where it was cut");
    }
}

void forbid_leaks_of_files() {
    constexpr rlimit kFew = {64, 64};  // a descriptor that stays open makes some later input fail
    require(setrlimit(RLIMIT_NOFILE, &kFew) == 0, "setrlimit");
}

void run(const Control& control, const Bytes& file) {
    static MemoryFile idx, bin;
    idx.resize(file.size());
    idx.put(0, file.data(), file.size());
    const std::optional<fuzz::Index> expected = fuzz::parse_index(file);
    std::optional<IndexFile> index;
    require(throws<std::invalid_argument>([&] { index.emplace(idx.path()); }) == !expected,
            "IndexFile takes what the other reader takes");
    if (!expected) return;
    check_index(*index, *expected, control.ask);

    const uint64_t bytes = expected->tokens * index->item_size(), size = size_of_bin(control, bytes);
    bin.resize(size);
    bin.put(0, pattern().data(), std::min(size, kPattern));
    std::optional<TokenFile> tokens;
    auto open_tokens = [&] { tokens.emplace(bin.path(), index->item_size(), index->num_tokens()); };
    require(throws<std::invalid_argument>(open_tokens) == (size != bytes),
            "TokenFile takes files of the right size");
    if (tokens) check_rows(*tokens, *expected, control, false);

    if (control.later == 0) idx.resize(control.later_at % file.size());
    if (control.later == 1) {
        const uint64_t at = control.later_at % file.size();
        const uint8_t other = static_cast<uint8_t>(file[at] ^ (control.ask | 1));
        idx.put(at, &other, 1);
    }
    if (control.later < 2) check_changed_index(*index, *expected, control.later == 0);
    if (tokens && control.later == 2) {
        bin.resize(control.later_at % (size + 1));
        check_rows(*tokens, *expected, control, true);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const bool once = (forbid_leaks_of_files(), true);
    (void)once;
    fuzz::Reader reader(data, size);
    const auto control = reader.take<Control>();
    run(control, reader.rest());
    return 0;
}
