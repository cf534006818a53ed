// gelu: y = gelu(z), z = x + bias, by erf or by tanh, and its gradients.
#include "kernels.h"
#include "parallel.h"
#include "vector.h"

namespace bertfast {
namespace {

inline Floats absolute(Floats x) { return bit_cast<Floats>(bit_cast<Words>(x) & 0x7FFFFFFFu); }

// 0.5 + x * p(x^2) / q(x^2) inside |x| < limit; beyond it 1 on the right and 0 on the left.
template <int p_terms, int q_terms>
inline Floats odd_rational(Floats x, const float (&p)[p_terms], const float (&q)[q_terms],
                           float limit) {
  const Floats t = x * x;
  Floats numerator = broadcast(p[p_terms - 1]), denominator = broadcast(q[q_terms - 1]);
  for (int i = p_terms - 2; i >= 0; --i) numerator = numerator * t + p[i];
  for (int i = q_terms - 2; i >= 0; --i) denominator = denominator * t + q[i];
  const Floats inside = x * numerator / denominator + 0.5f;
  const Floats outside = x > 0.0f ? broadcast(1.0f) : Floats{};
  // The comparison is false for NaN, which then takes the inside branch and stays NaN.
  return absolute(x) >= limit ? outside : inside;
}

// The coefficients below are minimax fits of the odd functions f(x) - 1/2 in the absolute error.

// Phi(x), the normal distribution function: error 7e-9 before rounding.
inline Floats normal_cdf(Floats x) {
  constexpr float p[] = {3.98942235e-1f, 3.38524889e-2f, 4.67724838e-3f,
                         1.68823717e-4f, 6.35207404e-6f, 2.27493426e-8f};
  constexpr float q[] = {1.0f,           2.51521524e-1f, 2.86457747e-2f,
                         1.88443390e-3f, 7.36467141e-5f, 1.19750000e-6f};
  return odd_rational(x, p, q, 5.5f);
}

// d/dx x * Phi(x) = Phi(x) + x * phi(x): error 4e-9 before rounding.
inline Floats gelu_slope(Floats x) {
  constexpr float p[] = {7.97884531e-1f, -2.05656518e-2f, 1.36698693e-2f, 2.39515219e-4f,
                         3.20416285e-5f, 1.00125582e-6f,  1.22115154e-8f, -2.83681619e-11f};
  constexpr float q[] = {1.0f,           3.07557730e-1f, 4.46529986e-2f, 4.02095098e-3f,
                         2.47287576e-4f, 1.02230034e-5f, 3.31207237e-7f};
  return odd_rational(x, p, q, 5.9f);
}

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)) with u = sqrt(2/pi) * (x + 0.044715 x^3).
inline Floats tanh_cdf(Floats x) {
  const Floats minus_2u = x * (x * x * (-2.0f * 0.7978845608f * 0.044715f) - 2.0f * 0.7978845608f);
  return 1.0f / (exponential(minus_2u) + 1.0f);
}

struct Erf {
  static Floats value(Floats z) { return z * normal_cdf(z); }
  static Floats slope(Floats z) { return gelu_slope(z); }
};

struct Tanh {
  static Floats value(Floats z) { return z * tanh_cdf(z); }
  static Floats slope(Floats z) {
    // Beyond 20 the slope is 0 or 1 to the last bit, and z * z might overflow.
    z = z < -20.0f ? broadcast(-20.0f) : (z > 20.0f ? broadcast(20.0f) : z);
    const Floats s = tanh_cdf(z);
    const Floats du = z * z * (6.0f * 0.7978845608f * 0.044715f) + 2.0f * 0.7978845608f;
    return s + z * s * (1.0f - s) * du;
  }
};

template <class T, class P, class Gelu>
void forward_range(const GeluForward& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  const P* bias = static_cast<const P*>(a.bias);
  T* out = static_cast<T*>(a.out);
  while (begin < end) {
    const int64_t column = begin % a.columns;
    const int64_t count = end - begin < a.columns - column ? end - begin : a.columns - column;
    for_columns(0, count, [&](int64_t c, auto io) {
      Floats z = io.get(x + begin + c);
      if (bias) z += io.get(bias + column + c);
      io.put(out + begin + c, Gelu::value(z));
    });
    begin += count;
  }
}

// One row at a time: several rows of 4096 bytes' multiple would fight for the same cache sets.
template <class T, class P, class Gelu>
void backward_row(const GeluBackward& a, int64_t row, float* dbias) {
  const T* dout = static_cast<const T*>(a.dout) + row * a.columns;
  const T* x = static_cast<const T*>(a.x) + row * a.columns;
  const P* bias = static_cast<const P*>(a.bias);
  T* dx = static_cast<T*>(a.dx) + row * a.columns;
  for_columns(0, a.columns, [&](int64_t c, auto io) {
    const Floats dz = io.get(dout + c) * Gelu::slope(io.get(x + c) + io.get(bias + c));
    io.put(dbias + c, io.get(dbias + c) + dz);
    io.put(dx + c, dz);
  });
}

// Blocks do not depend on the number of threads (see layernorm.cpp).
template <class T, class P, class Gelu>
void backward_blocks(const GeluBackward& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* dbias = a.partial + block * a.columns;
    std::memset(dbias, 0, sizeof(float) * static_cast<size_t>(a.columns));
    const int64_t first = a.rows * block / a.blocks;
    const int64_t last = a.rows * (block + 1) / a.blocks;
    for (int64_t row = first; row < last; ++row) backward_row<T, P, Gelu>(a, row, dbias);
  }
}

template <class P>
void add_blocks(const GeluBackward& a, int64_t begin, int64_t end) {
  P* dbias = static_cast<P*>(a.dbias);
  for_columns(begin, end, [&](int64_t c, auto io) {
    Floats db = {};
    for (int64_t block = 0; block < a.blocks; ++block)
      db += io.get(a.partial + block * a.columns + c);
    io.put(dbias + c, db);
  });
}

template <class T, class Gelu>
void backward_range(const GeluBackward& a, int64_t begin, int64_t end) {
  const T* dout = static_cast<const T*>(a.dout);
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.dx);
  for_columns(begin, end, [&](int64_t i, auto io) {
    io.put(dx + i, io.get(dout + i) * Gelu::slope(io.get(x + i)));
  });
}

template <class T, class P, class Gelu>
void forward(const GeluForward& a) {
  const int64_t elements = a.rows * a.columns;
  parallel(a.threads, elements, elements,
           [&](int64_t begin, int64_t end) { forward_range<T, P, Gelu>(a, begin, end); });
}

template <class T, class P, class Gelu>
void backward(const GeluBackward& a) {
  const int64_t elements = a.rows * a.columns;
  if (!a.bias) {
    parallel(a.threads, elements, elements,
             [&](int64_t begin, int64_t end) { backward_range<T, Gelu>(a, begin, end); });
    return;
  }
  parallel(a.threads, a.blocks, elements,
           [&](int64_t begin, int64_t end) { backward_blocks<T, P, Gelu>(a, begin, end); });
  parallel(a.threads, a.columns, a.blocks * a.columns,
           [&](int64_t begin, int64_t end) { add_blocks<P>(a, begin, end); });
}

template <class T, class P>
void forward_either(const GeluForward& a) {
  a.tanh ? forward<T, P, Tanh>(a) : forward<T, P, Erf>(a);
}

template <class T, class P>
void backward_either(const GeluBackward& a) {
  a.tanh ? backward<T, P, Tanh>(a) : backward<T, P, Erf>(a);
}

}  // namespace

namespace BERTFAST_ISA {

void gelu_forward(const GeluForward& a) {
  if (a.dtype == Dtype::float32)
    forward_either<float, float>(a);
  else if (a.parameter_dtype == Dtype::float32)
    forward_either<Bfloat16, float>(a);
  else
    forward_either<Bfloat16, Bfloat16>(a);
}

void gelu_backward(const GeluBackward& a) {
  if (a.dtype == Dtype::float32)
    backward_either<float, float>(a);
  else if (a.parameter_dtype == Dtype::float32)
    backward_either<Bfloat16, float>(a);
  else
    backward_either<Bfloat16, Bfloat16>(a);
}

}  // namespace BERTFAST_ISA
}  // namespace bertfast
