#include "bus_error.h"

#include <atomic>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <mutex>

namespace mlfr {

namespace {

// Where this thread goes on after a bus error. The model makes it readable in a signal handler.
__attribute__((tls_model("initial-exec"))) thread_local sigjmp_buf* landing = nullptr;

struct sigaction previous;

void on_bus_error(int signal, siginfo_t* info, void* context) {
    if (landing != nullptr) siglongjmp(*landing, 1);
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        sigaction(SIGBUS, &previous, nullptr);  // the instruction runs again, and ends the process
    } else {
        previous.sa_handler(signal);
    }
}

}  // namespace

void handle_bus_errors() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action{};
        action.sa_sigaction = on_bus_error;
        // NODEFER: a jump out of the handler must not leave the signal blocked.
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &previous);
    });
}

bool copy_mapped(void* to, const void* from, uint64_t length) {
    sigjmp_buf here;
    if (sigsetjmp(here, 0) != 0) {
        landing = nullptr;
        return false;
    }
    landing = &here;
    // The copy must happen between the two assignments.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    std::memcpy(to, from, length);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    landing = nullptr;
    return true;
}

}  // namespace mlfr
