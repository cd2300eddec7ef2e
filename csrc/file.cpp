#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "bus_error.h"

namespace mlfr {

namespace {

// An open file.
class Descriptor {
  public:
    explicit Descriptor(const std::string& path)
        // O_NONBLOCK: opening a pipe that nobody writes to must not hang.
        : number_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        if (number_ < 0) throw FileError(errno, std::strerror(errno), path);
    }
    ~Descriptor() { close(number_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    int number() const { return number_; }

  private:
    int number_;
};

[[noreturn]] void fail_short(const std::string& path) {
    throw FileError(EIO, "The file ends early: it was cut off while in use, or its disk failed", path);
}

}  // namespace

File::File(const std::string& path) : path_(path) {
    // The system would open the file that is named before it.
    if (path.find('\0') != std::string::npos) throw std::invalid_argument("a file name with a NUL character");
    const Descriptor descriptor(path);
    struct stat status;
    if (fstat(descriptor.number(), &status) != 0) throw FileError(errno, std::strerror(errno), path);
    if (!S_ISREG(status.st_mode)) throw std::invalid_argument(path + ": not a regular file");
    size_ = static_cast<uint64_t>(status.st_size);
    device_ = status.st_dev;
    inode_ = status.st_ino;
    if (size_ == 0) return;
    handle_bus_errors();
    void* const map = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor.number(), 0);
    if (map != MAP_FAILED) map_ = static_cast<const char*>(map);
}

File::~File() {
    if (map_ != nullptr) munmap(const_cast<char*>(map_), size_);
}

void File::read(uint64_t offset, void* out, uint64_t length) const {
    if (length > size_ || offset > size_ - length) fail_short(path_);
    if (length == 0) return;
    if (map_ == nullptr) return read_opened(offset, static_cast<char*>(out), length);
    if (!copy_mapped(out, map_ + offset, length)) fail_short(path_);
}

void File::read_opened(uint64_t offset, char* to, uint64_t length) const {
    const Descriptor descriptor(path_);
    struct stat status;
    if (fstat(descriptor.number(), &status) != 0) throw FileError(errno, std::strerror(errno), path_);
    if (status.st_dev != device_ || status.st_ino != inode_) {
        throw FileError(ESTALE, "The file was replaced by another one while in use", path_);
    }
    while (length > 0) {
        const uint64_t piece = std::min<uint64_t>(length, 1u << 30);
        const ssize_t got = pread(descriptor.number(), to, piece, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw FileError(errno, std::strerror(errno), path_);
        if (got == 0) fail_short(path_);
        to += got;
        offset += static_cast<uint64_t>(got);
        length -= static_cast<uint64_t>(got);
    }
}

void File::forget() const {
    if (map_ != nullptr) madvise(const_cast<char*>(map_), size_, MADV_DONTNEED);
}

void File::check_size() const {
    struct stat status;
    if (stat(path_.c_str(), &status) != 0) return;  // removed: what is mapped remains
    const bool same = status.st_dev == device_ && status.st_ino == inode_;
    if (same && static_cast<uint64_t>(status.st_size) < size_) fail_short(path_);
}

}  // namespace mlfr
