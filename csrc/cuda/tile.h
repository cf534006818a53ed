// Matrices of 16-bit elements in shared memory, as tensor cores take them: rows of D elements in
// pieces of 16 bytes, which are swizzled so that neither eight rows of one piece (what ldmatrix
// reads) nor the pieces of a row meet in a bank.
#pragma once

#include "tensor.h"

namespace bertfast {
namespace {

// Rows of one head in global memory; strides are in elements.
struct Rows {
  const uint16_t* data;
  int64_t token;
  int head_dim;
  bool wide;  // every eighth element of every row lies on 16 bytes, and head_dim is such a number

  __device__ __forceinline__ Rows(const Strided& x, int64_t head, int head_dim_, bool wide_)
      : data(static_cast<const uint16_t*>(x.data) + head * x.head),
        token(x.token),
        head_dim(head_dim_),
        wide(wide_) {}
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(BERTFAST_EMULATION)
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
#else
  // One instruction for both.
  uint32_t both;
  if (std::is_same<T, Bfloat16>::value) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&both, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&both, &pair, 4);
  }
  return both;
#endif
}

template <int D>
struct Tile {
  static constexpr int pieces = D / 8;
  int begin;  // in dynamic shared memory, in pieces: half the registers of an address

  // The tile that lies `count` rows behind.
  __device__ __forceinline__ Tile behind(int count) const { return {begin + count * pieces}; }

  static constexpr int64_t bytes(int rows) { return int64_t{rows} * D * 2; }

  static constexpr int swizzled = D % 64 == 0 ? 7 : 3;  // bits of a piece's number

  static __device__ __forceinline__ int swizzle(int row) {
    return D % 64 == 0 ? row & 7 : row >> 1 & 3;
  }

  // A lane's piece, of those from `row`, a multiple of eight, and `piece` on; that is even where the
  // lane's is not 0. What depends on the lane is the same for all rows and pieces, but for a constant
  // in its bits: one register in place of one for each.
  __device__ __forceinline__ uint4* at(int row, int piece, int lane_row, int lane_piece) const {
    BERTFAST_DYNAMIC_SHARED(memory);
    const int of_lane = lane_row * pieces + (lane_piece ^ swizzle(lane_row));
    return memory + (begin + row * pieces + (piece & ~swizzled)) + (of_lane ^ (piece & swizzled));
  }

  __device__ __forceinline__ uint4* at(int row, int piece) const {
    BERTFAST_DYNAMIC_SHARED(memory);
    return memory + begin + row * pieces + (piece ^ swizzle(row));
  }

  // Rows from the tile's `row` on, pieces from `piece` on, as an operand of `multiply`: 16 x 16
  // elements for the left one, or, 16 columns for the right one, for two products. A tile that has
  // the operand's columns as its rows is read crosswise.
  __device__ __forceinline__ void left(uint32_t (&a)[4], int row, int piece) const {
    load_matrices<false>(a, at(row, piece, lane_id() % 16, lane_id() / 16));
  }
  __device__ __forceinline__ void left_crosswise(uint32_t (&a)[4], int row, int piece) const {
    load_matrices<true>(a, at(row, piece, lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2));
  }
  __device__ __forceinline__ void right(uint32_t (&b)[4], int row, int piece) const {
    load_matrices<true>(b, at(row, piece, lane_id() % 16, lane_id() / 16));
  }
  __device__ __forceinline__ void right_crosswise(uint32_t (&b)[4], int row, int piece) const {
    load_matrices<false>(b, at(row, piece, lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2));
  }

  // The two neighbouring elements that this lane has of a 16 x 8 product at `row` and `piece`: of
  // row g + 8 where `lower`.
  __device__ __forceinline__ void put(int row, int piece, bool lower, uint32_t pair) const {
    uint4* to = at(row + (lower ? 8 : 0), piece, lane_id() / 4, 0);
    reinterpret_cast<uint32_t*>(to)[lane_id() % 4] = pair;
  }

  // Starts to copy `rows` rows from global row `first` on, by `threads` threads of which this is
  // one. Behind the last of the `left` rows and of the columns are zeros.
  __device__ __forceinline__ void load(const Rows& from, int64_t first, int rows, int64_t left,
                                       int thread, int threads) const {
    BERTFAST_KEEP_LOOP
    for (int i = thread; i < rows * pieces; i += threads) {
      const int row = i / pieces, piece = i % pieces;
      const uint16_t* source = from.data + (first + row) * from.token + 8 * piece;
      if (from.wide) {
        const bool there = row < left && 8 * piece < from.head_dim;
        copy_async(at(row, piece), there ? source : from.data, there);
      } else {
        Sixteen<uint16_t> values;
        BERTFAST_UNROLL
        for (int j = 0; j < 8; ++j)
          values.value[j] = row < left && 8 * piece + j < from.head_dim ? source[j] : uint16_t{0};
        memcpy(at(row, piece), &values, 16);
      }
    }
  }

  // Rows `row` to `row` + 16, of `columns` columns from `column` on, to global row `first`, by one
  // warp which has put them there. Only the `left` first ones are.
  __device__ __forceinline__ void store(const Rows& to, int64_t first, int row, int64_t left,
                                        int column, int columns) const {
    __syncwarp();
    const int across = columns / 8;
    BERTFAST_KEEP_LOOP
    for (int i = lane_id(); i < 16 * across; i += 32) {
      const int r = i / across, piece = column / 8 + i % across;
      if (r >= left || 8 * piece >= to.head_dim) continue;
      uint16_t* target = const_cast<uint16_t*>(to.data) + (first + r) * to.token + 8 * piece;
      if (to.wide) {
        store_sixteen(reinterpret_cast<uint4*>(target), *at(row + r, piece));
      } else {
        Sixteen<uint16_t> values;
        memcpy(&values, at(row + r, piece), 16);
        for (int j = 0; j < 8 && 8 * piece + j < to.head_dim; ++j) target[j] = values.value[j];
      }
    }
  }
};

// sums (16 x 16 PAIRS) += a (16 x 16) times what `right` gives of it, 16 columns at a time.
template <class T, int PAIRS, class Right>
__device__ __forceinline__ void multiply_wide(float (&sums)[2 * PAIRS][4], const uint32_t (&a)[4],
                                              int pairs, Right right) {
  BERTFAST_UNROLL
  for (int n = 0; n < PAIRS; ++n) {
    if (n < pairs) {
      uint32_t b[4];
      right(b, n);
      multiply<T>(sums[2 * n], a, b[0], b[1]);
      multiply<T>(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace
}  // namespace bertfast
