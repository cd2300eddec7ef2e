// exp, log and the rounding of shares from basic IEEE operations: the same bits on every machine, which libm
// does not promise. Compiled with -ffp-contract=off, so that no product and sum are fused.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace mlfr {

constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kLn2High = 0x1.62e42fee00000p-1;  // 32 bits of ln 2: exact times integers below 2^21
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;

constexpr int kExpBits = 9;
constexpr int kExpSteps = 1 << kExpBits;  // steps per octave of the table of powers of 2

constexpr std::array<double, kExpSteps> make_exp_table() {
    std::array<double, kExpSteps> table{};
    for (int j = 0; j < kExpSteps; ++j) {
        const double x = kLn2 * j / kExpSteps;
        double sum = 1.0;
        for (int term = 20; term >= 1; --term) sum = 1.0 + sum * x / term;  // Taylor series in Horner's form
        table[static_cast<size_t>(j)] = sum;
    }
    return table;
}

inline constexpr std::array<double, kExpSteps> kExpTable = make_exp_table();

// e^x for |x| <= 700, relative error below 1e-15. x = (512 k + j) ln 2 / 512 + r with |r| <= ln 2 / 1024: 2^k
// from the exponent bits, 2^(j/512) from a table, e^r from four terms of its series.
inline double det_exp_inside(double x) {
    constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
    const double shifted = x * (kExpSteps / kLn2) + kRound;
    const double steps = shifted - kRound;
    const double r = (x - steps * (kLn2High / kExpSteps)) - steps * (kLn2Low / kExpSteps);
    const auto number = static_cast<int64_t>(steps);
    const auto bits = static_cast<uint64_t>((number >> kExpBits) + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof power);
    const double r2 = r * r;
    const double series = (1.0 + r) + r2 * ((0.5 + r * (1.0 / 6)) + r2 * (1.0 / 24));
    return (kExpTable[static_cast<size_t>(number & (kExpSteps - 1))] * power) * series;
}

// The same for any x, clamped to [-700, 700].
inline double det_exp(double x) { return det_exp_inside(std::min(std::max(x, -700.0), 700.0)); }

// ln x for normal x > 0, relative error below 1e-13 also near 1: x = 2^k m, sqrt(1/2) <= m < sqrt(2),
// ln m = 2 atanh(s), s = (m - 1) / (m + 1).
inline double det_log(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    constexpr uint64_t kRootHalf = 0x3FE6A09E667F3BCDull;  // sqrt(1/2)
    const int64_t k = static_cast<int64_t>(bits - kRootHalf) >> 52;
    bits -= static_cast<uint64_t>(k) << 52;
    double m;
    std::memcpy(&m, &bits, sizeof m);
    const double s = (m - 1.0) / (m + 1.0);
    const double t = s * s;
    const double tail =
        t *
        (1.0 / 3 +
         t * (1.0 / 5 + t * (1.0 / 7 + t * (1.0 / 9 + t * (1.0 / 11 + t * (1.0 / 13 + t * (1.0 / 15)))))));
    const auto kd = static_cast<double>(k);
    return kd * kLn2High + (kd * kLn2Low + 2.0 * (s + s * tail));
}

// What may be missing or in excess when a decimal share times a count is rounded to doubles: 0.7 of 10 is 7,
// and 0.29 of 10^9 is 290,000,000.
inline double share_slack(double product) { return std::max(1e-9, product * 0x1p-51); }

// floor(share * count) of the decimal share that was meant.
inline uint64_t floor_share(double share, uint64_t count) {
    const double product = share * static_cast<double>(count);
    return std::min(count, static_cast<uint64_t>(std::floor(product + share_slack(product))));
}

// ceil(share * count) of the decimal share that was meant.
inline uint64_t ceil_share(double share, uint64_t count) {
    const double product = share * static_cast<double>(count);
    return std::min(count, static_cast<uint64_t>(std::ceil(std::max(0.0, product - share_slack(product)))));
}

}  // namespace mlfr
