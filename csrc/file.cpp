#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace mlfr {

File::File(const std::string& path) : path_(path) {
    // The system would open the file that is named before it.
    if (path.find('\0') != std::string::npos) throw std::invalid_argument("a file name with a NUL character");
    // O_NONBLOCK: opening a pipe that nobody writes to must not hang.
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) throw FileError(errno, std::strerror(errno), path);
    struct stat status;
    const bool regular = fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
    if (!regular) {
        close(descriptor_);
        throw std::invalid_argument(path + ": not a regular file");
    }
    size_ = static_cast<uint64_t>(status.st_size);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)), size_(other.size_) {}

File::~File() {
    if (descriptor_ >= 0) close(descriptor_);
}

void File::read(uint64_t offset, void* out, uint64_t length) const {
    char* to = static_cast<char*>(out);
    while (length > 0) {
        const uint64_t piece = std::min<uint64_t>(length, 1u << 30);
        const ssize_t got = pread(descriptor_, to, piece, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw FileError(errno, std::strerror(errno), path_);
        if (got == 0) throw FileError(EIO, "The file ends early: it was cut off while in use", path_);
        to += got;
        offset += static_cast<uint64_t>(got);
        length -= static_cast<uint64_t>(got);
    }
}

}  // namespace mlfr
