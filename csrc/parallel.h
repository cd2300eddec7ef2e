// A parallel loop over tasks whose results do not depend on which thread runs them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mlfr {

// Work is cut into chunks of this many blocks, never by the number of threads: sums over chunks, taken in the order of
// the chunks, and random streams numbered by chunk are the same for any number of threads.
constexpr uint64_t kChunk = uint64_t{1} << 18;

inline uint64_t num_chunks(uint64_t n) { return (n + kChunk - 1) / kChunk; }

// Runs task(0) ... task(tasks - 1) on `threads` threads (0: as many as the machine has); rethrows the first exception.
template <class Task>
void parallel_for(uint64_t tasks, int threads, Task task) {
    uint64_t wanted = threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency());
    wanted = std::min(wanted, tasks);
    std::atomic<uint64_t> next{0};
    std::exception_ptr error;
    std::mutex error_lock;
    auto work = [&] {
        for (uint64_t number = next++; number < tasks; number = next++) {
            try {
                task(number);
            } catch (...) {
                std::lock_guard<std::mutex> guard(error_lock);
                if (!error) error = std::current_exception();
                next = tasks;
            }
        }
    };
    std::vector<std::thread> helpers;
    for (uint64_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
    if (error) std::rethrow_exception(error);
}

// Runs task(chunk, first, last) for every chunk of [0, n).
template <class Task>
void for_chunks(uint64_t n, int threads, Task task) {
    parallel_for(num_chunks(n), threads,
                 [&](uint64_t chunk) { task(chunk, chunk * kChunk, std::min(n, (chunk + 1) * kChunk)); });
}

}  // namespace mlfr
