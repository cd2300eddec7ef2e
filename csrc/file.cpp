#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace mlfr {

File::File(const std::string& path) : path_(path) {
    // O_NONBLOCK: opening a pipe that nobody writes to must not hang.
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) throw std::system_error(errno, std::generic_category(), path);
    struct stat status;
    if (fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(descriptor_);
        throw std::invalid_argument(path + ": not a regular file");
    }
    size_ = static_cast<uint64_t>(status.st_size);
}

File::~File() { close(descriptor_); }

void File::read(uint64_t offset, void* out, uint64_t length) const {
    char* to = static_cast<char*>(out);
    while (length > 0) {
        const uint64_t piece = std::min<uint64_t>(length, 1u << 30);
        const ssize_t got = pread(descriptor_, to, piece, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw std::system_error(errno, std::generic_category(), path_);
        if (got == 0) throw std::system_error(EIO, std::generic_category(), path_ + ": ends early, was it cut off?");
        to += got;
        offset += static_cast<uint64_t>(got);
        length -= static_cast<uint64_t>(got);
    }
}

}  // namespace mlfr
