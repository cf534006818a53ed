// layernorm: s = residual + dropout(x), y = (s - mean) * rstd * weight + bias, and its gradients.
#include "dropout.h"
#include "kernels.h"
#include "norm.h"
#include "parallel.h"
#include "vector.h"

namespace bertfast {
namespace {

template <class T, class P>
bool forward_rows(const LayernormForward& a, int64_t begin, int64_t end) {
  const int64_t columns = a.columns;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  const P* weight = static_cast<const P*>(a.weight);
  const P* bias = static_cast<const P*>(a.bias);
  T* out = static_cast<T*>(a.out);
  T* total = static_cast<T*>(a.total);
  Row buffer(columns);
  float* row = buffer.data();
  if (!row) return false;
  RowMask mask(a.seed, a.threshold, a.site);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t offset = r * columns;
    Floats sums = {};
    for_pieces(columns, [&](int64_t first, int64_t last) {
      if (a.seed) mask.draw(r, first, last - first);
      for_columns(first, last, [&](int64_t c, auto io) {
        Floats v = io.get(x + offset + c);
        if (a.seed) v = mask.apply(v, c - first);
        if (residual) v += io.get(residual + offset + c);
        // The statistics must be those of the sum that backward will read, rounding included.
        v = as_stored(x, v);
        io.put(row + c, v);
        if (total) io.put(total + offset + c, v);
        sums += io.counted(v);
      });
    });
    const Statistics statistics = row_statistics(
        row, columns, sums, a.eps, [&](int64_t c) { prefetch(x, offset + columns + c); });
    for_columns(0, columns, [&](int64_t c, auto io) {
      if (residual) prefetch(residual, offset + columns + c);
      const Floats xhat = statistics.xhat(io.get(row + c));
      io.put(out + offset + c, xhat * io.get(weight + c) + io.get(bias + c));
    });
    a.statistics[r] = statistics.mean;
    a.statistics[a.rows + r] = statistics.rstd;
  }
  return true;
}

template <class T, class P>
void backward_range(const LayernormBackward& a, int64_t begin, int64_t end) {
  const int64_t columns = a.columns;
  const P* weight = static_cast<const P*>(a.weight);
  RowMask masks[rows_together] = {
      {a.seed, a.threshold, a.site},
      {a.seed, a.threshold, a.site},
      {a.seed, a.threshold, a.site},
      {a.seed, a.threshold, a.site},
  };
  const auto rows = [&](auto number, int64_t row, float* dweight, float* dbias) {
    constexpr int count = decltype(number)::value;
    const T* dout = static_cast<const T*>(a.dout) + row * columns;
    const T* total = static_cast<const T*>(a.total) + row * columns;
    T* dx = static_cast<T*>(a.dx) + row * columns;
    T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + row * columns : nullptr;
    const auto draw = [&](int64_t first, int64_t last) {
      if (a.seed)
        for (int r = 0; r < count; ++r) masks[r].draw(row + r, first, last - first);
    };
    const auto put = [&](int r, int64_t c, Floats ds, int64_t first, auto io) {
      const int64_t at = r * columns + c;
      prefetch(dout, at + count * columns);
      prefetch(total, at + count * columns);
      if (dresidual) io.put(dresidual + at, ds);
      if (a.seed) ds = masks[r].apply(ds, c - first);
      io.put(dx + at, ds);
    };
    backward_rows<count>(total, dout, weight, a.statistics + row, a.statistics + a.rows + row,
                         columns, dweight, dbias, draw, put);
  };
  backward_blocks(a.rows, columns, a.blocks, a.partial, begin, end, rows);
}

template <class T, class P>
bool forward(const LayernormForward& a) {
  int failures = 0;
  parallel(a.threads, a.rows, a.rows * a.columns, [&](int64_t begin, int64_t end) {
    if (!forward_rows<T, P>(a, begin, end)) __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
  });
  return failures == 0;
}

template <class T, class P>
void backward(const LayernormBackward& a) {
  parallel(a.threads, a.blocks, a.rows * a.columns,
           [&](int64_t begin, int64_t end) { backward_range<T, P>(a, begin, end); });
  parallel(a.threads, a.columns, a.blocks * a.columns, [&](int64_t begin, int64_t end) {
    add_blocks(a.partial, a.blocks, a.columns, static_cast<P*>(a.dweight), static_cast<P*>(a.dbias),
               begin, end);
  });
}

}  // namespace

namespace BERTFAST_ISA {

bool layernorm_forward(const LayernormForward& a) {
  if (a.dtype == Dtype::float32) return forward<float, float>(a);
  if (a.parameter_dtype == Dtype::float32) return forward<Bfloat16, float>(a);
  return forward<Bfloat16, Bfloat16>(a);
}

void layernorm_backward(const LayernormBackward& a) {
  if (a.dtype == Dtype::float32)
    backward<float, float>(a);
  else if (a.parameter_dtype == Dtype::float32)
    backward<Bfloat16, float>(a);
  else
    backward<Bfloat16, Bfloat16>(a);
}

}  // namespace BERTFAST_ISA
}  // namespace bertfast
