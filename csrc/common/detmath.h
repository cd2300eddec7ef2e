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

// e^x for any x, clamped to [-700, 700]; NaN, which has no integer part, counts as -700.
inline double det_exp(double x) { return det_exp_inside(std::min(std::max(-700.0, x), 700.0)); }

// ln x for a positive normal x, relative error below 1e-14: x = 2^k m, sqrt(1/2) <= m < sqrt(2), ln m =
// 2 atanh(s), s = (m - 1) / (m + 1), from eleven terms of its series.
inline double det_log(double x) {
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int64_t k = (bits - 0x3FE6A09E667F3BCD) >> 52;  // sqrt(1/2)
    bits -= static_cast<int64_t>(static_cast<uint64_t>(k) << 52);
    double m;
    std::memcpy(&m, &bits, sizeof m);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = 0.0;
    for (int term = 21; term >= 1; term -= 2) series = series * z + 1.0 / term;
    return static_cast<double>(k) * kLn2 + 2.0 * s * series;
}

// e^x in fp32 for |x| <= 86, relative error below 3e-7: x = n ln 2 + r with |r| <= ln 2 / 2, e^r from its
// series. No branches and no tables: loops over it become vector instructions.
inline float det_expf(float x) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    const float shifted = x * 0x1.715476p0f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;  // ln 2 in two parts
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = static_cast<int32_t>(static_cast<uint32_t>(bits - 0x4B400000 + 127) << 23);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    const float series =
        1.0f +
        r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    return series * power;
}

// Between 0.94 and 1 times e^x for 0 <= x <= 80, for comparisons: the exponent and a straight line between
// powers of 2, which lies above 2^x by 6.2 % at most.
inline float exp_from_below(float x) {
    const int32_t bits = static_cast<int32_t>(x * 0x1.715476p23f) + (127 << 23);
    float line;
    std::memcpy(&line, &bits, sizeof line);
    return 0.9416f * line;
}

// A number t, uniform in [0, 1), from a random word, and 1 - t.
struct Uniform {
    float number, rest;

    explicit Uniform(uint64_t word) {
        const uint64_t bits = 0x3FF0000000000000u | (word >> 12);
        double above_one;
        std::memcpy(&above_one, &bits, sizeof above_one);
        number = static_cast<float>(above_one - 1.0);
        rest = static_cast<float>(2.0 - above_one);
    }
};

// -ln(1 - t) in fp32 for a uniform t of 52 bits: a standard exponential number, relative error below 1e-6
// down to the smallest ones. rest = 1 - t = 2^k m, sqrt(1/2) <= m < sqrt(2), ln m = 2 atanh(s), s = (m - 1) /
// (m + 1).
inline float det_exponential(float t, float rest) {
    int32_t bits;
    std::memcpy(&bits, &rest, sizeof bits);
    const int32_t k = (bits - 0x3F3504F3) >> 23;  // sqrt(1/2)
    bits -= static_cast<int32_t>(static_cast<uint32_t>(k) << 23);
    float m;
    std::memcpy(&m, &bits, sizeof m);
    const float from_m = m - 1.0f;
    const float f = k == 0 ? -t : from_m;  // for a small t, every digit matters
    const float s = f / (2.0f + f);
    const float z = s * s;
    const float tail = z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
    return -(static_cast<float>(k) * 0x1.62e430p-1f + 2.0f * (s + s * tail));
}

// The largest error by which the product of a decimal share and a count may be off in doubles: 0.7 of 10 is
// 7, and 0.29 of 10^9 is 290,000,000.
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
