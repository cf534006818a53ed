// Kernels that are wrong in one way each, and one that is not; test_emulation.py sees the emulation
// tell.
#include "tensor.cu"

namespace bertfast {
namespace {

struct Arguments {
  const float* in;  // 64 numbers
  float* out;       // 64 numbers
};

__global__ void reversed(Arguments a) {
  BERTFAST_SHARED(float, held, 64);
  held[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = held[63 - threadIdx.x];
}

__global__ void no_barrier(Arguments a) {
  BERTFAST_SHARED(float, held, 64);
  held[threadIdx.x] = a.in[threadIdx.x];
  a.out[threadIdx.x] = held[63 - threadIdx.x];
}

__global__ void two_writers(Arguments a) {
  BERTFAST_SHARED(float, held, 1);
  held[0] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = held[0];
}

__global__ void unwritten(Arguments a) {
  BERTFAST_SHARED(float, held, 64);
  if (threadIdx.x < 63) held[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = held[threadIdx.x];
}

__global__ void beyond_shared(Arguments a) {
  BERTFAST_SHARED(float, held, 64);
  held[threadIdx.x + 1] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = held[threadIdx.x];
}

__global__ void some_at_the_barrier(Arguments a) {
  if (threadIdx.x < 40) __syncthreads();
  a.out[threadIdx.x] = a.in[threadIdx.x];
}

__global__ void two_barriers(Arguments a) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.out[threadIdx.x] = a.in[threadIdx.x];
}

__global__ void some_at_the_shuffle(Arguments a) {
  float v = a.in[threadIdx.x];
  if (threadIdx.x % 32 != 5) v = __shfl_xor_sync(0xFFFFFFFFu, v, 1);
  a.out[threadIdx.x] = v;
}

__global__ void shuffle_outside_of_the_mask(Arguments a) {
  float v = a.in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0x0000FFFFu, v, 16);
  a.out[threadIdx.x] = v;
}

__global__ void beyond_global(Arguments a) { a.out[threadIdx.x] = a.in[threadIdx.x + 1]; }

__global__ void misaligned(Arguments a) {
  if (threadIdx.x == 0) {
    const Group g = load_group<true>(a.in + 1, group);
    store_group<true>(a.out, g, group);
  }
}

template <int WAITED, bool SWAPPED>
__global__ void product(Arguments a) {
  tensor_product<WAITED, SWAPPED>(reinterpret_cast<const Bfloat16*>(a.in), a.out);
}

__global__ void voted(Arguments a) {
  const uint32_t mask = threadIdx.x < 32 ? 0xFFFFFFFFu : 0x0000FFFFu;
  float out = 0.0f;
  if (mask >> threadIdx.x % 32 & 1u) {
    out += static_cast<float>(__ballot_sync(mask, threadIdx.x % 32 < 3 && a.in[threadIdx.x] > 0));
    if (__any_sync(mask, a.in[threadIdx.x] == 5.0f)) out += 0.5f;
    if (__all_sync(mask, a.in[threadIdx.x] < 32.0f)) out += 0.25f;
  }
  a.out[threadIdx.x] = out;
}

__global__ void some_at_the_vote(Arguments a) {
  if (threadIdx.x != 7) a.out[threadIdx.x] = __any_sync(0xFFFFFFFFu, a.in[threadIdx.x] > 0.0f);
}

__global__ void counted(Arguments a) {
  if (threadIdx.x == 0) a.out[0] = 0.0f;
  __syncthreads();
  atomicAdd(&a.out[0], a.in[threadIdx.x]);
}

}  // namespace
}  // namespace bertfast

extern "C" const char* run(const char* name, const float* in, float* out, int order, int pattern) {
  using namespace bertfast;
  auto& emulator = emulation::Emulator::the();
  emulator.order = static_cast<emulation::Order>(order);
  emulator.pattern = static_cast<uint8_t>(pattern);
  const Arguments a{in, out};
#define CASE(kernel) \
  if (std::string(name) == #kernel) launch(name, kernel, 1, 64, nullptr, a)
  CASE(reversed);
  CASE(no_barrier);
  CASE(two_writers);
  CASE(unwritten);
  CASE(beyond_shared);
  CASE(some_at_the_barrier);
  CASE(two_barriers);
  CASE(some_at_the_shuffle);
  CASE(shuffle_outside_of_the_mask);
  CASE(beyond_global);
  CASE(misaligned);
  CASE(counted);
  CASE(voted);
  CASE(some_at_the_vote);
#undef CASE
  // A is 16 x 16 and B 16 x 8, both from `in`; the product is 16 x 8.
  const std::string which(name);
  if (which == "product") launch(name, product<0, false>, 1, 32, nullptr, a);
  if (which == "product_not_waited_for") launch(name, product<1, false>, 1, 32, nullptr, a);
  if (which == "product_swapped") launch(name, product<0, true>, 1, 32, nullptr, a);
  return emulator.error.c_str();
}
