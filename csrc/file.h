// Reading a regular file at given positions. pread, not mmap: a file that shrinks meanwhile gives an error,
// not SIGBUS.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mlfr {

// The system refused to open or read a file: an OSError in Python.
struct FileError : std::runtime_error {
    FileError(int error_number, const std::string& message, const std::string& file_path)
        : std::runtime_error(message), number(error_number), path(file_path) {}

    int number;  // errno
    std::string path;
};

class File {
  public:
    // Throws FileError where the file cannot be opened, std::invalid_argument where it is not a regular file.
    explicit File(const std::string& path);
    ~File();
    File(File&& other) noexcept;
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size() const { return size_; }

    // Fills `out` with `length` bytes from `offset` on; throws FileError where they are not there.
    void read(uint64_t offset, void* out, uint64_t length) const;

  private:
    std::string path_;
    int descriptor_ = -1;
    uint64_t size_ = 0;
};

}  // namespace mlfr
