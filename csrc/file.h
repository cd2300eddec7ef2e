// Reading a regular file at given positions, through a map of it: at a hundred thousand small reads a second,
// system calls would be what takes the time.
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

// Holds no descriptor, as a corpus may have more files than a process may open. Where the system grants no
// map (their number and their sizes may be limited, too), the file is opened anew for every read.
class File {
  public:
    // Throws FileError where the file cannot be opened, std::invalid_argument where it is not a regular file.
    explicit File(const std::string& path);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size() const { return size_; }

    // Fills `out` with `length` bytes from `offset` on. Throws FileError where they are not there any more,
    // and where the disk fails.
    void read(uint64_t offset, void* out, uint64_t length) const;

    // What was read will not be read again soon: it need not count as this process's memory.
    void forget() const;

    // Throws FileError where the file has become shorter: the rest of its last page reads as zeros.
    void check_size() const;

  private:
    void read_opened(uint64_t offset, char* to, uint64_t length) const;

    std::string path_;
    uint64_t size_ = 0, device_ = 0, inode_ = 0;
    const char* map_ = nullptr;
};

}  // namespace mlfr
