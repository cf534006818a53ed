// A vector of floats as wide as the instruction set's registers, on the compiler's own vector
// types, so that one source serves every set. Intrinsics appear only where the compiler has no
// pattern.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bertfast {
namespace {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

typedef float Floats __attribute__((vector_size(width * 4)));
typedef int32_t Ints __attribute__((vector_size(width * 4)));
typedef uint32_t Words __attribute__((vector_size(width * 4)));
typedef uint16_t Halves __attribute__((vector_size(width * 2)));
typedef uint64_t Longs __attribute__((vector_size(width * 4)));

// Storage of a bfloat16: the upper half of a float's bits.
struct Bfloat16 {
  uint16_t bits;
};

inline Floats broadcast(float value) { return value - Floats{}; }

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }

inline Floats load(const Bfloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof(halves));
  return bit_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(Bfloat16* p, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  const Words bits = bit_cast<Words>(v);
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words quiet_nan = (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector(v == v ? rounded : quiet_nan, Halves);
#endif
  std::memcpy(p, &halves, sizeof(Bfloat16) * width);
}

// The first `count` elements, 0 < count < width; the others are zero and are not touched in memory.
template <class T>
inline Floats load_first(const T* p, int64_t count) {
  T buffer[width] = {};
  std::memcpy(buffer, p, sizeof(T) * static_cast<size_t>(count));
  return load(buffer);
}

template <class T>
inline void store_first(T* p, Floats v, int64_t count) {
  T buffer[width];
  store(buffer, v);
  std::memcpy(p, buffer, sizeof(T) * static_cast<size_t>(count));
}

// The value that storage as a T will give back.
inline Floats as_stored(const float*, Floats v) { return v; }

inline Floats as_stored(const Bfloat16*, Floats v) {
  Bfloat16 buffer[width];
  store(buffer, v);
  return load(buffer);
}

// A product that is rounded here: the compiler may not fuse it into a multiply-add. For where a
// difference of two products must vanish when they are the same.
inline Floats rounded(Floats product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// v in the first `count` lanes, `other` in the rest.
inline Floats first_lanes(Floats v, int64_t count, Floats other) {
  Ints lane;
  for (int i = 0; i < width; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count) ? v : other;
}

// Folds a vector in halves until one lane is left. Through memory the loop would wait for each store.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BERTFAST_SHUFFLE 1
#endif
#endif

template <int half>
inline Floats upper_lanes(Floats v) {
#if defined(BERTFAST_SHUFFLE)
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, v, half, half + 1, (half + 2) % 16, (half + 3) % 16,
                                 (half + 4) % 16, (half + 5) % 16, (half + 6) % 16, (half + 7) % 16,
                                 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, half, half + 1, (half + 2) % 8, (half + 3) % 8, 4, 5, 6, 7);
#else
  return __builtin_shufflevector(v, v, half, half + 1, 2, 3);
#endif
#else
  Floats upper = v;
  for (int i = 0; i < half; ++i) upper[i] = v[i + half];
  return upper;
#endif
}

template <class Fold>
inline float fold(Floats v, const Fold& with) {
#if defined(__AVX512F__)
  v = with(v, upper_lanes<8>(v));
#endif
#if defined(__AVX2__)
  v = with(v, upper_lanes<4>(v));
#endif
  v = with(v, upper_lanes<2>(v));
  return with(v, upper_lanes<1>(v))[0];
}

inline float sum(Floats v) {
  return fold(v, [](Floats a, Floats b) { return a + b; });
}

inline float largest(Floats v) {
  return fold(v, [](Floats a, Floats b) { return a > b ? a : b; });
}

// Asks for what is needed later while there is something else to do. An address behind the end is
// harmless.
template <class T>
inline void prefetch(const T* p, int64_t offset) {
  // As a number: a pointer may not even be formed behind the end.
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + sizeof(T) * static_cast<uint64_t>(offset);
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
}

// How for_columns lets its body load and store: a full vector, or at the end only the elements that
// are there.
struct Full {
  template <class T>
  static Floats get(const T* p) {
    return load(p);
  }
  template <class T>
  static void put(T* p, Floats v) {
    store(p, v);
  }
  // Elements that are not there must not count in a sum.
  static Floats counted(Floats v) { return v; }
};

struct First {
  int64_t count;
  template <class T>
  Floats get(const T* p) const {
    return load_first(p, count);
  }
  template <class T>
  void put(T* p, Floats v) const {
    store_first(p, v, count);
  }
  Floats counted(Floats v) const {
    float lanes[width];
    store(lanes, v);
    for (int64_t i = count; i < width; ++i) lanes[i] = 0.0f;
    return load(lanes);
  }
};

// Calls body(column, io) for the columns of [begin, end), a vector at a time; io is Full or First.
template <class Body>
inline __attribute__((always_inline)) void for_columns(int64_t begin, int64_t end, Body body) {
  int64_t column = begin;
  for (; column + width <= end; column += width) body(column, Full{});
  if (column < end) body(column, First{end - column});
}

// exp(x): 2^n * e^r with |r| <= ln(2)/2, where 1 + r + r^2 p(r) is a minimax fit of e^r with a
// relative error of 3e-9 before rounding. 0 below -87, infinity above 88.
inline Floats exponential(Floats x) {
  const Floats lowest = broadcast(-87.0f), highest = broadcast(88.0f);
  const Floats clamped = x < lowest ? lowest : (x > highest ? highest : x);
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the sum's low bits.
  const Floats magic = broadcast(12582912.0f);
  const Floats shifted = clamped * 1.44269504f + magic;
  const Floats n = shifted - magic;
  // ln(2) in two parts, the first short enough for its product with n to be exact.
  Floats r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = broadcast(1.381454e-3f);
  p = p * r + 8.36874511e-3f;
  p = p * r + 4.16683908e-2f;
  p = p * r + 1.66665204e-1f;
  p = p * r + 4.99999934e-1f;
  p = p * r * r + r + 1.0f;
  const Words exponent = bit_cast<Words>(shifted) << 23;
  const Floats scaled = bit_cast<Floats>(bit_cast<Words>(p) + exponent);
  return x < lowest ? Floats{} : (x > highest ? broadcast(__builtin_inff()) : scaled);
}

constexpr float log2_e = 1.44269504f;

// 2^x for x <= 127, a minimax fit on |r| <= 1/2 with a relative error of 9e-8 before rounding.
// Below the normal numbers it is 0 or, with AVX-512, subnormal; of minus infinity 0; NaN stays NaN.
inline Floats power_of_two(Floats x) {
  const Floats magic = broadcast(12582912.0f);
#if defined(__AVX512F__)
  // Returns its second operand where one is NaN. 2^-200 is 0, without what -inf does to r.
  const Floats bounded = reinterpret_cast<Floats>(
      _mm512_maskz_max_ps(0xFFFF, _mm512_set1_ps(-200.0f), reinterpret_cast<__m512>(x)));
#else
  const Floats bounded = x;
#endif
  const Floats shifted = bounded + magic;
  const Floats n = shifted - magic;
  const Floats r = bounded - n;
  Floats p = broadcast(1.326472727e-3f);
  p = p * r + 9.671512756e-3f;
  p = p * r + 5.550733744e-2f;
  p = p * r + 2.402224208e-1f;
  p = p * r + 6.931469776e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_maskz_scalef_ps(0xFFFF, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const Floats scaled = bit_cast<Floats>(bit_cast<Words>(p) + (bit_cast<Words>(shifted) << 23));
  return x >= -126.0f ? scaled : (x < -126.0f ? Floats{} : x);
#endif
}

}  // namespace
}  // namespace bertfast
