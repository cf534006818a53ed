// The second stage of sums over rows: adds up what each block found.
#pragma once

#include "common.h"
#include "kernels.h"

namespace bertfast {
namespace {

struct PartialSums {
  const float* partial;  // (blocks, columns), `stride` floats from one block to the next
  void* out;             // (columns), in dtype, or float32 if wide
  int64_t blocks, columns, stride;
  Dtype dtype;
  bool wide;
};

constexpr int sum_across = 32, sum_down = 8;

template <class T>
__global__ void __launch_bounds__(sum_across* sum_down) sum_kernel(PartialSums a) {
  BERTFAST_SHARED(float, sums, sum_across* sum_down);
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
    return launch("sum_partials", sum_kernel<decltype(element)>, blocks, sum_across * sum_down,
                  stream, a);
  });
}

}  // namespace
}  // namespace bertfast
