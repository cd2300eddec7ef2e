// Files for targets whose code opens files.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "fuzz.h"

namespace fuzz {

// A file in memory, which can be opened by its path as any other.
class MemoryFile {
  public:
    MemoryFile() : descriptor_(memfd_create("fuzz", MFD_CLOEXEC)) {
        require(descriptor_ >= 0, "memfd_create");
        path_ = "/proc/self/fd/" + std::to_string(descriptor_);
    }

    ~MemoryFile() { close(descriptor_); }
    MemoryFile(const MemoryFile&) = delete;
    MemoryFile& operator=(const MemoryFile&) = delete;

    const std::string& path() const { return path_; }

    void resize(uint64_t size) {
        require(ftruncate(descriptor_, static_cast<off_t>(size)) == 0, "ftruncate");
    }

    void put(uint64_t at, const uint8_t* bytes, size_t count) {
        const ssize_t done = pwrite(descriptor_, bytes, count, static_cast<off_t>(at));
        require(done == static_cast<ssize_t>(count), "pwrite");
    }

  private:
    int descriptor_;
    std::string path_;
};

}  // namespace fuzz
