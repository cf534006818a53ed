// dropout: y = mask * x / (1 - p), by rows. Its gradient is the same on the incoming gradient.
#include "dropout.h"
#include "kernels.h"
#include "parallel.h"
#include "vector.h"

namespace bertfast {
namespace {

// The pieces of all rows are shared out, so that one long row keeps every thread busy as well as
// many short ones do; what a piece draws depends on where it is alone.
template <class T>
void pieces(const Dropout& a, int64_t per_row, int64_t begin, int64_t end) {
  RowMask mask(a.seed, a.threshold, a.site);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / per_row, first = i % per_row * RowMask::piece;
    const int64_t left = a.columns - first;
    const int64_t count = left < RowMask::piece ? left : RowMask::piece;
    const int64_t offset = row * a.columns + first;
    const T* x = static_cast<const T*>(a.x) + offset;
    T* out = static_cast<T*>(a.out) + offset;
    mask.draw(row, first, count);
    for_columns(0, count,
                [&](int64_t c, auto io) { io.put(out + c, mask.apply(io.get(x + c), c)); });
  }
}

template <class T>
void forward(const Dropout& a) {
  const int64_t per_row = a.columns / RowMask::piece + (a.columns % RowMask::piece != 0);
  parallel(a.threads, a.rows * per_row, a.rows * a.columns,
           [&](int64_t begin, int64_t end) { pieces<T>(a, per_row, begin, end); });
}

}  // namespace

namespace BERTFAST_ISA {

void dropout(const Dropout& a) {
  a.dtype == Dtype::float32 ? forward<float>(a) : forward<Bfloat16>(a);
}

}  // namespace BERTFAST_ISA
}  // namespace bertfast
