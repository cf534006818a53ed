// dropout: y = mask * x / (1 - p), by rows. Its gradient is the same on the incoming gradient.
#include "common.h"
#include "kernels.h"

namespace bertfast {
namespace {

constexpr int threads = 256;

// One group of eight columns, one call of Philox, to a thread.
template <class T, bool WIDE>
__global__ void __launch_bounds__(threads) forward(Dropout a) {
  const Mask<true> mask(a.seed, a.threshold, a.site);
  const int64_t per_row = divide_up(a.columns, group), groups = a.rows * per_row;
  const int64_t step = int64_t{threads} * gridDim.x;
  for (int64_t i = int64_t{threads} * blockIdx.x + threadIdx.x; i < groups; i += step) {
    const int64_t row = i / per_row, number = i - row * per_row;
    const int64_t at = row * a.columns + number * group, left = a.columns - number * group;
    const Group x = load_group<WIDE>(static_cast<const T*>(a.x) + at, left);
    store_group<WIDE>(static_cast<T*>(a.out) + at, mask.apply(x, row, number), left);
  }
}

}  // namespace

int dropout(const Dropout& a, int processors, void* stream) {
  const int64_t groups = a.rows * divide_up(a.columns, group);
  if (groups == 0) return 0;
  const bool wide = a.columns % group == 0 && aligned(a.x) && aligned(a.out);
  const dim3 blocks(static_cast<unsigned>(smaller(divide_up(groups, threads), 16 * processors)));
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    return launch("dropout", wide ? forward<T, true> : forward<T, false>, blocks, threads, stream,
                  a);
  });
}

}  // namespace bertfast
