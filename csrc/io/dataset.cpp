#include "io/dataset.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/parallel.h"

namespace mlfr {

namespace {

constexpr uint64_t kHeaderBytes = 34;
constexpr uint64_t kEntriesAtATime = uint64_t{1} << 14;  // how many entries are read at a time

// Bytes of a token by Megatron's type code; 0: unknown. The floating-point types 6 and 7 cannot be token ids.
uint64_t bytes_of(int dtype_code) {
    switch (dtype_code) {
        case 1:  // uint8
        case 2:  // int8
            return 1;
        case 3:  // int16
        case 8:  // uint16
            return 2;
        case 4:  // int32
            return 4;
        case 5:  // int64
            return 8;
        default:
            return 0;
    }
}

}  // namespace

IndexFile::IndexFile(const std::string& path) : file_(path) {
    check_header();
    check_sequences();
    check_documents();
}

void IndexFile::fail(const std::string& fault) const {
    throw std::invalid_argument(file_.path() + ": " + fault);
}

void IndexFile::check_header() {
    if (file_.size() < kHeaderBytes) fail("too short for the header of an .idx file");
    char header[kHeaderBytes];
    file_.read(0, header, kHeaderBytes);
    if (std::memcmp(header, "MMIDIDX\0\0", 9) != 0) fail("not a Megatron .idx file (wrong magic)");
    uint64_t version;
    std::memcpy(&version, header + 9, 8);
    if (version != 1) fail("version " + std::to_string(version) + ", only 1 is known");
    dtype_code_ = static_cast<unsigned char>(header[17]);
    item_size_ = bytes_of(dtype_code_);
    if (item_size_ == 0) {
        fail("token type code " + std::to_string(dtype_code_) +
             "; legal are 1 to 5 (u8 i8 i16 i32 i64) and 8 (u16)");
    }
    std::memcpy(&sequences_, header + 18, 8);
    std::memcpy(&entries_, header + 26, 8);
    const uint64_t payload = file_.size() - kHeaderBytes;
    // Divisions first, so that false counts do not overflow a product.
    if (sequences_ > payload / 12 || entries_ > (payload - 12 * sequences_) / 8 ||
        12 * sequences_ + 8 * entries_ != payload) {
        fail("holds " + std::to_string(file_.size()) + " bytes, which do not fit its counts of " +
             std::to_string(sequences_) + " sequences and " + std::to_string(entries_) + " document entries");
    }
    if (entries_ == 0) fail("no document entry; the list must begin with 0");
    lengths_at_ = kHeaderBytes;
    positions_at_ = lengths_at_ + 4 * sequences_;
    documents_at_ = positions_at_ + 8 * sequences_;
}

void IndexFile::check_sequences() {
    std::vector<int32_t> lengths(std::min(kEntriesAtATime, sequences_));
    std::vector<int64_t> positions(lengths.size());
    for (uint64_t first = 0; first < sequences_; first += kEntriesAtATime) {
        const uint64_t count = std::min(kEntriesAtATime, sequences_ - first);
        file_.read(lengths_at_ + 4 * first, lengths.data(), 4 * count);
        file_.read(positions_at_ + 8 * first, positions.data(), 8 * count);
        for (uint64_t i = 0; i < count; ++i) {
            if (lengths[i] < 0) fail("sequence " + std::to_string(first + i) + " has a negative length");
            // tokens_ stays below 2^31 x sequences_, and sequences_ below file size / 12: no overflow.
            if (positions[i] < 0 || static_cast<uint64_t>(positions[i]) != tokens_ * item_size_) {
                fail("sequence " + std::to_string(first + i) + " lies at byte " +
                     std::to_string(positions[i]) + ", its predecessors end at " +
                     std::to_string(tokens_ * item_size_) + "; sequences must lie one after another");
            }
            tokens_ += static_cast<uint64_t>(lengths[i]);
            // The product with the item size must stay below 2^63, as a file's size does.
            if (tokens_ > (uint64_t{1} << 59)) fail("more tokens than a file can hold");
        }
    }
}

void IndexFile::check_documents() const {
    std::vector<int64_t> entries(std::min(kEntriesAtATime, entries_));
    int64_t previous = 0;
    for (uint64_t first = 0; first < entries_; first += kEntriesAtATime) {
        const uint64_t count = std::min(kEntriesAtATime, entries_ - first);
        file_.read(documents_at_ + 8 * first, entries.data(), 8 * count);
        for (uint64_t i = 0; i < count; ++i) {
            if (entries[i] < previous || (first + i == 0 && entries[i] != 0)) {
                fail("document entry " + std::to_string(first + i) + " is " + std::to_string(entries[i]) +
                     "; entries must begin with 0 and never fall");
            }
            previous = entries[i];
        }
    }
    if (static_cast<uint64_t>(previous) != sequences_) {
        fail("the last document entry is " + std::to_string(previous) + ", not the number of sequences " +
             std::to_string(sequences_));
    }
}

uint64_t IndexFile::token_offset(uint64_t document) const {
    if (document >= entries_) {
        throw std::out_of_range(file_.path() + ": document " + std::to_string(document) + " of " +
                                std::to_string(num_documents()));
    }
    int64_t sequence;
    file_.read(documents_at_ + 8 * document, &sequence, 8);
    if (sequence < 0 || static_cast<uint64_t>(sequence) > sequences_) fail("changed while it was in use");
    if (static_cast<uint64_t>(sequence) == sequences_) return tokens_;
    int64_t position;
    file_.read(positions_at_ + 8 * static_cast<uint64_t>(sequence), &position, 8);
    if (position < 0 || static_cast<uint64_t>(position) > tokens_ * item_size_)
        fail("changed while it was in use");
    return static_cast<uint64_t>(position) / item_size_;
}

std::vector<int32_t> IndexFile::sequence_lengths(uint64_t first, uint64_t last) const {
    if (first > last || last > sequences_) {
        throw std::out_of_range(file_.path() + ": sequences " + std::to_string(first) + " to " +
                                std::to_string(last) + " of " + std::to_string(sequences_));
    }
    std::vector<int32_t> lengths(last - first);
    file_.read(lengths_at_ + 4 * first, lengths.data(), 4 * lengths.size());
    return lengths;
}

TokenFile::TokenFile(const std::string& path, uint64_t item_size, uint64_t num_tokens)
    : file_(path), item_size_(item_size), tokens_(num_tokens) {
    if (item_size == 0 || num_tokens > UINT64_MAX / item_size || file_.size() != num_tokens * item_size) {
        throw std::invalid_argument(path + ": holds " + std::to_string(file_.size()) +
                                    " bytes, but the .idx file says " + std::to_string(num_tokens) +
                                    " tokens of " + std::to_string(item_size) +
                                    " bytes; truncated, or from another corpus?");
    }
}

void TokenFile::read(const int64_t* starts, uint64_t rows, uint64_t length, int threads, void* out) const {
    if (length > tokens_) throw std::out_of_range(file_.path() + ": a row is longer than the file");
    for (uint64_t row = 0; row < rows; ++row) {
        if (starts[row] < 0 || static_cast<uint64_t>(starts[row]) > tokens_ - length) {
            throw std::out_of_range(file_.path() + ": tokens " + std::to_string(starts[row]) + " to " +
                                    std::to_string(starts[row]) + " + " + std::to_string(length) + " of " +
                                    std::to_string(tokens_));
        }
    }
    constexpr uint64_t kRows = 8;
    const uint64_t bytes = length * item_size_;
    const auto file = file_.open();
    parallel_for((rows + kRows - 1) / kRows, threads, [&](uint64_t task) {
        for (uint64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
            file->read(static_cast<uint64_t>(starts[row]) * item_size_, static_cast<char*>(out) + row * bytes,
                       bytes);
        }
    });
}

}  // namespace mlfr
