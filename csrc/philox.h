// The one dropout mask. C++ and CUDA include this file; bertfast/masks.py is its definition
// in Python, and gates hold the two together bit for bit.
//
// Philox4x32 with 7 rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BERTFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BERTFAST_HOST_DEVICE inline
#endif

namespace bertfast {
namespace {

constexpr int philox_rounds = 7;
constexpr uint32_t philox_multiplier_0 = 0xD2511F53u;
constexpr uint32_t philox_multiplier_1 = 0xCD9E8D57u;
constexpr uint32_t philox_key_step_0 = 0x9E3779B9u;
constexpr uint32_t philox_key_step_1 = 0xBB67AE85u;

// An element is kept when its 16-bit lane is at least the threshold, round(p * 65536).
constexpr uint32_t dropout_lanes = 65536u;

// What a kept value is multiplied by, so that the expectation is exact; 0 when nothing is kept. In
// float32, which gives the same bits for every threshold as rounding the quotient in double does.
BERTFAST_HOST_DEVICE float dropout_scale(uint32_t threshold) {
  return threshold < dropout_lanes ? 65536.0f / static_cast<float>(dropout_lanes - threshold)
                                   : 0.0f;
}

struct PhiloxWords {
  uint32_t word[4];
};

// counter = (column group, row low, row high, site), key = (seed low, seed high). The words hold
// the lanes of the group's eight columns: lane 2i is the low half of word i, lane 2i + 1 the high
// half.
BERTFAST_HOST_DEVICE PhiloxWords philox(uint32_t group, uint64_t row, uint32_t site,
                                        uint64_t seed) {
  uint32_t c0 = group, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32);
  uint32_t c3 = site;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox_rounds; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(c0) * philox_multiplier_0;
    const uint64_t product_1 = static_cast<uint64_t>(c2) * philox_multiplier_1;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product_1);
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product_0);
    k0 += philox_key_step_0;
    k1 += philox_key_step_1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace bertfast
