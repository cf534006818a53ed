// y = (s - mean) * rstd * weight + bias with s = residual + dropout(x), by rows, and its gradients
// (Ba, Kiros and Hinton, "Layer Normalization", 2016, with the biased variance). Backward, with
// xhat = (s - mean) * rstd and g = dy * weight:
//   ds = rstd * (g - avg(g) - xhat * avg(g * xhat)), dweight = sum(dy * xhat), dbias = sum(dy)
//
// Rows of up to 8192 elements that start on 16 bytes stay in the registers of a warp or a block;
// longer ones, and those that start anywhere, are read again for each pass.
#include "common.h"
#include "sums.h"

namespace bertfast {
namespace {

// A row's THREADS threads hold ITEMS groups of eight elements each.
template <int THREADS_, int ITEMS_>
struct InRegisters {
  static constexpr int THREADS = THREADS_, ITEMS = ITEMS_;
  static constexpr int BLOCK = THREADS < 128 ? 128 : THREADS;
  static constexpr int ROWS = BLOCK / THREADS;
  static constexpr int64_t most_columns = int64_t{THREADS} * ITEMS * group;
};

constexpr int streaming_threads = 256;

// Mean and 1 / sqrt(variance + eps).
struct Statistics {
  float mean, rstd;
};

// From the sums of d and d^2, where d is the row less `about`, which is its mean but for rounding:
// in a row of equal values what rounding left is all there is to centre.
__device__ __forceinline__ Statistics statistics_of(float about, Two sums, float columns,
                                                    float eps) {
  const float rest = sums.a / columns, squares = sums.b / columns;
  float variance = squares == INFINITY ? squares : squares - rest * rest;
  variance = variance < 0.0f ? 0.0f : variance;
  return {about + rest, 1.0f / sqrtf(variance + eps)};
}

// residual + dropout(x) of a group, as it is kept: rounded to T.
template <class T, bool DROPOUT, bool WIDE>
__device__ __forceinline__ Group sum_of_group(const LayernormForward& a, const Mask<DROPOUT>& mask,
                                              int64_t row, int64_t number, int64_t left) {
  const int64_t at = row * a.columns + number * group;
  Group s = mask.apply(load_group<WIDE>(static_cast<const T*>(a.x) + at, left), row, number);
  if (a.residual) {
    const Group r = load_group<WIDE>(static_cast<const T*>(a.residual) + at, left);
    BERTFAST_UNROLL
    for (int j = 0; j < group; ++j) s.value[j] += r.value[j];
  }
  BERTFAST_UNROLL
  for (int j = 0; j < group; ++j) s.value[j] = to_float(from_float<T>(s.value[j]));
  return s;
}

template <class T, bool WIDE>
__device__ __forceinline__ void store_normed(const LayernormForward& a, Group s, Statistics of,
                                             int64_t row, int64_t number, int64_t left) {
  const Parameters<T> weight{a.weight, a.wide_parameters}, bias{a.bias, a.wide_parameters};
  const Group w = weight.template load<WIDE>(number * group, left);
  const Group b = bias.template load<WIDE>(number * group, left);
  BERTFAST_UNROLL
  for (int j = 0; j < group; ++j)
    s.value[j] = (s.value[j] - of.mean) * of.rstd * w.value[j] + b.value[j];
  store_group<WIDE>(static_cast<T*>(a.out) + row * a.columns + number * group, s, left);
}

template <class T, bool DROPOUT, class Shape>
__global__ void __launch_bounds__(Shape::BLOCK) forward(LayernormForward a) {
  BERTFAST_SHARED(float, scratch, 2 * Shape::BLOCK / 32);
  const Mask<DROPOUT> mask(a.seed, a.threshold, a.site);
  const int lane = threadIdx.x % Shape::THREADS, own = threadIdx.x / Shape::THREADS;
  const int64_t groups = a.columns / group;
  const float columns = static_cast<float>(a.columns);
  for (int64_t first = int64_t{Shape::ROWS} * blockIdx.x; first < a.rows;
       first += int64_t{Shape::ROWS} * gridDim.x) {
    const int64_t row = first + own;
    const bool there = row < a.rows;
    Group s[Shape::ITEMS];
    Two sums = {0.0f, 0.0f};
    BERTFAST_UNROLL
    for (int i = 0; i < Shape::ITEMS; ++i) {
      const int64_t number = lane + i * Shape::THREADS;
      s[i] = {};
      if (!there || number >= groups) continue;
      s[i] = sum_of_group<T, DROPOUT, true>(a, mask, row, number, group);
      if (a.total)
        store_group<true>(static_cast<T*>(a.total) + row * a.columns + number * group, s[i], group);
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) sums.a += s[i].value[j];
    }
    const float about = row_sums<Shape::THREADS>(sums, scratch).a / columns;
    sums = {0.0f, 0.0f};
    BERTFAST_UNROLL
    for (int i = 0; i < Shape::ITEMS; ++i) {
      if (!there || lane + i * Shape::THREADS >= groups) continue;
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) {
        const float d = s[i].value[j] - about;
        sums.a += d;
        sums.b += d * d;
      }
    }
    const Statistics of =
        statistics_of(about, row_sums<Shape::THREADS>(sums, scratch), columns, a.eps);
    if (there && lane == 0) {
      a.statistics[row] = of.mean;
      a.statistics[a.rows + row] = of.rstd;
    }
    BERTFAST_UNROLL
    for (int i = 0; i < Shape::ITEMS; ++i) {
      const int64_t number = lane + i * Shape::THREADS;
      if (there && number < groups) store_normed<T, true>(a, s[i], of, row, number, group);
    }
  }
}

template <class T, bool DROPOUT, bool WIDE>
__global__ void __launch_bounds__(streaming_threads) forward_streaming(LayernormForward a) {
  BERTFAST_SHARED(float, scratch, 2 * streaming_threads / 32);
  const Mask<DROPOUT> mask(a.seed, a.threshold, a.site);
  const int64_t groups = divide_up(a.columns, group);
  const float columns = static_cast<float>(a.columns);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    Two sums = {0.0f, 0.0f};
    for (int64_t n = threadIdx.x; n < groups; n += streaming_threads) {
      const int64_t left = a.columns - n * group;
      const Group s = sum_of_group<T, DROPOUT, WIDE>(a, mask, row, n, left);
      if (a.total)
        store_group<WIDE>(static_cast<T*>(a.total) + row * a.columns + n * group, s, left);
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) sums.a += j < left ? s.value[j] : 0.0f;
    }
    const float about = row_sums<streaming_threads>(sums, scratch).a / columns;
    sums = {0.0f, 0.0f};
    for (int64_t n = threadIdx.x; n < groups; n += streaming_threads) {
      const int64_t left = a.columns - n * group;
      const Group s = sum_of_group<T, DROPOUT, WIDE>(a, mask, row, n, left);
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) {
        const float d = j < left ? s.value[j] - about : 0.0f;
        sums.a += d;
        sums.b += d * d;
      }
    }
    const Statistics of =
        statistics_of(about, row_sums<streaming_threads>(sums, scratch), columns, a.eps);
    if (threadIdx.x == 0) {
      a.statistics[row] = of.mean;
      a.statistics[a.rows + row] = of.rstd;
    }
    for (int64_t n = threadIdx.x; n < groups; n += streaming_threads) {
      const int64_t left = a.columns - n * group;
      const Group s = sum_of_group<T, DROPOUT, WIDE>(a, mask, row, n, left);
      store_normed<T, WIDE>(a, s, of, row, n, left);
    }
  }
}

// A group's dy and xhat, and what they add to the row's sums of g and g * xhat.
struct Pair {
  Group dy, xhat;
};

template <class T, bool WIDE>
__device__ __forceinline__ Pair load_pair(const LayernormBackward& a, Statistics of, int64_t row,
                                          int64_t number, int64_t left) {
  const int64_t at = row * a.columns + number * group;
  Pair p;
  p.dy = load_group<WIDE>(static_cast<const T*>(a.dout) + at, left);
  p.xhat = load_group<WIDE>(static_cast<const T*>(a.total) + at, left);
  BERTFAST_UNROLL
  for (int j = 0; j < group; ++j)
    p.xhat.value[j] = WIDE || j < left ? (p.xhat.value[j] - of.mean) * of.rstd : 0.0f;
  return p;
}

template <class T, bool WIDE>
__device__ __forceinline__ void add_pair(const LayernormBackward& a, const Pair& p, int64_t number,
                                         int64_t left, Two& sums) {
  const Group w =
      Parameters<T>{a.weight, a.wide_parameters}.template load<WIDE>(number * group, left);
  BERTFAST_UNROLL
  for (int j = 0; j < group; ++j) {
    const float g = p.dy.value[j] * w.value[j];
    sums.a += g;
    sums.b += g * p.xhat.value[j];
  }
}

template <class T, bool DROPOUT, bool WIDE>
__device__ __forceinline__ void store_ds(const LayernormBackward& a, const Mask<DROPOUT>& mask,
                                         const Pair& p, Statistics of, Two means, int64_t row,
                                         int64_t number, int64_t left) {
  const Group w =
      Parameters<T>{a.weight, a.wide_parameters}.template load<WIDE>(number * group, left);
  const int64_t at = row * a.columns + number * group;
  Group ds;
  BERTFAST_UNROLL
  for (int j = 0; j < group; ++j)
    ds.value[j] = of.rstd * (p.dy.value[j] * w.value[j] - means.a - p.xhat.value[j] * means.b);
  if (a.dresidual) store_group<WIDE>(static_cast<T*>(a.dresidual) + at, ds, left);
  store_group<WIDE>(static_cast<T*>(a.dx) + at, mask.apply(ds, row, number), left);
}

// The shares of dweight and dbias stay in registers while a block's rows go by.
template <class T, bool DROPOUT, class Shape>
__global__ void __launch_bounds__(Shape::BLOCK) backward(LayernormBackward a) {
  BERTFAST_SHARED(float, scratch, 2 * Shape::BLOCK / 32);
  BERTFAST_SHARED(float, shares, Shape::ROWS > 1 ? (Shape::ROWS - 1) * Shape::THREADS * group : 1);
  const Mask<DROPOUT> mask(a.seed, a.threshold, a.site);
  const int lane = threadIdx.x % Shape::THREADS, own = threadIdx.x / Shape::THREADS;
  const int64_t groups = a.columns / group;
  const float columns = static_cast<float>(a.columns);
  Group dweight[Shape::ITEMS], dbias[Shape::ITEMS];
  BERTFAST_UNROLL
  for (int i = 0; i < Shape::ITEMS; ++i) dweight[i] = dbias[i] = {};
  for (int64_t first = int64_t{Shape::ROWS} * blockIdx.x; first < a.rows;
       first += int64_t{Shape::ROWS} * gridDim.x) {
    const int64_t row = first + own;
    const bool there = row < a.rows;
    const Statistics of =
        there ? Statistics{a.statistics[row], a.statistics[a.rows + row]} : Statistics{0.0f, 0.0f};
    Pair p[Shape::ITEMS];
    Two sums = {0.0f, 0.0f};
    BERTFAST_UNROLL
    for (int i = 0; i < Shape::ITEMS; ++i) {
      const int64_t number = lane + i * Shape::THREADS;
      if (!there || number >= groups) continue;
      p[i] = load_pair<T, true>(a, of, row, number, group);
      add_pair<T, true>(a, p[i], number, group, sums);
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) {
        dweight[i].value[j] += p[i].dy.value[j] * p[i].xhat.value[j];
        dbias[i].value[j] += p[i].dy.value[j];
      }
    }
    sums = row_sums<Shape::THREADS>(sums, scratch);
    const Two means = {sums.a / columns, sums.b / columns};
    BERTFAST_UNROLL
    for (int i = 0; i < Shape::ITEMS; ++i) {
      const int64_t number = lane + i * Shape::THREADS;
      if (there && number < groups)
        store_ds<T, DROPOUT, true>(a, mask, p[i], of, means, row, number, group);
    }
  }
  float* const to = a.partial + 2 * a.columns * blockIdx.x;
  BERTFAST_UNROLL
  for (int i = 0; i < Shape::ITEMS; ++i) {
    const int64_t number = lane + i * Shape::THREADS;
    BERTFAST_UNROLL
    for (int which = 0; which < 2; ++which) {
      Group sum = which == 0 ? dweight[i] : dbias[i];
      if (Shape::ROWS > 1) {
        __syncthreads();
        BERTFAST_UNROLL
        for (int j = 0; j < group; ++j)
          if (own > 0) shares[((own - 1) * group + j) * Shape::THREADS + lane] = sum.value[j];
        __syncthreads();
        for (int other = 0; other < Shape::ROWS - 1; ++other) {
          BERTFAST_UNROLL
          for (int j = 0; j < group; ++j)
            sum.value[j] += shares[(other * group + j) * Shape::THREADS + lane];
        }
      }
      if (own == 0 && number < groups)
        store_group<true>(to + which * a.columns + number * group, sum, group);
    }
  }
}

template <class T, bool DROPOUT, bool WIDE>
__global__ void __launch_bounds__(streaming_threads) backward_streaming(LayernormBackward a) {
  BERTFAST_SHARED(float, scratch, 2 * streaming_threads / 32);
  const Mask<DROPOUT> mask(a.seed, a.threshold, a.site);
  const int64_t groups = divide_up(a.columns, group);
  const float columns = static_cast<float>(a.columns);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const Statistics of = {a.statistics[row], a.statistics[a.rows + row]};
    Two sums = {0.0f, 0.0f};
    for (int64_t n = threadIdx.x; n < groups; n += streaming_threads) {
      const int64_t left = a.columns - n * group;
      add_pair<T, WIDE>(a, load_pair<T, WIDE>(a, of, row, n, left), n, left, sums);
    }
    sums = row_sums<streaming_threads>(sums, scratch);
    const Two means = {sums.a / columns, sums.b / columns};
    for (int64_t n = threadIdx.x; n < groups; n += streaming_threads) {
      const int64_t left = a.columns - n * group;
      const Pair p = load_pair<T, WIDE>(a, of, row, n, left);
      store_ds<T, DROPOUT, WIDE>(a, mask, p, of, means, row, n, left);
    }
  }
}

// dweight and dbias of the streamed rows: a strip of columns to a block, and a share of the rows to
// each block of a strip.
template <class T, bool WIDE>
__global__ void __launch_bounds__(strip_threads) column_shares(LayernormBackward a) {
  BERTFAST_SHARED(float, shares, strip_floats);
  const int x = threadIdx.x % strip_across, y = threadIdx.x / strip_across;
  const int64_t number = int64_t{strip_across} * blockIdx.x + x;
  const int64_t left = a.columns - number * group;
  Group sum[2] = {};
  if (left > 0) {
    for (int64_t row = int64_t{strip_down} * blockIdx.y + y; row < a.rows;
         row += int64_t{strip_down} * gridDim.y) {
      const Statistics of = {a.statistics[row], a.statistics[a.rows + row]};
      const Pair p = load_pair<T, WIDE>(a, of, row, number, left);
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) {
        sum[0].value[j] += p.dy.value[j] * p.xhat.value[j];
        sum[1].value[j] += p.dy.value[j];
      }
    }
  }
  const int64_t column = int64_t{strip_columns} * blockIdx.x + threadIdx.x;
  BERTFAST_UNROLL
  for (int which = 0; which < 2; ++which) {
    const float total = strip_sum(sum[which], shares);
    if (column < a.columns) a.partial[(2 * blockIdx.y + which) * a.columns + column] = total;
  }
}

// f of the shape whose registers hold a row, the smallest, or of void where none does.
template <class F>
int with_shape(int64_t columns, F f) {
  if (columns <= InRegisters<32, 1>::most_columns) return f(InRegisters<32, 1>{});
  if (columns <= InRegisters<32, 4>::most_columns) return f(InRegisters<32, 4>{});
  if (columns <= InRegisters<128, 4>::most_columns) return f(InRegisters<128, 4>{});
  return f(InRegisters<256, 4>{});
}

bool in_registers(int64_t columns) { return columns <= InRegisters<256, 4>::most_columns; }

}  // namespace

int layernorm_forward(const LayernormForward& a, int processors, void* stream) {
  if (a.rows == 0) return 0;
  const bool wide = a.columns % group == 0 && aligned(a.x) && aligned(a.residual) &&
                    aligned(a.weight) && aligned(a.bias) && aligned(a.out) && aligned(a.total);
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (!wide || !in_registers(a.columns)) {
      auto* const kernel =
          a.seed ? (wide ? forward_streaming<T, true, true> : forward_streaming<T, true, false>)
                 : (wide ? forward_streaming<T, false, true> : forward_streaming<T, false, false>);
      const dim3 blocks(static_cast<unsigned>(smaller(a.rows, 8 * processors)));
      return launch("layernorm_forward", kernel, blocks, streaming_threads, stream, a);
    }
    return with_shape(a.columns, [&](auto shape) {
      using Shape = decltype(shape);
      const dim3 blocks(static_cast<unsigned>(
          smaller(divide_up(a.rows, Shape::ROWS), 2048 / Shape::BLOCK * processors)));
      return launch("layernorm_forward",
                    a.seed ? forward<T, true, Shape> : forward<T, false, Shape>, blocks,
                    Shape::BLOCK, stream, a);
    });
  });
}

int layernorm_backward(const LayernormBackward& a, int, void* stream) {
  const bool wide = a.columns % group == 0 && aligned(a.dout) && aligned(a.total) &&
                    aligned(a.weight) && aligned(a.dx) && aligned(a.dresidual) &&
                    aligned(a.partial);
  const dim3 blocks(static_cast<unsigned>(a.blocks));
  const int status = with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (wide && in_registers(a.columns))
      return with_shape(a.columns, [&](auto shape) {
        using Shape = decltype(shape);
        return launch("layernorm_backward",
                      a.seed ? backward<T, true, Shape> : backward<T, false, Shape>, blocks,
                      Shape::BLOCK, stream, a);
      });
    if (a.rows > 0) {
      auto* const kernel =
          a.seed
              ? (wide ? backward_streaming<T, true, true> : backward_streaming<T, true, false>)
              : (wide ? backward_streaming<T, false, true> : backward_streaming<T, false, false>);
      const int failed = launch("layernorm_backward", kernel, blocks, streaming_threads, stream, a);
      if (failed) return failed;
    }
    const dim3 grid(static_cast<unsigned>(divide_up(a.columns, strip_columns)),
                    static_cast<unsigned>(a.blocks));
    return launch("layernorm_backward (shares)",
                  wide ? column_shares<T, true> : column_shares<T, false>, grid, strip_threads,
                  stream, a);
  });
  if (status) return status;
  for (int which = 0; which < 2; ++which) {
    const int failed =
        sum_partials({a.partial + which * a.columns, which ? a.dbias : a.dweight, a.blocks,
                      a.columns, 2 * a.columns, a.dtype, a.wide_parameters},
                     stream);
    if (failed) return failed;
  }
  return 0;
}

}  // namespace bertfast
