// Megatron's indexed dataset, version 1: the .idx file with its bounds checked, and the tokens of the .bin
// file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/file.h"

namespace mlfr {

// A checked .idx file. The memory does not grow with it. Layout, little-endian: magic "MMIDIDX\0\0", u64
// version 1, u8 type of a token, u64 sequences, u64 document entries; then i32 lengths [sequences], i64 byte
// positions [sequences], i64 first sequence of each document [entries], where the last entry is the number of
// sequences.
class IndexFile {
  public:
    // Throws std::invalid_argument, which names the file and the fault, unless the sequences lie in the .bin
    // file one after another without gaps.
    explicit IndexFile(const std::string& path);

    int dtype_code() const { return dtype_code_; }
    uint64_t item_size() const { return item_size_; }
    uint64_t num_sequences() const { return sequences_; }
    uint64_t num_documents() const { return entries_ - 1; }
    uint64_t num_tokens() const { return tokens_; }

    // Position of a document's first token; for num_documents(), the number of tokens.
    uint64_t token_offset(uint64_t document) const;
    // Lengths of the sequences [first, last), in tokens.
    std::vector<int32_t> sequence_lengths(uint64_t first, uint64_t last) const;

  private:
    [[noreturn]] void fail(const std::string& fault) const;
    void check_header();
    void check_sequences();
    void check_documents() const;

    File file_;
    int dtype_code_ = 0;
    uint64_t item_size_ = 0, sequences_ = 0, entries_ = 0, tokens_ = 0;
    uint64_t lengths_at_ = 0, positions_at_ = 0, documents_at_ = 0;
};

// The tokens of a .bin file.
class TokenFile {
  public:
    // Throws std::invalid_argument unless the file holds exactly `num_tokens` tokens of `item_size` bytes.
    TokenFile(const std::string& path, uint64_t item_size, uint64_t num_tokens);

    uint64_t item_size() const { return item_size_; }

    // Row r of out [rows, length] becomes the tokens from starts[r] on, as they are stored.
    void read(const int64_t* starts, uint64_t rows, uint64_t length, int threads, void* out) const;

  private:
    File file_;
    uint64_t item_size_, tokens_;
};

}  // namespace mlfr
