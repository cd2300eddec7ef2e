// A parallel loop over tasks whose results do not depend on which thread runs them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace mlfr {

// Work is cut into chunks of this many blocks, never by the number of threads: sums over chunks, taken in the
// order of the chunks, and random streams numbered by chunk are the same for any number of threads.
constexpr uint64_t kChunk = uint64_t{1} << 18;

inline uint64_t num_chunks(uint64_t n) { return n / kChunk + (n % kChunk != 0); }

// Runs task(0) ... task(tasks - 1) on `threads` threads (0: as many as the machine has). Tasks start in
// ascending order, and after one has failed no further one starts; so the failure of the lowest number, which
// is rethrown, is always the same one.
template <class Task>
void parallel_for(uint64_t tasks, int threads, Task task) {
    uint64_t wanted =
        threads > 0 ? static_cast<uint64_t>(threads) : std::max(1u, std::thread::hardware_concurrency());
    wanted = std::min(wanted, tasks);
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex error_lock;
    std::exception_ptr error;
    uint64_t error_task = 0;
    auto work = [&] {
        while (!failed) {
            const uint64_t number = next++;
            if (number >= tasks) break;
            try {
                task(number);
            } catch (...) {
                std::lock_guard<std::mutex> guard(error_lock);
                if (!error || number < error_task) {
                    error = std::current_exception();
                    error_task = number;
                }
                failed = true;
            }
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(wanted);
    try {
        for (uint64_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // The system grants no more threads, so the existing ones do all the work.
    }
    work();
    for (auto& helper : helpers) helper.join();
    if (error) std::rethrow_exception(error);
}

// Runs task(chunk, first, last) for every chunk of [0, n). A task should count in local variables and store
// the results when it is done: the results of neighbouring chunks share cache lines, and two threads that
// write to the same line wait for each other at every write.
template <class Task>
void for_chunks(uint64_t n, int threads, Task task) {
    parallel_for(num_chunks(n), threads, [&](uint64_t chunk) {
        const uint64_t first = chunk * kChunk;
        task(chunk, first, first + std::min(kChunk, n - first));
    });
}

// Returns the results of make(first, last) for every chunk of [0, n), in order.
template <class Make>
auto map_chunks(uint64_t n, int threads, Make make) {
    std::vector<decltype(make(n, n))> results(num_chunks(n));
    for_chunks(n, threads,
               [&](uint64_t chunk, uint64_t first, uint64_t last) { results[chunk] = make(first, last); });
    return results;
}

// The number of items processed at a time in loops that become vector instructions. The intermediate results
// of a batch stay in the first-level cache.
constexpr uint64_t kBatch = 512;

// Sums by cluster are kept in this many tables, chosen in turn by the index of an item in its batch, so that
// no addition waits for the one before it to the same cluster.
constexpr uint64_t kTables = 4;

// Runs task(first, count) for every batch of [begin, end), in order.
template <class Task>
void for_batches(uint64_t begin, uint64_t end, Task task) {
    for (uint64_t first = begin; first < end; first += kBatch) task(first, std::min(kBatch, end - first));
}

}  // namespace mlfr
