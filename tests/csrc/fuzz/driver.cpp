// Runs a fuzz target without libFuzzer: random inputs from a seed, the same ones on every machine.
//
//     TARGET EXECUTIONS SEED CRASH_FILE    an input that fails, or takes too long, is written to CRASH_FILE
//     TARGET INPUT_FILE                    runs one input again
#include <fcntl.h>
#include <sys/time.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "fuzz.h"

extern "C" const char* __asan_default_options() {
    return "abort_on_error=1:max_allocation_size_mb=64:quarantine_size_mb=8:malloc_context_size=2";
}
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace {

constexpr unsigned kCpuLimit = 30;  // seconds of all threads, for this many inputs: a busy machine adds none
constexpr unsigned kTimeLimit = 1200;  // seconds, for threads that wait for each other
constexpr uint64_t kAlarmEvery = 128;  // two system calls for so many inputs cost nothing

fuzz::Bytes& input = *new fuzz::Bytes;  // leaks that are found after main() abort, too
const char* crash_file = nullptr;

// Sanitizers and failed requirements abort. Only what is legal in a signal handler.
void save_input(int signal) {
    const int file = open(crash_file, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (file < 0 || write(file, input.data(), input.size()) < 0) _exit(3);
    constexpr char kHang[] = "FAILED: an input takes too long\n";
    if (signal != SIGABRT && write(STDERR_FILENO, kHang, sizeof kHang - 1) < 0) _exit(3);
    _exit(1);
}

int run_file(const char* path) {
    std::ifstream file(path, std::ios::binary);
    input.assign(std::istreambuf_iterator<char>(file), {});
    if (!file) return std::perror(path), 2;
    return LLVMFuzzerTestOneInput(input.data(), input.size());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2) return run_file(argv[1]);
    if (argc != 4) return std::fprintf(stderr, "arguments: EXECUTIONS SEED CRASH_FILE, or INPUT_FILE\n"), 2;
    const uint64_t executions = std::strtoull(argv[1], nullptr, 10),
                   seed = std::strtoull(argv[2], nullptr, 10);
    crash_file = argv[3];
    std::signal(SIGABRT, save_input);
    std::signal(SIGALRM, save_input);
    std::signal(SIGPROF, save_input);
    constexpr itimerval kCpu{{0, 0}, {kCpuLimit, 0}};
    const auto start = std::chrono::steady_clock::now();
    for (uint64_t i = 0; i < executions; ++i) {
        if (i % kAlarmEvery == 0) alarm(kTimeLimit), setitimer(ITIMER_PROF, &kCpu, nullptr);
        mlfr::Stream random(seed, i);
        input = fuzz::make_input(random);
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    std::printf("%llu executions, %.1f s, %.0f executions/s\n", static_cast<unsigned long long>(executions),
                taken.count(), static_cast<double>(executions) / taken.count());
}
