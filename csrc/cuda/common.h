// What all CUDA kernels share: types, 16-byte accesses, the dropout mask, sums over a warp or a
// block, launches. Under BERTFAST_EMULATION the same sources are C++ for the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(BERTFAST_EMULATION)
#include "../emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../philox.h"
#include "kernels.h"

namespace bertfast {
namespace {

#if defined(BERTFAST_EMULATION)
#define BERTFAST_UNROLL
#define BERTFAST_KEEP_LOOP
#define BERTFAST_UNROLL_TWICE
#else
#define BERTFAST_UNROLL _Pragma("unroll")
#define BERTFAST_KEEP_LOOP _Pragma("unroll 1")
#define BERTFAST_UNROLL_TWICE _Pragma("unroll 2")
#endif

// An array in the block's shared memory. Not initialised.
#if defined(BERTFAST_EMULATION)
#define BERTFAST_SHARED(type, name, count) \
  static char name##_key;                  \
  type* const name =                       \
      static_cast<type*>(emulation::Emulator::the().shared(&name##_key, sizeof(type) * (count)))
#else
#define BERTFAST_SHARED(type, name, count) __shared__ type name[count]
#endif

// All of the block's dynamic shared memory, on 16 bytes.
#if defined(BERTFAST_EMULATION)
#define BERTFAST_DYNAMIC_SHARED(name) \
  uint4* const name = static_cast<uint4*>(emulation::Emulator::the().dynamic_shared())
#else
#define BERTFAST_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

// Bits, converted by the functions below, so that device and emulation have one type.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }

__device__ __forceinline__ float to_float(Bfloat16 v) {
#if defined(BERTFAST_EMULATION)
  return emulation::from_bits<float>(uint64_t{v.bits} << 16);
#else
  return __uint_as_float(uint32_t{v.bits} << 16);
#endif
}

__device__ __forceinline__ float to_float(Half v) {
#if defined(BERTFAST_EMULATION)
  return emulation::half_to_float(v.bits);
#else
  return __half2float(__ushort_as_half(v.bits));
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float v);

template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}

template <>
__device__ __forceinline__ Bfloat16 from_float<Bfloat16>(float v) {
#if defined(BERTFAST_EMULATION)
  if (std::isnan(v)) return {0x7FFF};
  const uint32_t bits = static_cast<uint32_t>(emulation::to_bits(v));
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#endif
}

template <>
__device__ __forceinline__ Half from_float<Half>(float v) {
#if defined(BERTFAST_EMULATION)
  return {static_cast<uint16_t>(emulation::to_bits(static_cast<_Float16>(v)))};
#else
  return {__half_as_ushort(__float2half_rn(v))};
#endif
}

// Eight neighbouring elements, which share one call of Philox, in float32.
constexpr int group = 8;
struct Group {
  float value[group];
};

// The elements that 16 bytes hold.
template <class T>
struct alignas(16) Sixteen {
  T value[16 / sizeof(T)];
};

// Spelt out: a plain store of what was copied together became four of 4 bytes in a loop.
__device__ __forceinline__ void store_sixteen(uint4* p, uint4 words) {
#if defined(BERTFAST_EMULATION)
  emulation::Emulator::the().check_aligned(p, "a store of 16 bytes");
  *p = words;
#else
  __stcg(p, words);
#endif
}

__device__ __forceinline__ uint4 load_sixteen(const uint4* p) {
#if defined(BERTFAST_EMULATION)
  emulation::Emulator::the().check_aligned(p, "a load of 16 bytes");
#endif
  return *p;
}

// Eight elements from p on, in 16-byte accesses if WIDE, else as many of them as are `left`; the
// rest are 0.
template <bool WIDE, class T>
__device__ __forceinline__ Group load_group(const T* p, int64_t left) {
  Group g;
  if (WIDE) {
    constexpr int each = 16 / sizeof(T);
    BERTFAST_UNROLL
    for (int i = 0; i < group / each; ++i) {
      const uint4 words = load_sixteen(reinterpret_cast<const uint4*>(p) + i);
      Sixteen<T> part;
      memcpy(&part, &words, 16);
      BERTFAST_UNROLL
      for (int j = 0; j < each; ++j) g.value[i * each + j] = to_float(part.value[j]);
    }
  } else {
    BERTFAST_UNROLL
    for (int j = 0; j < group; ++j) g.value[j] = j < left ? to_float(p[j]) : 0.0f;
  }
  return g;
}

template <bool WIDE, class T>
__device__ __forceinline__ void store_group(T* p, const Group& g, int64_t left) {
  if (WIDE) {
    constexpr int each = 16 / sizeof(T);
    BERTFAST_UNROLL
    for (int i = 0; i < group / each; ++i) {
      Sixteen<T> part;
      BERTFAST_UNROLL
      for (int j = 0; j < each; ++j) part.value[j] = from_float<T>(g.value[i * each + j]);
      uint4 words;
      memcpy(&words, &part, 16);
      store_sixteen(reinterpret_cast<uint4*>(p) + i, words);
    }
  } else {
    BERTFAST_UNROLL
    for (int j = 0; j < group; ++j)
      if (j < left) p[j] = from_float<T>(g.value[j]);
  }
}

// A vector of parameters, in float32 or the activations' dtype T.
template <class T>
struct Parameters {
  const void* data;
  bool wide;  // float32, whatever T is

  template <bool WIDE>
  __device__ __forceinline__ Group load(int64_t column, int64_t left) const {
    return wide ? load_group<WIDE>(static_cast<const float*>(data) + column, left)
                : load_group<WIDE>(static_cast<const T*>(data) + column, left);
  }
};

// One element of a gradient that has its parameter's dtype.
template <class T>
__device__ __forceinline__ void store_parameter(void* p, bool wide, int64_t column, float v) {
  if (wide)
    static_cast<float*>(p)[column] = v;
  else
    static_cast<T*>(p)[column] = from_float<T>(v);
}

// The dropout mask of the rows' groups; DROPOUT false keeps everything and draws nothing.
template <bool DROPOUT>
struct Mask {
  uint64_t seed = 0;
  uint32_t threshold, site;
  float scale;

  __device__ __forceinline__ Mask(const int64_t* seed_, uint32_t threshold_, uint32_t site_)
      : threshold(threshold_), site(site_), scale(dropout_scale(threshold_)) {
    if (DROPOUT) seed = static_cast<uint64_t>(*seed_);
  }

  // mask * g / (1 - p)
  __device__ __forceinline__ Group apply(Group g, int64_t row, int64_t number) const {
    if (DROPOUT) {
      const PhiloxWords drawn =
          philox(static_cast<uint32_t>(number), static_cast<uint64_t>(row), site, seed);
      BERTFAST_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = drawn.word[i];
        g.value[2 * i] = (word & 0xFFFFu) >= threshold ? g.value[2 * i] * scale : 0.0f;
        g.value[2 * i + 1] = (word >> 16) >= threshold ? g.value[2 * i + 1] * scale : 0.0f;
      }
    }
    return g;
  }
};

struct Two {
  float a, b;
};

// The sums of a and b over the THREADS neighbouring threads that share a row, the same in each:
// those of a warp, or of the whole block, through `scratch` (two floats for each warp).
template <int THREADS>
__device__ __forceinline__ Two row_sums(Two v, float* scratch) {
  BERTFAST_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    v.a += __shfl_xor_sync(0xFFFFFFFFu, v.a, lanes);
    v.b += __shfl_xor_sync(0xFFFFFFFFu, v.b, lanes);
  }
  if (THREADS > 32) {
    constexpr int warps = THREADS / 32;
    const int warp = threadIdx.x / 32;
    // What is there from the sum before has been read by all.
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      scratch[2 * warp] = v.a;
      scratch[2 * warp + 1] = v.b;
    }
    __syncthreads();
    v = {0.0f, 0.0f};
    BERTFAST_UNROLL
    for (int i = 0; i < warps; ++i) {
      v.a += scratch[2 * i];
      v.b += scratch[2 * i + 1];
    }
  }
  return v;
}

BERTFAST_HOST_DEVICE int64_t divide_up(int64_t n, int64_t by) { return n / by + (n % by != 0); }

BERTFAST_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Every element that a group starts at lies on 16 bytes.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// f of a value of the dtype's type.
template <class F>
int with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::bfloat16:
      return f(Bfloat16{});
    default:
      return f(Half{});
  }
}

// Launches a kernel of one argument with `shared` bytes of dynamic shared memory; the status is
// CUDA's.
template <class Arguments>
int launch(const char* name, void (*kernel)(Arguments), dim3 blocks, dim3 threads, void* stream,
           const typename std::common_type<Arguments>::type& arguments, int64_t shared = 0) {
#if defined(BERTFAST_EMULATION)
  (void)stream;
  return emulation::Emulator::the().run(blocks, threads, shared, name, [&] { kernel(arguments); });
#else
  (void)name;
  const void* function = reinterpret_cast<const void*>(kernel);
  // More than what every device gives unasked; the limit is kept by device.
  if (shared > 48 * 1024)
    if (const cudaError_t failed = cudaFuncSetAttribute(
            function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)))
      return static_cast<int>(failed);
  void* list[] = {const_cast<Arguments*>(&arguments)};
  return static_cast<int>(cudaLaunchKernel(function, blocks, threads, list,
                                           static_cast<size_t>(shared),
                                           static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace
}  // namespace bertfast
