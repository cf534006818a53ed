// One product on tensor cores, from global memory to global memory: for the emulation, and for what
// nvcc makes of it.
#include "cuda/tensor.h"

namespace bertfast {
namespace {

// out (16 x 8, float32) = A (16 x 16) B (16 x 8); both lie in `in`, A first, rows one after another.
// WAITED later groups of copies are not waited for, and SWAPPED hands over A's registers in a wrong
// order.
template <int WAITED, bool SWAPPED>
__device__ void tensor_product(const Bfloat16* in, float* out) {
  BERTFAST_SHARED(uint4, held, 32 + 16);
  const int lane = threadIdx.x;
  copy_async(held + lane, in + 8 * lane);
  copy_async(held + 32 + lane % 16, in + 256 + 8 * (lane % 16), lane < 16 || WAITED == 0);
  commit_copies();
  wait_for_copies<WAITED>();
  __syncthreads();
  uint32_t a[4], b[4];
  // Rows of A are two pieces of 16 bytes: matrices (rows 0-7, first half), (8-15, first), ...
  load_matrices<false>(a, held + lane % 16 * 2 + lane / 16);
  load_matrices<true>(b, held + 32 + lane % 16);
  const uint32_t left[4] = {a[0], SWAPPED ? a[2] : a[1], SWAPPED ? a[1] : a[2], a[3]};
  float sums[4] = {};
  multiply<Bfloat16>(sums, left, b[0], b[1]);
  const int row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}

}  // namespace
}  // namespace bertfast

#if !defined(BERTFAST_EMULATION)
extern "C" __global__ void tensor_product_kernel(const bertfast::Bfloat16* in, float* out) {
  bertfast::tensor_product<0, false>(in, out);
}
#endif
