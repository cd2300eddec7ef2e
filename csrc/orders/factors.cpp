#include "orders/factors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/detmath.h"
#include "common/parallel.h"
#include "common/random.h"

namespace mlfr {

namespace {

void check_weight(const float* weights, uint64_t i) {
    if (weights[i] >= 0.0f && !std::isinf(weights[i])) return;
    throw std::invalid_argument("weights: block " + std::to_string(i) + " has " + std::to_string(weights[i]) +
                                "; legal are finite numbers from 0 on");
}

float largest_weight(const float* weights, uint64_t n, int threads) {
    const auto parts = map_chunks(n, threads, [weights](uint64_t first, uint64_t last) {
        float largest = 0.0f;
        for (uint64_t i = first; i < last; ++i) {
            check_weight(weights, i);
            largest = std::max(largest, weights[i]);
        }
        return largest;
    });
    return parts.empty() ? 0.0f : *std::max_element(parts.begin(), parts.end());
}

// ratio ^ power for a ratio in [0, 1].
double tempered(double ratio, double power) {
    if (power == 1.0 || ratio == 0.0) return ratio;
    return det_exp(power * det_log(ratio));
}

}  // namespace

void temper_weights(const float* weights, uint64_t n, double power, double cap, int threads, float* out) {
    if (!(power > 0.0 && power <= 16.0)) throw std::invalid_argument("power: must be above 0 and at most 16");
    if (!(cap >= 1.0)) throw std::invalid_argument("cap: must be at least 1, or +inf for none");
    const auto largest = static_cast<double>(largest_weight(weights, n, threads));
    if (!(largest > 0.0)) throw std::invalid_argument("weights: all are 0");
    const auto sums = map_chunks(n, threads, [=](uint64_t first, uint64_t last) {
        double sum = 0.0;
        for (uint64_t i = first; i < last; ++i) {
            const double raised = tempered(static_cast<double>(weights[i]) / largest, power);
            const float least = weights[i] > 0.0f ? std::numeric_limits<float>::min() : 0.0f;
            out[i] = std::max(static_cast<float>(raised), least);
            sum += static_cast<double>(out[i]);
        }
        return sum;
    });
    const double mean = std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(n);
    const double most = std::min(1.0, cap * mean);
    for_chunks(n, threads, [=](uint64_t, uint64_t first, uint64_t last) {
        for (uint64_t i = first; i < last; ++i) {
            out[i] = static_cast<float>(std::min(static_cast<double>(out[i]), most) / most);
        }
    });
}

namespace {

// How many copies of a group of `size` count in a turn.
uint32_t counted(uint32_t size, bool logarithmic) {
    uint32_t count = 1;
    while (logarithmic && size > 1) {
        size >>= 1;
        ++count;
    }
    return count;
}

}  // namespace

void take_turns(const uint32_t* groups, const float* factors, uint64_t n, uint64_t turn, bool logarithmic,
                uint32_t* visits) {
    const auto is_drawn = [factors](uint64_t i) { return !factors || factors[i] > 0.0f; };
    const uint64_t numbers = n == 0 ? 0 : uint64_t{*std::max_element(groups, groups + n)} + 1;
    std::vector<uint32_t> size(numbers, 0), seen(numbers, 0);
    for (uint64_t i = 0; i < n; ++i) size[groups[i]] += is_drawn(i);
    for (uint64_t i = 0; i < n; ++i) {
        visits[i] = 0;
        if (!is_drawn(i)) continue;
        const uint32_t group = groups[i];
        const uint64_t copies = size[group], count = counted(size[group], logarithmic);
        if (count == copies) {  // mostly: a block that there is one of
            visits[i] = 1;
            continue;
        }
        const uint64_t first = (derive(0, group) % copies + (turn % copies) * count) % copies;
        visits[i] = (seen[group]++ + copies - first) % copies < count;
    }
}

// Before pass k, a block has come floor(k * factor + start) times, its start random in [0, 1): in units of
// 2^-32, so that no machine rounds otherwise.
void visits_in_passes(const float* factors, uint64_t n, uint64_t first, uint64_t passes, uint64_t seed,
                      int threads, uint32_t* visits) {
    if ((first | passes) >> 32) throw std::invalid_argument("first, passes: at most 2^32 - 1");
    for_chunks(n, threads, [=](uint64_t, uint64_t begin, uint64_t end) {
        for (uint64_t i = begin; i < end; ++i) {
            if (!(factors[i] >= 0.0f && factors[i] <= 1.0f)) {
                throw std::invalid_argument("factors: block " + std::to_string(i) + " has " +
                                            std::to_string(factors[i]) + "; legal is 0 to 1");
            }
            const auto step = static_cast<uint64_t>(static_cast<int64_t>(factors[i] * 0x1p32f));
            const uint64_t fraction = (first * step + (derive(seed, i) >> 32)) & 0xFFFFFFFFu;
            visits[i] = static_cast<uint32_t>((fraction + passes * step) >> 32);
        }
    });
}

}  // namespace mlfr
