// Small matrix products in registers, what attention and cross_entropy are made of.
//
// C (rows, columns) = A (rows, depth) B (depth, columns), C in float. The depth is counted in
// *units* of 32 bits: a float, or a pair of bfloat16 that one instruction multiplies and adds up. A
// is read a unit at a time from anywhere; B is packed into panels, each `depth` rows of
// panel_columns units, so that the inner loop reads it a vector at a time from start to end.
#pragma once

#include <cstdint>

#include "vector.h"

namespace bertfast {
namespace {

// A tile of C stays in registers: 6 x 4 vectors, the panel's row and one element of A fill 32.
constexpr int tile_rows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int panel_vectors = 4;
#else
constexpr int panel_vectors = 2;
#endif
constexpr int panel_columns = panel_vectors * width;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One number a unit. bfloat16 is widened when it is packed.
struct FloatUnits {
  using Unit = float;
  using Vector = Floats;
  static constexpr int per_unit = 1;

  static Vector vector_of(Unit unit) { return broadcast(unit); }
  static Vector load_units(const Unit* p) { return load(p); }
  static Floats multiply_add(Floats sum, Vector a, Vector b) { return sum + a * b; }

  // `width` units from `count` numbers in memory, count > 0; what is not there is zero.
  template <class T>
  static Words row(const T* p, int64_t count) {
    return bit_cast<Words>(count >= width ? load(p) : load_first(p, count));
  }
  // Units for one vector of columns of a panel, from rows 0 .. per_unit - 1 of the source.
  template <class T>
  static Words columns(const T* p, int64_t, int64_t, int64_t count) {
    return row(p, count);
  }

  // A computed left operand, by rows: columns [c, c + width) of the row.
  static void put(Unit* row, int64_t c, Floats v) { store(row + c, v); }
  // And by columns: the same two columns' vectors of rows r and r + 1, r even, for a product over
  // the rows.
  static void put_rows(Unit* base, int64_t stride, int64_t r, int64_t c, Floats v0, Floats v1) {
    store(base + r * stride + c, v0);
    store(base + (r + 1) * stride + c, v1);
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 a unit, the one with the lower index in the low half.
struct PairUnits {
  using Unit = uint32_t;
  using Vector = Words;
  static constexpr int per_unit = 2;

  static Vector vector_of(Unit unit) { return unit - Words{}; }
  static Vector load_units(const Unit* p) {
    Words v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Floats multiply_add(Floats sum, Vector a, Vector b) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                     reinterpret_cast<__m512bh>(a),
                                                     reinterpret_cast<__m512bh>(b)));
  }

  static Words row(const Bfloat16* p, int64_t count) {
    Words v = {};
    if (count >= 2 * width)
      std::memcpy(&v, p, sizeof(v));
    else
      std::memcpy(&v, p, sizeof(Bfloat16) * static_cast<size_t>(count));
    return v;
  }
  static Words columns(const Bfloat16* p, int64_t stride, int64_t rows, int64_t count) {
    Halves low = {}, high = {};
    if (count >= width) {
      std::memcpy(&low, p, sizeof(low));
      if (rows > 1) std::memcpy(&high, p + stride, sizeof(high));
    } else {
      const size_t size = sizeof(Bfloat16) * static_cast<size_t>(count);
      std::memcpy(&low, p, size);
      if (rows > 1) std::memcpy(&high, p + stride, size);
    }
    return __builtin_convertvector(low, Words) | (__builtin_convertvector(high, Words) << 16);
  }

  static void put(Unit* row, int64_t c, Floats v) {
    store(reinterpret_cast<Bfloat16*>(row) + c, v);
  }
  static void put_rows(Unit* base, int64_t stride, int64_t r, int64_t c, Floats v0, Floats v1) {
    const __m512bh halves =
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(v1), reinterpret_cast<__m512>(v0));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i pairs =
        _mm512_maskz_permutexvar_epi16(0xFFFFFFFF, order, reinterpret_cast<__m512i>(halves));
    _mm512_storeu_si512(base + r / 2 * stride + c, pairs);
  }
};
#endif

#if defined(__AVX512BF16__)
using Bfloat16Units = PairUnits;
#else
using Bfloat16Units = FloatUnits;
#endif

template <class Units>
constexpr int64_t units(int64_t numbers) {
  return (numbers + Units::per_unit - 1) / Units::per_unit;
}

// Stage by stage the blocks off the diagonal change places: after `width` = 2^n rows went through
// n stages, row i holds what was column i.
#if defined(BERTFAST_SHUFFLE)
template <int step, int... lanes>
inline void exchange(Words& a, Words& b) {
  const Words first =
      __builtin_shufflevector(a, b, ((lanes & step) ? width + lanes - step : lanes)...);
  b = __builtin_shufflevector(a, b, ((lanes & step) ? width + lanes : lanes + step)...);
  a = first;
}

template <int step>
inline __attribute__((always_inline)) void exchange_rows(Words (&rows)[width]) {
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    if (i & step) continue;
#if defined(__AVX512F__)
    exchange<step, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[i], rows[i + step]);
#elif defined(__AVX2__)
    exchange<step, 0, 1, 2, 3, 4, 5, 6, 7>(rows[i], rows[i + step]);
#else
    exchange<step, 0, 1, 2, 3>(rows[i], rows[i + step]);
#endif
  }
}

inline __attribute__((always_inline)) void transpose(Words (&rows)[width]) {
  exchange_rows<1>(rows);
  exchange_rows<2>(rows);
#if defined(__AVX2__)
  exchange_rows<4>(rows);
#endif
#if defined(__AVX512F__)
  exchange_rows<8>(rows);
#endif
}
#else
inline void transpose(Words (&rows)[width]) {
  for (int i = 0; i < width; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t other = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = other;
    }
}
#endif

template <class Unit>
inline void put_words(Unit* p, Words v) {
  static_assert(sizeof(Unit) == 4, "a unit is a word");
  std::memcpy(p, &v, sizeof(v));
}

// Rows of a tensor of many heads are pages apart, where no hardware prefetcher follows.
constexpr int64_t rows_ahead = 16;

template <class T>
inline void prefetch_row(const T* from, int64_t row, int64_t stride, int64_t columns) {
  for (int64_t c = 0; c < columns; c += static_cast<int64_t>(64 / sizeof(T)))
    prefetch(from, (row + rows_ahead) * stride + c);
}

// A left operand from `rows` rows of `columns` numbers: (rows, units), zero behind the last number
// up to a whole vector.
template <class Units, class T>
inline void pack_left(typename Units::Unit* to, int64_t to_stride, const T* from,
                      int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr int64_t step = width * Units::per_unit;
  for (int64_t r = 0; r < rows; ++r) {
    prefetch_row(from, r, from_stride, columns);
    for (int64_t c = 0; c < columns; c += step)
      put_words(to + r * to_stride + c / Units::per_unit,
                Units::row(from + r * from_stride + c, columns - c));
  }
}

// A packed left operand as the numbers it is made of, to pack it once more.
inline const float* left_numbers(const float* left) { return left; }
inline const Bfloat16* left_numbers(const uint32_t* left) {
  return reinterpret_cast<const Bfloat16*>(left);
}

// Panels of B = the source, whose rows are the depth. A panel has room for `panel_stride` units.
template <class Units, class T>
inline void pack_panels(typename Units::Unit* to, int64_t panel_stride, const T* from,
                        int64_t from_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += Units::per_unit) {
    for (int64_t i = 0; i < Units::per_unit; ++i) prefetch_row(from, r + i, from_stride, columns);
    typename Units::Unit* panel = to + r / Units::per_unit * panel_columns;
    for (int64_t c = 0; c < columns; c += width)
      put_words(panel + c / panel_columns * panel_stride + c % panel_columns,
                Units::columns(from + r * from_stride + c, from_stride, rows - r, columns - c));
  }
}

// Panels of B = the source transposed: its columns are the depth, its rows B's columns.
template <class Units, class T>
inline void pack_transposed(typename Units::Unit* to, int64_t panel_stride, const T* from,
                            int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr int64_t step = width * Units::per_unit;
  for (int64_t r = 0; r < rows; r += width) {
    typename Units::Unit* panel = to + r / panel_columns * panel_stride + r % panel_columns;
    for (int64_t i = 0; i < width; ++i) prefetch_row(from, r + i, from_stride, columns);
    for (int64_t c = 0; c < columns; c += step) {
      Words block[width];
      const int64_t there = smaller(width, rows - r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i)
        block[i] = i < there ? Units::row(from + (r + i) * from_stride + c, columns - c) : Words{};
      transpose(block);
      const int64_t depth = smaller(width, units<Units>(columns - c));
      for (int64_t i = 0; i < depth; ++i)
        put_words(panel + (c / Units::per_unit + i) * panel_columns, block[i]);
    }
  }
}

template <class Units, int rows, int vectors>
void multiply_tile(const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                   const typename Units::Unit* panel, int64_t depth, float* c, int64_t c_row,
                   bool accumulate) {
  Floats tile[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) tile[r][v] = Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    typename Units::Vector b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      b[v] = Units::load_units(panel + k * panel_columns + v * width);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const typename Units::Vector unit = Units::vector_of(a[r * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) tile[r][v] = Units::multiply_add(tile[r][v], unit, b[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = c + r * c_row + v * width;
      store(to, accumulate ? load(to) + tile[r][v] : tile[r][v]);
    }
}

template <class Units, int vectors>
inline void multiply_rows(const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                          int64_t rows, const typename Units::Unit* panel, int64_t depth, float* c,
                          int64_t c_row, bool accumulate) {
  for (; rows >= tile_rows; rows -= tile_rows, a += tile_rows * a_row, c += tile_rows * c_row)
    multiply_tile<Units, tile_rows, vectors>(a, a_row, a_step, panel, depth, c, c_row, accumulate);
  switch (rows) {
    case 5:
      return multiply_tile<Units, 5, vectors>(a, a_row, a_step, panel, depth, c, c_row, accumulate);
    case 4:
      return multiply_tile<Units, 4, vectors>(a, a_row, a_step, panel, depth, c, c_row, accumulate);
    case 3:
      return multiply_tile<Units, 3, vectors>(a, a_row, a_step, panel, depth, c, c_row, accumulate);
    case 2:
      return multiply_tile<Units, 2, vectors>(a, a_row, a_step, panel, depth, c, c_row, accumulate);
    case 1:
      return multiply_tile<Units, 1, vectors>(a, a_row, a_step, panel, depth, c, c_row, accumulate);
  }
}

// The depth is summed up in parts: rounding grows with the length of a part and the number of parts,
// not with the whole depth, and a part of a panel stays in the first-level cache.
constexpr int64_t depth_together = 64;

// C = A B, or C += A B. Element (r, k) of A is a[r * a_row + k * a_step]; `depth` counts units. C's
// rows need room for `columns` rounded up to a whole vector.
template <class Units>
inline void multiply(const typename Units::Unit* a, int64_t a_row, int64_t a_step, int64_t rows,
                     const typename Units::Unit* panels, int64_t panel_stride, int64_t depth,
                     int64_t columns, float* c, int64_t c_row, bool accumulate) {
  for (; columns > 0; columns -= panel_columns, panels += panel_stride, c += panel_columns) {
    for (int64_t k = 0; k < depth; k += depth_together) {
      const int64_t part = smaller(depth_together, depth - k);
      const typename Units::Unit* left = a + k * a_step;
      const typename Units::Unit* panel = panels + k * panel_columns;
      const bool add = accumulate || k > 0;
      switch (smaller(panel_vectors, (columns + width - 1) / width)) {
#if defined(__AVX512F__) || defined(__aarch64__)
        case 4:
          multiply_rows<Units, 4>(left, a_row, a_step, rows, panel, part, c, c_row, add);
          break;
        case 3:
          multiply_rows<Units, 3>(left, a_row, a_step, rows, panel, part, c, c_row, add);
          break;
#endif
        case 2:
          multiply_rows<Units, 2>(left, a_row, a_step, rows, panel, part, c, c_row, add);
          break;
        case 1:
          multiply_rows<Units, 1>(left, a_row, a_step, rows, panel, part, c, c_row, add);
          break;
      }
    }
  }
}

}  // namespace
}  // namespace bertfast
