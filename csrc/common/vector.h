// Compiles loops for the vector instructions of the processor. The results have the same bits with any of
// them, since the loops consist of single IEEE operations, which no option fuses.
#pragma once

#include <utility>

namespace mlfr {

#if defined(__x86_64__) && !defined(MLFR_NO_AVX2)

template <class Loop>
__attribute__((target("avx2"), flatten)) void run_with_avx2(Loop&& loop) {
    loop();
}

// Runs a loop, compiled for AVX2 where the processor has it; functions that are not inlined are not.
template <class Loop>
void run_vectorised(Loop&& loop) {
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx2) {
        run_with_avx2(std::forward<Loop>(loop));
    } else {
        loop();
    }
}

#else

template <class Loop>
void run_vectorised(Loop&& loop) {
    loop();
}

#endif

}  // namespace mlfr
