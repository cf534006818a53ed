// LayerNorm of one row and the gradients of several, for the kernels that normalise.
#pragma once

#include <cmath>
#include <cstdlib>

#include "dropout.h"
#include "vector.h"

namespace bertfast {
namespace {

// A row in float, on the stack where it fits.
class Row {
 public:
  explicit Row(int64_t columns)
      : data_(columns <= near ? near_
                              : static_cast<float*>(
                                    std::malloc(sizeof(float) * static_cast<size_t>(columns)))) {}
  ~Row() {
    if (data_ != near_) std::free(data_);
  }
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;
  float* data() { return data_; }

 private:
  static constexpr int64_t near = 4096;
  float near_[near];
  float* data_;
};

// Calls body(first, last) for the pieces of a row that a RowMask draws at once.
template <class Body>
inline __attribute__((always_inline)) void for_pieces(int64_t columns, const Body& body) {
  for (int64_t first = 0; first < columns; first += RowMask::piece)
    body(first, first + RowMask::piece < columns ? first + RowMask::piece : columns);
}

struct Statistics {
  float mean, rstd;

  Floats xhat(Floats v) const { return (v - mean) * rstd; }
};

// The statistics of a row whose sum the caller took while writing it; meanwhile(column) is
// called along the way.
template <class Meanwhile>
inline __attribute__((always_inline)) Statistics row_statistics(const float* row, int64_t columns,
                                                                Floats sums, float eps,
                                                                const Meanwhile& meanwhile) {
  const float per_column = 1.0f / static_cast<float>(columns);
  // A second pass over the row, which is still in the first-level cache: the difference of the
  // mean square and the squared mean would lose all digits where the mean is large. The sum of
  // the differences is what rounding left out of the mean.
  const float about = sum(sums) * per_column;
  Floats differences = {}, squares = {};
  for_columns(0, columns, [&](int64_t c, auto io) {
    meanwhile(c);
    const Floats d = io.counted(io.get(row + c) - about);
    differences += d;
    squares += d * d;
  });
  const float correction = sum(differences) * per_column;
  // Where the squares overflow, infinity minus infinity would make a variance of 0.
  const float mean_square = sum(squares) * per_column;
  const float variance =
      mean_square < __builtin_inff() ? mean_square - correction * correction : mean_square;
  return {about + correction, 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps)};
}

// Rows taken together in backward, so that the sums over rows are loaded and stored once for all:
// measured 20 % faster than one row at a time.
constexpr int rows_together = 4;

template <int number>
struct Count {
  static constexpr int value = number;
};

// The gradients of `count` consecutive rows: adds to dweight and dbias, and calls
// put(row, column, ds, first, io) with the gradient of the row before the norm, `first` being the
// column where the piece starts; draw(first, last) is called before each piece.
template <int count, class T, class D, class P, class Draw, class Put>
inline __attribute__((always_inline)) void backward_rows(const T* total, const D* dout,
                                                         const P* weight, const float* mean,
                                                         const float* rstd, int64_t columns,
                                                         float* dweight, float* dbias,
                                                         const Draw& draw, const Put& put) {
  Floats g_sums[count] = {}, gx_sums[count] = {};
  for_columns(0, columns, [&](int64_t c, auto io) {
    const Floats w = io.get(weight + c);
    for (int r = 0; r < count; ++r) {
      const Floats g = rounded(io.get(dout + r * columns + c) * w);
      const Floats xhat = (io.get(total + r * columns + c) - mean[r]) * rstd[r];
      g_sums[r] += g;
      gx_sums[r] += g * xhat;
    }
  });
  float mean_g[count], mean_gx[count];
  for (int r = 0; r < count; ++r) {
    mean_g[r] = sum(g_sums[r]) / static_cast<float>(columns);
    mean_gx[r] = sum(gx_sums[r]) / static_cast<float>(columns);
  }
  for_pieces(columns, [&](int64_t first, int64_t last) {
    draw(first, last);
    for_columns(first, last, [&](int64_t c, auto io) {
      const Floats w = io.get(weight + c);
      Floats dw = io.get(dweight + c), db = io.get(dbias + c);
      for (int r = 0; r < count; ++r) {
        const int64_t at = r * columns + c;
        const Floats dy = io.get(dout + at);
        const Floats xhat = (io.get(total + at) - mean[r]) * rstd[r];
        dw += dy * xhat;
        db += dy;
        // One column: g is its own mean, and 1/sqrt(eps) would blow up a difference in rounding.
        put(r, c, (rounded(dy * w) - mean_g[r] - xhat * mean_gx[r]) * rstd[r], first, io);
      }
      io.put(dweight + c, dw);
      io.put(dbias + c, db);
    });
  });
}

// Calls rows(count, first_row, dweight, dbias) for the rows of the blocks [begin, end), with
// `count` a Count and the sums those of the block, (blocks, 2, columns) in `partial`.
//
// Blocks are shares of the rows that do not depend on the number of threads, and neither does the
// order in which anything is added: the same input gives the same bits on any number of cores.
template <class Rows>
inline __attribute__((always_inline)) void backward_blocks(int64_t rows, int64_t columns,
                                                           int64_t blocks, float* partial,
                                                           int64_t begin, int64_t end,
                                                           const Rows& take) {
  for (int64_t block = begin; block < end; ++block) {
    float* dweight = partial + block * 2 * columns;
    float* dbias = dweight + columns;
    std::memset(dweight, 0, sizeof(float) * 2 * static_cast<size_t>(columns));
    int64_t row = rows * block / blocks;
    const int64_t last = rows * (block + 1) / blocks;
    for (; row + rows_together <= last; row += rows_together)
      take(Count<rows_together>{}, row, dweight, dbias);
    for (; row < last; ++row) take(Count<1>{}, row, dweight, dbias);
  }
}

// dweight and dbias from the blocks' shares, for the columns [begin, end).
template <class P>
void add_blocks(const float* partial, int64_t blocks, int64_t columns, P* dweight, P* dbias,
                int64_t begin, int64_t end) {
  for_columns(begin, end, [&](int64_t c, auto io) {
    Floats dw = {}, db = {};
    for (int64_t block = 0; block < blocks; ++block) {
      dw += io.get(partial + block * 2 * columns + c);
      db += io.get(partial + (block * 2 + 1) * columns + c);
    }
    io.put(dweight + c, dw);
    io.put(dbias + c, db);
  });
}

}  // namespace
}  // namespace bertfast
