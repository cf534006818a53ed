// The dropout masks (../philox.h), many column groups at a time.
#pragma once

#include "philox.h"
#include "vector.h"

namespace bertfast {
namespace {

constexpr int groups_per_step = width / 2;

inline Longs multiply_low_words(Longs a, uint32_t b) {
#if defined(__AVX512F__)
  // Unmasked, GCC 12's own header warns that its placeholder operand is uninitialised.
  return reinterpret_cast<Longs>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Longs>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#elif defined(__aarch64__)
  // There is no product of 64-bit elements; left alone, the compiler multiplies one at a time.
  return reinterpret_cast<Longs>(
      vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), vdup_n_u32(b)));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// The words of groups_per_step neighbouring groups of one row. Only the low 32 bits of each element
// count; the high bits carry rubbish along.
struct GroupWords {
  Longs word[4];
};

inline GroupWords group_words(uint64_t first_group, uint64_t row, uint32_t site, uint64_t seed) {
  Longs step;
  for (int i = 0; i < groups_per_step; ++i) step[i] = static_cast<uint64_t>(i);
  Longs c0 = step + first_group;
  Longs c1 = Longs{} + (row & 0xFFFFFFFFu), c2 = Longs{} + (row >> 32);
  Longs c3 = Longs{} + site;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox_rounds; ++round) {
    const Longs product_0 = multiply_low_words(c0, philox_multiplier_0);
    const Longs product_1 = multiply_low_words(c2, philox_multiplier_1);
    c0 = (product_1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c1 = product_1;
    c2 = (product_0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c3 = product_0;
    k0 += philox_key_step_0;
    k1 += philox_key_step_1;
  }
  return {{c0, c1, c2, c3}};
}

// Interleaves the elements of two vectors: a0 b0 a1 b1 ...
inline void interleave(Longs a, Longs b, uint64_t* out) {
  for (int i = 0; i < groups_per_step; ++i) {
    out[2 * i] = a[i];
    out[2 * i + 1] = b[i];
  }
}

// A row's lanes, eight columns per Philox call. `lanes` receives whole steps, so it needs room for
// columns rounded up to lanes_per_step.
constexpr int lanes_per_step = groups_per_step * 8;

inline void row_lanes(uint16_t* lanes, int64_t first_column, int64_t columns, uint64_t row,
                      uint32_t site, uint64_t seed) {
  for (int64_t column = 0; column < columns; column += lanes_per_step) {
    const GroupWords g =
        group_words(static_cast<uint64_t>((first_column + column) / 8), row, site, seed);
    uint64_t words[2 * groups_per_step];
    interleave((g.word[0] & 0xFFFFFFFFu) | (g.word[1] << 32),
               (g.word[2] & 0xFFFFFFFFu) | (g.word[3] << 32), words);
    std::memcpy(lanes + column, words, sizeof(words));
  }
}

// v where its lane is at least the threshold, else 0.
inline Floats keep(Floats v, const uint16_t* lanes, uint32_t threshold) {
  Halves halves;
  std::memcpy(&halves, lanes, sizeof(halves));
  const Words kept = static_cast<Words>(__builtin_convertvector(halves, Words) >= threshold);
  return bit_cast<Floats>(bit_cast<Words>(v) & kept);
}

// The lanes of attention's aligned block of 64 columns, in the order of the columns: in group c of
// the block, lane l belongs to column 8 l + c.
constexpr int64_t attention_block = 64;

typedef uint16_t GroupHalves __attribute__((vector_size(groups_per_step * 2)));

inline void attention_lanes(uint16_t* lanes, int64_t block, uint64_t row, uint32_t site,
                            uint64_t seed) {
  for (int first = 0; first < 8; first += groups_per_step) {
    const GroupWords g = group_words(static_cast<uint64_t>(block * 8 + first), row, site, seed);
    for (int i = 0; i < 4; ++i) {
      const GroupHalves low = __builtin_convertvector(g.word[i] & 0xFFFFu, GroupHalves);
      const GroupHalves high = __builtin_convertvector((g.word[i] >> 16) & 0xFFFFu, GroupHalves);
      std::memcpy(lanes + 16 * i + first, &low, sizeof(low));
      std::memcpy(lanes + 16 * i + 8 + first, &high, sizeof(high));
    }
  }
}

// The lanes of one row in pieces that stay in the first-level cache.
class RowMask {
 public:
  RowMask(const int64_t* seed, uint32_t threshold, uint32_t site)
      : seed_(seed ? static_cast<uint64_t>(*seed) : 0),
        threshold_(threshold),
        site_(site),
        scale_(dropout_scale(threshold)) {}

  static constexpr int64_t piece = 512;

  void draw(int64_t row, int64_t first_column, int64_t columns) {
    row_lanes(lanes_, first_column, columns, static_cast<uint64_t>(row), site_, seed_);
  }

  // mask * v / (1 - p) for the vector that starts `offset` columns into the piece drawn last.
  Floats apply(Floats v, int64_t offset) const {
    return keep(v * scale_, lanes_ + offset, threshold_);
  }

 private:
  uint64_t seed_;
  uint32_t threshold_, site_;
  float scale_;
  uint16_t lanes_[piece + lanes_per_step];
};

}  // namespace
}  // namespace bertfast
