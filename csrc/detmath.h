// exp and log from basic IEEE operations: the same bits on every machine, which libm does not promise. Compiled with
// -ffp-contract=off, so that no product and sum are fused.
#pragma once

#include <cstdint>
#include <cstring>

namespace mlfr {

constexpr double kLn2High = 0x1.62e42fefa3800p-1;  // 42 bits of ln 2: products with small integers are exact
constexpr double kLn2Low = 0x1.ef35793c76730p-45;

// e^x for |x| <= 700, relative error below 1e-15: x = k ln 2 + r, |r| <= ln 2 / 2, Taylor series of e^r.
inline double det_exp(double x) {
    if (x < -700.0) return 0.0;
    if (x > 700.0) x = 700.0;
    const double scaled = x * 0x1.71547652b82fep+0;
    const int64_t k = static_cast<int64_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    const double kd = static_cast<double>(k);
    const double r = (x - kd * kLn2High) - kd * kLn2Low;
    double sum = 1.0;
    for (int term = 14; term >= 1; --term) sum = 1.0 + sum * r * (1.0 / term);
    const uint64_t bits = static_cast<uint64_t>(k + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

// ln x for normal x > 0, relative error below 1e-14: x = 2^k m, sqrt(1/2) <= m < sqrt(2),
// ln m = 2 atanh(s), s = (m - 1) / (m + 1).
inline double det_log(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int64_t k = static_cast<int64_t>(bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    double m;
    std::memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        k += 1;
    }
    const double s = (m - 1.0) / (m + 1.0);
    const double s2 = s * s;
    double sum = 0.0;
    for (int term = 23; term >= 1; term -= 2) sum = sum * s2 + 1.0 / term;
    return static_cast<double>(k) * kLn2High + (static_cast<double>(k) * kLn2Low + 2.0 * s * sum);
}

}  // namespace mlfr
