// Reading a regular file at given positions. pread, not mmap: a file that shrinks meanwhile gives an error, not SIGBUS.
#pragma once

#include <cstdint>
#include <string>

namespace mlfr {

class File {
  public:
    // Throws std::system_error where the file cannot be opened, std::invalid_argument where it is not a regular file.
    explicit File(const std::string& path);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size() const { return size_; }

    // Fills `out` with `length` bytes from `offset` on; throws std::system_error where they are not there.
    void read(uint64_t offset, void* out, uint64_t length) const;

  private:
    std::string path_;
    int descriptor_ = -1;
    uint64_t size_ = 0;
};

}  // namespace mlfr
