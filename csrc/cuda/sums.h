// Sums over rows, in two stages: what a block finds of a strip of columns, and what all blocks found
// added up.
#pragma once

#include "common.h"

namespace bertfast {
namespace {

// A strip is 32 groups of columns side by side, one to a thread, and 8 rows of threads.
constexpr int strip_across = 32, strip_down = 8, strip_threads = strip_across * strip_down;
constexpr int strip_columns = strip_across * group;
constexpr int strip_floats = strip_down * strip_columns;

// The sum of what the strip's threads found of its column threadIdx.x, where thread (x, y) brings
// group x. `shares` has room for strip_floats.
__device__ __forceinline__ float strip_sum(const Group& found, float* shares) {
  static_assert(strip_threads == strip_columns, "each thread finishes one column");
  const int x = threadIdx.x % strip_across, y = threadIdx.x / strip_across;
  // What is there from the sum before has been read by all.
  __syncthreads();
  BERTFAST_UNROLL
  for (int j = 0; j < group; ++j) shares[(y * group + j) * strip_across + x] = found.value[j];
  __syncthreads();
  const int own = threadIdx.x / group, j = threadIdx.x % group;
  float sum = 0.0f;
  for (int i = 0; i < strip_down; ++i) sum += shares[(i * group + j) * strip_across + own];
  return sum;
}

struct PartialSums {
  const float* partial;  // (blocks, columns), `stride` floats from one block to the next
  void* out;             // (columns), in dtype, or float32 if wide
  int64_t blocks, columns, stride;
  Dtype dtype;
  bool wide;
};

constexpr int sum_across = 32, sum_down = 8, sum_threads = sum_across * sum_down;

template <class T>
__global__ void __launch_bounds__(sum_threads) sum_kernel(PartialSums a) {
  BERTFAST_SHARED(float, sums, sum_threads);
  const int x = threadIdx.x % sum_across, y = threadIdx.x / sum_across;
  const int64_t column = int64_t{sum_across} * blockIdx.x + x;
  float sum = 0.0f;
  if (column < a.columns)
    for (int64_t i = y; i < a.blocks; i += sum_down) sum += a.partial[i * a.stride + column];
  sums[y * sum_across + x] = sum;
  __syncthreads();
  if (y == 0 && column < a.columns) {
    for (int i = 1; i < sum_down; ++i) sum += sums[i * sum_across + x];
    store_parameter<T>(a.out, a.wide, column, sum);
  }
}

inline int sum_partials(const PartialSums& a, void* stream) {
  const dim3 blocks(static_cast<unsigned>(divide_up(a.columns, sum_across)));
  return with_dtype(a.dtype, [&](auto element) {
    return launch("sum_partials", sum_kernel<decltype(element)>, blocks, sum_threads, stream, a);
  });
}

}  // namespace
}  // namespace bertfast
