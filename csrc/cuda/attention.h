// What attention's forward and backward have in common: which rows a block has, the scores of a
// warp's 16 queries and 64 keys, their dropout mask.
#pragma once

#include "tile.h"

namespace bertfast {
namespace {

// Keys that are worked on together: one block of the mask, too.
constexpr int key_block = 64;
constexpr int warp_rows = 16;
constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

// A warp's scores of 8 N keys, or another matrix like them: tile n has columns 8n and on, and this
// lane of it columns 2t and 2t + 1 of row g, then of row g + 8, with g = lane / 4 and t = lane % 4.
template <int N>
using Scores = float[N][4];
// The same in 16 bits, as the left operand of a product: 16 columns at a time.
template <int N>
using Packed = uint32_t[N / 2][4];

__device__ __forceinline__ float exp2_of(float x) {
#if defined(BERTFAST_EMULATION)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Of the four lanes that have a row of scores.
__device__ __forceinline__ float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
  return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}

// n, but at least 0.
__device__ __forceinline__ int at_most(int64_t n, int most) {
  return n < most ? n < 0 ? 0 : static_cast<int>(n) : most;
}

// One sequence, inside the tensors and no longer than the longest, whatever is in cu_seqlens.
struct Sequence {
  int64_t begin_q, begin_k;
  int queries, keys;

  __device__ __forceinline__ Sequence(const Attention& a, int64_t i) {
    bounds(a.cu_seqlens_q, i, a.tokens_q, a.longest_q, begin_q, queries);
    bounds(a.cu_seqlens_k, i, a.tokens_k, a.longest_k, begin_k, keys);
  }

  // Keys that one of the first `queries` queries sees.
  __device__ __forceinline__ int seen_by(const Attention& a, int queries_) const {
    return a.causal ? at_most(queries_ + keys - queries, keys) : keys;
  }

  static __device__ __forceinline__ void bounds(const int32_t* cu_seqlens, int64_t i,
                                                int64_t tokens, int64_t longest, int64_t& begin,
                                                int& length) {
    const int64_t first = cu_seqlens[i], end = smaller(cu_seqlens[i + 1], tokens);
    begin = first < 0 ? 0 : smaller(first, tokens);
    length = end > begin ? static_cast<int>(smaller(end - begin, longest)) : 0;
  }
};

// How many blocks of `rows` rows a head has, and whether each must search for its sequence. Only the
// longest sequence is known to the host: either all have as many blocks as it needs, or sequence i
// has those from cu_seqlens[i] / rows + i on, always enough and at most one too many.
struct Blocks {
  int64_t count, each;  // each 0: they search

  Blocks(int64_t tokens, int64_t batch, int64_t longest, int rows) {
    each = divide_up(longest, rows);
    const int64_t bound = tokens / rows + batch;
    if (bound < batch * each) each = 0;
    count = each ? batch * each : bound;
    // One that has the storage rows.
    if (count < 1) count = 1, each = 1;
  }
};

// The sequence of this block, and its first row in it.
__device__ __forceinline__ int64_t sequence_of(const int32_t* cu_seqlens, int64_t batch,
                                               int64_t each, int rows, int64_t& first) {
  const int64_t task = blockIdx.x;
  if (each) {
    first = task % each * rows;
    return task / each;
  }
  // The last sequence that begins at or before this block, 32 guesses at a time.
  int64_t low = 0, size = batch;
  while (size > 1) {
    const int64_t step = divide_up(size, 32), i = low + lane_id() * step;
    const bool begun = i < low + size && cu_seqlens[i] / rows + i <= task;
    const int last = 31 - __clz(__ballot_sync(0xFFFFFFFFu, begun));
    const int64_t end = low + size;
    low += (last > 0 ? last : 0) * step;
    size = smaller(step, end - low);
  }
  first = (task - (cu_seqlens[low] / rows + low)) * rows;
  return low;
}

// The first row behind the last sequence.
__device__ __forceinline__ int64_t storage_of(const int32_t* cu_seqlens, const Attention& a) {
  return cu_seqlens[a.batch] < 0 ? 0 : cu_seqlens[a.batch];
}

// The block's share of the rows behind the last sequence, which are zeros, of `heads` heads.
__device__ __forceinline__ void clear_storage(const Strided& x, const int32_t* cu_seqlens,
                                              const Attention& a, int64_t tokens, int64_t head,
                                              int heads) {
  for (int64_t row = storage_of(cu_seqlens, a) + blockIdx.x; row < tokens; row += gridDim.x)
    for (int i = threadIdx.x; i < heads * a.head_dim; i += blockDim.x) {
      const int64_t h = head + i / a.head_dim;
      if (h < a.heads)
        static_cast<uint16_t*>(
            const_cast<void*>(x.data))[row * x.token + h * x.head + i % a.head_dim] = 0;
    }
}

// Which keys of a block each of a warp's queries sees, and which of the probabilities are kept.
struct View {
  int keys;         // of the block, that there are
  int last[2];      // of the block, that rows g and g + 8 see
  bool everything;  // all rows see all of the block

  __device__ __forceinline__ View(const Attention& a, const Sequence& s, int row, int first_key) {
    keys = s.keys - first_key;
    const int beyond = s.keys - s.queries - first_key;
    everything = keys >= key_block;
    for (int i = 0; i < 2; ++i) {
      last[i] = keys - 1;
      const int own = row + lane_id() / 4 + 8 * i + beyond;
      if (a.causal && own < last[i]) last[i] = own;
    }
    if (a.causal && row + beyond < key_block - 1) everything = false;
  }

  // Tiles of 16 columns with keys in them.
  __device__ __forceinline__ int pairs() const {
    return keys < key_block ? (keys + 15) / 16 : key_block / 16;
  }

  __device__ __forceinline__ bool sees(int n, int e) const {
    return 8 * n + lane_id() % 4 * 2 + e % 2 <= last[e / 2];
  }
};

// The dropout mask of a warp's scores of a block of keys. This lane's columns are all eight lanes of
// two groups, in each of its two rows, so that it draws no word in vain (the layout is defined in
// bertfast/masks.py). A bit for each score: registers are dear.
struct ScoreMask {
  uint32_t kept = 0xFFFFFFFFu;
  float scale = 1.0f;  // of what is kept

  // Of the rows from `row` on, which are numbers of queries among all; without dropout, nothing.
  __device__ __forceinline__ ScoreMask(const Attention& a, uint64_t seed, int64_t row, int64_t head,
                                       int first_key) {
    if (!a.seed) return;
    scale = dropout_scale(a.threshold);
    kept = 0;
    BERTFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t number = (row + lane_id() / 4 + i / 2 * 8) * a.heads + head;
      const PhiloxWords drawn =
          philox(static_cast<uint32_t>(first_key / 8 + lane_id() % 4 * 2 + i % 2),
                 static_cast<uint64_t>(number), a.site, seed);
      BERTFAST_UNROLL
      for (int n = 0; n < 8; ++n) {
        const uint32_t word = drawn.word[n / 2], lane = n % 2 ? word >> 16 : word & 0xFFFFu;
        if (lane >= a.threshold) kept |= 1u << (4 * n + i);
      }
    }
  }

  __device__ __forceinline__ bool keeps(int n, int e) const { return kept >> (4 * n + e) & 1u; }
};

template <int N>
__device__ __forceinline__ void clear(float (&sums)[N][4]) {
  BERTFAST_UNROLL
  for (int n = 0; n < N; ++n)
    for (int e = 0; e < 4; ++e) sums[n][e] = 0.0f;
}

// sums = 16 rows of one tile, from `row` on, times 8 N rows of the other, from `key` on, of which
// 16 `pairs` are there.
template <class T, int N, int D>
__device__ __forceinline__ void rows_by_rows(Scores<N>& sums, const Tile<D>& left, int row,
                                             const Tile<D>& right, int key, int pairs) {
  clear(sums);
  BERTFAST_UNROLL
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    left.left(a, row, 2 * k);
    multiply_wide<T, N / 2>(sums, a, pairs, [&](uint32_t (&b)[4], int n) {
      right.right_crosswise(b, key + 16 * n, 2 * k);
    });
  }
}

// sums (16 x D) += weights of 8 N keys times the keys' rows of a tile, from `key` on.
template <class T, int N, int D>
__device__ __forceinline__ void weigh_rows(float (&sums)[D / 8][4], const Packed<N>& weights,
                                           const Tile<D>& rows, int key, int pairs) {
  BERTFAST_UNROLL
  for (int k = 0; k < N / 2; ++k)
    if (k < pairs)
      multiply_wide<T, D / 16>(sums, weights[k], D / 16, [&](uint32_t (&b)[4], int n) {
        rows.right(b, key + 16 * k, 2 * n);
      });
}

template <class T, int N>
__device__ __forceinline__ void pack_scores(Packed<N>& to, const Scores<N>& from) {
  BERTFAST_UNROLL
  for (int k = 0; k < N / 2; ++k)
    for (int i = 0; i < 4; ++i)
      to[k][i] = pack<T>(from[2 * k + i / 2][i % 2 * 2], from[2 * k + i / 2][i % 2 * 2 + 1]);
}

// sums * factor of rows g and g + 8, into 16 rows of a tile.
template <class T, int N, int D>
__device__ __forceinline__ void put_rows(const Tile<D>& to, int row, int column,
                                         const float (&sums)[N][4], float factor, float factor_8) {
  BERTFAST_UNROLL
  for (int n = 0; n < N; ++n) {
    to.put(row, column / 8 + n, false, pack<T>(sums[n][0] * factor, sums[n][1] * factor));
    to.put(row, column / 8 + n, true, pack<T>(sums[n][2] * factor_8, sums[n][3] * factor_8));
  }
}

// Every eighth element of every row on 16 bytes.
inline bool wide(const Strided& x, int64_t head_dim) {
  return aligned(x.data) && x.token % 8 == 0 && x.head % 8 == 0 && head_dim % 8 == 0;
}

// f of a head dimension's class, the next one that has a kernel, as a constant.
template <class F>
int with_width(int64_t head_dim, F f) {
  if (head_dim <= 32) return f(std::integral_constant<int, 32>{});
  if (head_dim <= 64) return f(std::integral_constant<int, 64>{});
  if (head_dim <= 96) return f(std::integral_constant<int, 96>{});
  return f(std::integral_constant<int, 128>{});
}

// f of the dtype's type, of 16 bits.
template <class F>
int with_half(Dtype dtype, F f) {
  return dtype == Dtype::bfloat16 ? f(Bfloat16{}) : f(Half{});
}

}  // namespace
}  // namespace bertfast
