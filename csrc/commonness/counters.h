// A large array of counters that begin at 0, in huge pages where the system has them: looked up at random,
// most of the time would go to the translation of addresses.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace mlfr {

class Counters {
  public:
    explicit Counters(uint64_t size) : bytes_(size * sizeof(uint32_t)) {
        void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(memory, bytes_, MADV_HUGEPAGE);  // advice: nothing is lost where it is not taken
#endif
        data_ = static_cast<uint32_t*>(memory);
    }
    ~Counters() { munmap(data_, bytes_); }
    Counters(const Counters&) = delete;
    Counters& operator=(const Counters&) = delete;

    uint32_t* data() { return data_; }
    const uint32_t* data() const { return data_; }

  private:
    uint64_t bytes_;
    uint32_t* data_;
};

}  // namespace mlfr
