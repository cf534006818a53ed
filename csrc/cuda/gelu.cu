// gelu(x + bias) by erf or by tanh (Hendrycks and Gimpel, "Gaussian error linear units", 2016), and
// its gradients. The bias gradient is summed in two stages, always in the same order.
#include "common.h"
#include "kernels.h"
#include "sums.h"

namespace bertfast {
namespace {

constexpr int threads = 256;

constexpr float sqrt_half = 0.70710678118654752f;
constexpr float sqrt_two_over_pi = 0.79788456080286536f;
constexpr float one_over_sqrt_two_pi = 0.39894228040143268f;
constexpr float cubic = 0.044715f;

__device__ __forceinline__ float gelu(float z, bool tanh) {
  const float inner =
      tanh ? tanhf(sqrt_two_over_pi * (z + cubic * z * z * z)) : erff(z * sqrt_half);
  return 0.5f * z * (1.0f + inner);
}

__device__ __forceinline__ float gelu_slope(float z, bool tanh) {
  if (tanh) {
    const float t = tanhf(sqrt_two_over_pi * (z + cubic * z * z * z));
    const float inner_slope = sqrt_two_over_pi * (1.0f + 3.0f * cubic * z * z);
    return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * inner_slope;
  }
  return 0.5f * (1.0f + erff(z * sqrt_half)) + z * one_over_sqrt_two_pi * expf(-0.5f * z * z);
}

template <class T, bool WIDE>
__device__ __forceinline__ Group biased(const T* x, const void* bias, bool wide_parameters,
                                        int64_t column, int64_t left) {
  Group z = load_group<WIDE>(x, left);
  if (bias) {
    const Group b = Parameters<T>{bias, wide_parameters}.template load<WIDE>(column, left);
    BERTFAST_UNROLL
    for (int j = 0; j < group; ++j) z.value[j] += b.value[j];
  }
  return z;
}

template <class T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(threads) forward(GeluForward a) {
  const int64_t per_row = divide_up(a.columns, group), groups = a.rows * per_row;
  const int64_t step = int64_t{threads} * gridDim.x;
  for (int64_t i = int64_t{threads} * blockIdx.x + threadIdx.x; i < groups; i += step) {
    const int64_t row = i / per_row, column = (i - row * per_row) * group;
    const int64_t at = row * a.columns + column, left = a.columns - column;
    Group z =
        biased<T, WIDE>(static_cast<const T*>(a.x) + at, a.bias, a.wide_parameters, column, left);
    BERTFAST_UNROLL
    for (int j = 0; j < group; ++j) z.value[j] = gelu(z.value[j], TANH);
    store_group<WIDE>(static_cast<T*>(a.out) + at, z, left);
  }
}

// dx of a group, and with it the bias gradient's summands.
template <class T, bool TANH, bool WIDE>
__device__ __forceinline__ Group slope_of_group(const GeluBackward& a, int64_t at, int64_t column,
                                                int64_t left) {
  const Group z =
      biased<T, WIDE>(static_cast<const T*>(a.x) + at, a.bias, a.wide_parameters, column, left);
  Group d = load_group<WIDE>(static_cast<const T*>(a.dout) + at, left);
  BERTFAST_UNROLL
  for (int j = 0; j < group; ++j) d.value[j] *= gelu_slope(z.value[j], TANH);
  store_group<WIDE>(static_cast<T*>(a.dx) + at, d, left);
  return d;
}

// Without a bias, where the ends of rows mean nothing and all is one row.
template <class T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(threads) backward_flat(GeluBackward a) {
  const int64_t groups = divide_up(a.columns, group), step = int64_t{threads} * gridDim.x;
  for (int64_t i = int64_t{threads} * blockIdx.x + threadIdx.x; i < groups; i += step)
    slope_of_group<T, TANH, WIDE>(a, i * group, i * group, a.columns - i * group);
}

template <class T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(strip_threads) backward(GeluBackward a) {
  BERTFAST_SHARED(float, shares, strip_floats);
  const int x = threadIdx.x % strip_across, y = threadIdx.x / strip_across;
  const int64_t column = (int64_t{strip_across} * blockIdx.x + x) * group,
                left = a.columns - column;
  Group total = {};
  if (left > 0) {
    for (int64_t row = int64_t{strip_down} * blockIdx.y + y; row < a.rows;
         row += int64_t{strip_down} * gridDim.y) {
      const Group d = slope_of_group<T, TANH, WIDE>(a, row * a.columns + column, column, left);
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) total.value[j] += d.value[j];
    }
  }
  const float sum = strip_sum(total, shares);
  const int64_t finished = int64_t{strip_columns} * blockIdx.x + threadIdx.x;
  if (finished < a.columns) a.partial[blockIdx.y * a.columns + finished] = sum;
}

}  // namespace

int gelu_forward(const GeluForward& a, int processors, void* stream) {
  const int64_t groups = a.rows * divide_up(a.columns, group);
  if (groups == 0) return 0;
  const bool wide = a.columns % group == 0 && aligned(a.x) && aligned(a.out) && aligned(a.bias);
  const dim3 blocks(static_cast<unsigned>(smaller(divide_up(groups, threads), 16 * processors)));
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    auto* const kernel = a.tanh ? (wide ? forward<T, true, true> : forward<T, true, false>)
                                : (wide ? forward<T, false, true> : forward<T, false, false>);
    return launch("gelu_forward", kernel, blocks, threads, stream, a);
  });
}

int gelu_backward(const GeluBackward& a, int processors, void* stream) {
  if (a.columns == 0) return 0;
  const bool wide =
      a.columns % group == 0 && aligned(a.dout) && aligned(a.x) && aligned(a.dx) && aligned(a.bias);
  if (!a.bias) {
    const int64_t blocks = divide_up(divide_up(a.columns, group), threads);
    const dim3 grid(static_cast<unsigned>(smaller(blocks, 16 * processors)));
    return with_dtype(a.dtype, [&](auto element) {
      using T = decltype(element);
      auto* const kernel =
          a.tanh ? (wide ? backward_flat<T, true, true> : backward_flat<T, true, false>)
                 : (wide ? backward_flat<T, false, true> : backward_flat<T, false, false>);
      return launch("gelu_backward", kernel, grid, threads, stream, a);
    });
  }
  const dim3 grid(static_cast<unsigned>(divide_up(a.columns, strip_columns)),
                  static_cast<unsigned>(a.blocks));
  const int status = with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    auto* const kernel = a.tanh ? (wide ? backward<T, true, true> : backward<T, true, false>)
                                : (wide ? backward<T, false, true> : backward<T, false, false>);
    return launch("gelu_backward", kernel, grid, strip_threads, stream, a);
  });
  if (status) return status;
  return sum_partials(
      {a.partial, a.dbias, a.blocks, a.columns, a.columns, a.dtype, a.wide_parameters}, stream);
}

}  // namespace bertfast
