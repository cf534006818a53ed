// embedding: s = word[id] + position[position id] + token_type[type id], y = dropout(xhat * weight +
// bias) with xhat the normalised s, and its gradients.
//
// Ids may be any number at all: one that is no row of its table reads zeros and gets no gradient.
#include "dropout.h"
#include "kernels.h"
#include "norm.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace bertfast {
namespace {

constexpr int tables = embedding_tables;

// The row of its table that a token reads, or -1 where the id is out of range.
inline int64_t row_of(const EmbeddingTable& table, int64_t token) {
  if (table.rows == 0) return -1;
  const int64_t id = table.wide ? static_cast<const int64_t*>(table.ids)[token]
                                : static_cast<const int32_t*>(table.ids)[token];
  return id >= 0 && id < table.rows ? id : -1;
}

// A token's rows, of which those that are not there are zeros.
template <class T>
struct Rows {
  const T* row[tables];

  Rows(const EmbeddingTable (&table)[tables], int64_t columns, int64_t token, const T* zeros) {
    for (int i = 0; i < tables; ++i) {
      const int64_t at = row_of(table[i], token);
      row[i] = at < 0 ? zeros : static_cast<const T*>(table[i].values) + at * columns;
    }
  }

  // The same sum in forward and backward, so that both see the same xhat.
  template <class Io>
  Floats sum(int64_t c, Io io) const {
    return io.get(row[0] + c) + io.get(row[1] + c) + io.get(row[2] + c);
  }
};

template <class T, class P, class O>
bool forward_tokens(const EmbeddingForward& a, int64_t begin, int64_t end) {
  const int64_t columns = a.columns;
  const P* weight = static_cast<const P*>(a.weight);
  const P* bias = static_cast<const P*>(a.bias);
  Row buffer(columns), zero_buffer(columns);
  float* row = buffer.data();
  if (!row || !zero_buffer.data()) return false;
  std::memset(zero_buffer.data(), 0, sizeof(float) * static_cast<size_t>(columns));
  const T* zeros = reinterpret_cast<const T*>(zero_buffer.data());
  RowMask mask(a.seed, a.threshold, a.site);
  for (int64_t t = begin; t < end; ++t) {
    const Rows<T> rows(a.tables, columns, t, zeros);
    Floats sums = {};
    for_columns(0, columns, [&](int64_t c, auto io) {
      const Floats v = rows.sum(c, io);
      io.put(row + c, v);
      sums += io.counted(v);
    });
    // The processor does not see a jump through a table of 94 MB coming.
    const Rows<T> next(a.tables, columns, t + 1 < end ? t + 1 : t, zeros);
    const Statistics statistics = row_statistics(row, columns, sums, a.eps, [&](int64_t c) {
      for (int i = 0; i < tables; ++i) prefetch(next.row[i], c);
    });
    O* out = static_cast<O*>(a.out) + t * columns;
    for_pieces(columns, [&](int64_t first, int64_t last) {
      if (a.seed) mask.draw(t, first, last - first);
      for_columns(first, last, [&](int64_t c, auto io) {
        Floats y = statistics.xhat(io.get(row + c)) * io.get(weight + c) + io.get(bias + c);
        if (a.seed) y = mask.apply(y, c - first);
        io.put(out + c, y);
      });
    });
    a.statistics[t] = statistics.mean;
    a.statistics[a.tokens + t] = statistics.rstd;
  }
  return true;
}

// The gradient of every token's sum, in float, and the blocks' shares of dweight and dbias.
template <class T, class P, class O>
bool backward_tokens(const EmbeddingBackward& a, int64_t begin, int64_t end) {
  const int64_t columns = a.columns;
  const P* weight = static_cast<const P*>(a.weight);
  Row total_buffer(rows_together * columns), dy_buffer(rows_together * columns);
  Row zero_buffer(columns);
  float *total = total_buffer.data(), *dy = dy_buffer.data();
  if (!total || !dy || !zero_buffer.data()) return false;
  std::memset(zero_buffer.data(), 0, sizeof(float) * static_cast<size_t>(columns));
  const T* zeros = reinterpret_cast<const T*>(zero_buffer.data());
  RowMask mask(a.seed, a.threshold, a.site);
  const auto rows = [&](auto number, int64_t token, float* dweight, float* dbias) {
    constexpr int count = decltype(number)::value;
    const O* dout = static_cast<const O*>(a.dout) + token * columns;
    float* ds = a.ds + token * columns;
    const T* next[count];
    for (int r = 0; r < count; ++r) {
      const Rows<T> read(a.tables, columns, token + r, zeros);
      for_pieces(columns, [&](int64_t first, int64_t last) {
        if (a.seed) mask.draw(token + r, first, last - first);
        for_columns(first, last, [&](int64_t c, auto io) {
          const int64_t at = r * columns + c;
          const Floats v = io.get(dout + at);
          io.put(dy + at, a.seed ? mask.apply(v, c - first) : v);
          io.put(total + at, read.sum(c, io));
        });
      });
      const int64_t later = token + count + r;
      next[r] = Rows<T>(a.tables, columns, later < a.tokens ? later : token, zeros).row[0];
    }
    const auto put = [&](int r, int64_t c, Floats v, int64_t, auto io) {
      prefetch(next[r], c);
      prefetch(dout, (count + r) * columns + c);
      io.put(ds + r * columns + c, v);
    };
    backward_rows<count>(
        total, dy, weight, a.statistics + token, a.statistics + a.tokens + token, columns, dweight,
        dbias, [](int64_t, int64_t) {}, put);
  };
  backward_blocks(a.tokens, columns, a.blocks, a.partial, begin, end, rows);
  return true;
}

// A token that reads `row` of a table.
struct Reader {
  int64_t row, token;
};

// The tokens that read a row which gets a gradient: by row, and within one by token. Counting sorts
// by 9 bits at a time: 512 positions take one, 250 000 words two. Uses `spare`, and may change it
// for `readers`.
int64_t sort_readers(const EmbeddingTable& table, int64_t tokens, Reader*& readers,
                     Reader*& spare) {
  int64_t count = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = row_of(table, t);
    if (row >= 0 && row != table.padding) readers[count++] = {row, t};
  }
  constexpr int bits = 9;
  for (int shift = 0; shift < 63 && (table.rows - 1) >> shift > 0; shift += bits) {
    const auto digit = [&](const Reader& r) { return (r.row >> shift) & ((1 << bits) - 1); };
    int64_t starts[1 << bits] = {};
    for (int64_t i = 0; i < count; ++i) ++starts[digit(readers[i])];
    int64_t start = 0;
    for (int64_t& d : starts) {
      const int64_t here = d;
      d = start;
      start += here;
    }
    for (int64_t i = 0; i < count; ++i) spare[starts[digit(readers[i])]++] = readers[i];
    Reader* const sorted = spare;
    spare = readers;
    readers = sorted;
  }
  return count;
}

// A table's readers, and the chunks in which they are summed: a row that thousands of tokens read is
// shared out between threads as well as thousands of rows are, and how it is added up depends on
// the readers alone.
struct Gradient {
  const EmbeddingTable* table;
  const Reader* readers;
  int64_t count, chunk, chunks;
  float* partial;  // (chunks, 2, columns): of the row that goes on from before, and of that which
                   // goes on behind

  int64_t row(int64_t reader) const { return readers[reader].row; }
  int64_t first(int64_t c) const { return c * chunk; }
  int64_t last(int64_t c) const { return (c + 1) * chunk < count ? (c + 1) * chunk : count; }
  bool continued(int64_t c) const { return c > 0 && row(first(c)) == row(first(c) - 1); }
  bool continues(int64_t c) const { return c + 1 < chunks && row(last(c) - 1) == row(last(c)); }
};

// The sum of ds over [first, last) readers, a strip of columns at a time in registers.
template <class T>
void sum_readers(const float* ds, int64_t columns, const Reader* first, const Reader* last,
                 T* out) {
  constexpr int vectors = 8;
  int64_t c = 0;
  for (; c + vectors * width <= columns; c += vectors * width) {
    Floats sums[vectors] = {};
    for (const Reader* r = first; r < last; ++r)
      for (int i = 0; i < vectors; ++i) sums[i] += load(ds + r->token * columns + c + i * width);
    for (int i = 0; i < vectors; ++i) store(out + c + i * width, sums[i]);
  }
  for_columns(c, columns, [&](int64_t at, auto io) {
    Floats sums = {};
    for (const Reader* r = first; r < last; ++r) sums += io.get(ds + r->token * columns + at);
    io.put(out + at, sums);
  });
}

template <class T>
void sum_chunk(const EmbeddingBackward& a, const Gradient& g, int64_t c) {
  T* grad = static_cast<T*>(g.table->grad);
  float* partial = g.partial + c * 2 * a.columns;
  const int64_t end = g.last(c);
  for (int64_t first = g.first(c), last; first < end; first = last) {
    for (last = first + 1; last < end && g.row(last) == g.row(first);) ++last;
    const Reader *from = g.readers + first, *to = g.readers + last;
    if (first == g.first(c) && g.continued(c))
      sum_readers(a.ds, a.columns, from, to, partial);
    else if (last == end && g.continues(c))
      sum_readers(a.ds, a.columns, from, to, partial + a.columns);
    else
      sum_readers(a.ds, a.columns, from, to, grad + g.row(first) * a.columns);
  }
}

// The rows that several chunks have summed a part of, for the columns [begin, end).
template <class T>
void join_chunks(const EmbeddingBackward& a, const Gradient& g, int64_t begin, int64_t end) {
  for (int64_t c = 0; c < g.chunks; ++c) {
    const int64_t row = g.row(g.last(c) - 1);
    // Only where the row starts: a chunk in its middle has no part of another row to continue.
    if (!g.continues(c) || (g.continued(c) && g.row(g.first(c)) == row)) continue;
    T* grad = static_cast<T*>(g.table->grad) + row * a.columns;
    for_columns(begin, end, [&](int64_t at, auto io) {
      Floats sums = io.get(g.partial + (c * 2 + 1) * a.columns + at);
      for (int64_t next = c + 1; next < g.chunks && g.row(g.first(next)) == row; ++next)
        sums += io.get(g.partial + next * 2 * a.columns + at);
      io.put(grad + at, sums);
    });
  }
}

// Zeros in the rows [begin, end) that no token reads; the others are written whole.
template <class T>
void clear_rows(const EmbeddingBackward& a, const Gradient& g, int64_t begin, int64_t end) {
  int64_t low = 0, high = g.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (g.row(middle) < begin)
      low = middle + 1;
    else
      high = middle;
  }
  T* grad = static_cast<T*>(g.table->grad);
  for (int64_t row = begin; row < end; ++low) {
    const int64_t next = low < g.count && g.row(low) < end ? g.row(low) : end;
    if (row < next)
      std::memset(grad + row * a.columns, 0,
                  sizeof(T) * static_cast<size_t>((next - row) * a.columns));
    row = next < row ? row : next + 1;
  }
}

template <class T, class P, class O>
bool forward(const EmbeddingForward& a) {
  int failures = 0;
  parallel(a.threads, a.tokens, a.tokens * a.columns, [&](int64_t begin, int64_t end) {
    if (!forward_tokens<T, P, O>(a, begin, end)) __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
  });
  return failures == 0;
}

template <class T, class P, class O>
bool backward(const EmbeddingBackward& a) {
  ask_for_large_pages(a.ds, a.tokens * a.columns * static_cast<int64_t>(sizeof(float)));
  int failures = 0;
  parallel(a.threads, a.blocks, a.tokens * a.columns, [&](int64_t begin, int64_t end) {
    if (!backward_tokens<T, P, O>(a, begin, end))
      __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
  });
  if (failures) return false;

  Gradient gradients[tables];
  const int64_t most_chunks = (a.tokens + a.chunk - 1) / a.chunk;
  Reader* spare = static_cast<Reader*>(a.readers) + tables * a.tokens;
  int64_t rows = 0, readers = 0, chunks = 0;
  for (int i = 0; i < tables; ++i) {
    const EmbeddingTable& table = a.tables[i];
    Reader* own = static_cast<Reader*>(a.readers) + i * a.tokens;
    const int64_t count = sort_readers(table, a.tokens, own, spare);
    gradients[i] = {&table,
                    own,
                    count,
                    a.chunk,
                    (count + a.chunk - 1) / a.chunk,
                    a.parts + i * most_chunks * 2 * a.columns};
    rows += table.rows;
    readers += count;
    chunks += gradients[i].chunks;
    ask_for_large_pages(table.grad, table.rows * a.columns * static_cast<int64_t>(sizeof(T)));
  }

  constexpr int64_t shares = 256;
  parallel(a.threads, shares, rows * a.columns, [&](int64_t begin, int64_t end) {
    for (const Gradient& g : gradients)
      clear_rows<T>(a, g, g.table->rows * begin / shares, g.table->rows * end / shares);
  });
  parallel(a.threads, chunks, readers * a.columns, [&](int64_t begin, int64_t end) {
    for (const Gradient& g : gradients) {
      for (int64_t c = begin > 0 ? begin : 0; c < end && c < g.chunks; ++c) sum_chunk<T>(a, g, c);
      begin -= g.chunks;
      end -= g.chunks;
    }
  });
  parallel(a.threads, a.columns, (a.blocks + chunks) * a.columns, [&](int64_t begin, int64_t end) {
    add_blocks(a.partial, a.blocks, a.columns, static_cast<P*>(a.dweight), static_cast<P*>(a.dbias),
               begin, end);
    for (const Gradient& g : gradients) join_chunks<T>(a, g, begin, end);
  });
  return true;
}

// Calls run with a value of each type: the tables', the parameters' and the output's.
template <class T, class P, class Arguments, class Run>
bool with_output(const Arguments& a, const Run& run) {
  return a.out_dtype == Dtype::float32 ? run(T{}, P{}, float{}) : run(T{}, P{}, Bfloat16{});
}

template <class Arguments, class Run>
bool with_types(const Arguments& a, const Run& run) {
  if (a.dtype == Dtype::float32) return with_output<float, float>(a, run);
  if (a.parameter_dtype == Dtype::float32) return with_output<Bfloat16, float>(a, run);
  return with_output<Bfloat16, Bfloat16>(a, run);
}

}  // namespace

namespace BERTFAST_ISA {

bool embedding_forward(const EmbeddingForward& a) {
  return with_types(a, [&](auto table, auto parameter, auto out) {
    return forward<decltype(table), decltype(parameter), decltype(out)>(a);
  });
}

bool embedding_backward(const EmbeddingBackward& a) {
  return with_types(a, [&](auto table, auto parameter, auto out) {
    return backward<decltype(table), decltype(parameter), decltype(out)>(a);
  });
}

}  // namespace BERTFAST_ISA
}  // namespace bertfast
