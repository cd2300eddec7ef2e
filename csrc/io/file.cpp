#include "io/file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace mlfr {

namespace {

std::atomic<uint64_t> files_kept{0};

uint64_t most_kept() {
    rlimit limit;
    return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur / 4 : 0;
}

[[noreturn]] void fail(const std::string& path) { throw FileError(errno, std::strerror(errno), path); }

[[noreturn]] void fail_short(const std::string& path) {
    throw FileError(EIO, "The file ends early: it was cut off while in use", path);
}

struct stat status_of(const OpenFile& file, const std::string& path) {
    struct stat status;
    if (fstat(file.descriptor(), &status) != 0) fail(path);
    return status;
}

}  // namespace

OpenFile::OpenFile(const std::string& path)
    // O_NONBLOCK, so that opening a pipe without a writer does not hang.
    : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (descriptor_ < 0) fail(path);
}

OpenFile::~OpenFile() { close(descriptor_); }

void OpenFile::read(uint64_t offset, void* out, uint64_t length) const {
    char* to = static_cast<char*>(out);
    while (length > 0) {
        const uint64_t part = std::min<uint64_t>(length, 1u << 30);
        const ssize_t got = pread(descriptor_, to, part, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail(path_);
        if (got == 0) fail_short(path_);
        to += got;
        offset += static_cast<uint64_t>(got);
        length -= static_cast<uint64_t>(got);
    }
}

File::File(const std::string& path) : path_(path) {
    // The system would ignore all after the NUL, and open another file.
    if (path.find('\0') != std::string::npos) throw std::invalid_argument("a file name with a NUL character");
    auto file = std::make_shared<const OpenFile>(path);
    const struct stat status = status_of(*file, path);
    if (!S_ISREG(status.st_mode)) throw std::invalid_argument(path + ": not a regular file");
    size_ = static_cast<uint64_t>(status.st_size);
    device_ = status.st_dev;
    inode_ = status.st_ino;
    if (files_kept.fetch_add(1) < most_kept()) {
        kept_ = std::move(file);
    } else {
        files_kept.fetch_sub(1);
    }
}

File::~File() {
    if (kept_) files_kept.fetch_sub(1);
}

std::shared_ptr<const OpenFile> File::open() const {
    auto file = kept_ ? kept_ : std::make_shared<const OpenFile>(path_);
    const struct stat status = status_of(*file, path_);
    if (status.st_dev != device_ || status.st_ino != inode_) {
        throw FileError(ESTALE, "The file was replaced by another one while in use", path_);
    }
    if (static_cast<uint64_t>(status.st_size) < size_) fail_short(path_);
    return file;
}

}  // namespace mlfr
