// Reading a regular file at given positions, by pread.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace mlfr {

// The system failed to open or read a file; becomes an OSError in Python.
struct FileError : std::runtime_error {
    FileError(int error_number, const std::string& message, const std::string& file_path)
        : std::runtime_error(message), number(error_number), path(file_path) {}

    int number;  // errno
    std::string path;
};

// An open file. Threads may share it, since every read gives its own offset.
class OpenFile {
  public:
    // Throws FileError where the file cannot be opened.
    explicit OpenFile(const std::string& path);
    ~OpenFile();
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;

    int descriptor() const { return descriptor_; }

    // Fills `out` with `length` bytes from `offset` on. Throws FileError where the file ends before them, and
    // where the disk fails.
    void read(uint64_t offset, void* out, uint64_t length) const;

  private:
    std::string path_;
    int descriptor_;
};

// A file that is read many times. A corpus may have more files than a process may open, so up to a quarter of
// that number stay open, and all others are opened for each read.
class File {
  public:
    // Throws FileError where the file cannot be opened, std::invalid_argument where it is not a regular file.
    explicit File(const std::string& path);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size() const { return size_; }

    // Returns the file, open for the reads of one call. Throws FileError where it has become shorter, cannot
    // be opened again, or has been replaced by another file.
    std::shared_ptr<const OpenFile> open() const;

    void read(uint64_t offset, void* out, uint64_t length) const { open()->read(offset, out, length); }

  private:
    std::string path_;
    uint64_t size_ = 0, device_ = 0, inode_ = 0;
    std::shared_ptr<const OpenFile> kept_;
};

}  // namespace mlfr
