// attention backward. Where a block holds all queries of a sequence, it does a head's whole backward:
// five products for each block of 64 keys, and what these keys' gradients get here is all there is to
// them. Longer sequences take two passes, one that owns queries and one that owns keys, with two of
// the products done twice. Nothing is added up by more than one block, so there are no atomics.
//
// Queries are the rows of all scores. Each warp has 16 of them; dq needs no other warp's. The kept
// probabilities and the scores' gradients go through shared memory, read crosswise, into the
// products for dv and dk, of which each warp has 16 keys of one, or of half of its columns.
#include "attention.h"

namespace bertfast {
namespace {

struct Backward : Attention {
  int64_t each;  // as Blocks has it, of the rows a block owns
  bool wide;
};

// sum(dout * out) of 16 rows, of which each lane gets its rows g and g + 8.
template <class T>
__device__ __forceinline__ void dot_rows(float (&dots)[2], const Rows& dout, const Rows& out,
                                         int64_t first, int64_t left) {
  // Two lanes have a row, and every other group of eight columns.
  const int row = lane_id() / 2;
  float sum = 0.0f;
  if (row < left)
    for (int column = lane_id() % 2 * group; column < dout.head_dim; column += 2 * group) {
      const T* a = reinterpret_cast<const T*>(dout.data) + (first + row) * dout.token + column;
      const T* b = reinterpret_cast<const T*>(out.data) + (first + row) * out.token + column;
      const int64_t there = dout.head_dim - column;
      const Group x = dout.wide ? load_group<true>(a, there) : load_group<false>(a, there);
      const Group y = dout.wide ? load_group<true>(b, there) : load_group<false>(b, there);
      BERTFAST_UNROLL
      for (int j = 0; j < group; ++j) sum += x.value[j] * y.value[j];
    }
  sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
  for (int i = 0; i < 2; ++i) dots[i] = __shfl_sync(0xFFFFFFFFu, sum, 2 * (lane_id() / 4 + 8 * i));
}

// What the scores' gradients need of a query.
struct alignas(8) RowFacts {
  float logsumexp;  // by the base 2; infinity, of which nothing is left, where it sees no key
  float dots;       // sum(dout * out)
};

// Keys whose scores a warp holds at a time: half a block, so that registers are left for dq.
constexpr int half_block = key_block / 2;
using HalfScores = Scores<half_block / 8>;
using HalfPacked = Packed<half_block / 8>;

// The kept probabilities and the scores' gradients of a warp's queries and half a block of keys. The
// first lack 1 / (1 - p), the second the scale.
template <class T, int D>
__device__ __forceinline__ void score_gradients(HalfPacked& kept, HalfPacked& dscores,
                                                const Backward& a, const Tile<D>& queries,
                                                const Tile<D>& douts, int row,
                                                const Tile<D>& columns, const Tile<D>& values,
                                                int half, const View& view,
                                                const RowFacts (&facts)[2], const ScoreMask& mask) {
  constexpr int tiles = half_block / 8;
  const int pairs = view.pairs() - half * tiles / 2;
  const float scale = a.scale * log2_e;
  HalfScores p, dp;
  rows_by_rows<T, tiles>(p, queries, row, columns, half * half_block, pairs);
  BERTFAST_UNROLL
  for (int n = 0; n < tiles; ++n)
    for (int e = 0; e < 4; ++e) {
      const bool sees = view.everything || view.sees(half * tiles + n, e);
      p[n][e] = sees ? exp2_of(p[n][e] * scale - facts[e / 2].logsumexp) : 0.0f;
    }
  rows_by_rows<T, tiles>(dp, douts, row, values, half * half_block, pairs);
  BERTFAST_UNROLL
  for (int n = 0; n < tiles; ++n)
    for (int e = 0; e < 4; ++e) {
      const bool keeps = mask.keeps(half * tiles + n, e);
      dp[n][e] = p[n][e] * ((keeps ? dp[n][e] * mask.scale : 0.0f) - facts[e / 2].dots);
      p[n][e] = keeps ? p[n][e] : 0.0f;
    }
  pack_scores<T, tiles>(kept, p);
  pack_scores<T, tiles>(dscores, dp);
}

__device__ __forceinline__ void put_packed(const Tile<key_block>& to, int row, int half,
                                           const HalfPacked& scores) {
  BERTFAST_UNROLL
  for (int k = 0; k < half_block / 16; ++k)
    for (int i = 0; i < 4; ++i)
      to.put(row, half * half_block / 8 + 2 * k + i / 2, i % 2 == 1, scores[k][i]);
}

// A warp's share of dv or dk of a block of keys.
template <int D, int WARPS>
struct Share {
  static constexpr int parts = WARPS == 16 ? 2 : 1;
  static constexpr int count = 8 * parts, each = count > WARPS ? count / WARPS : 1;
  static constexpr int width = D / parts;
  bool of_keys;  // else of values
  int key, column;

  // The i-th of its `each`.
  __device__ __forceinline__ Share(int warp, int i) {
    const int number = warp + i * WARPS;
    key = number / 2 % 4 * 16;
    of_keys = number % 2;
    column = number / 8 * width;
  }

  // sums += weights (queries x 64 keys), crosswise, times the queries' rows.
  template <class T>
  __device__ __forceinline__ void add(float (&sums)[width / 8][4], const Tile<key_block>& weights,
                                      const Tile<D>& rows, int queries) const {
    BERTFAST_UNROLL_TWICE
    for (int k = 0; k < queries; k += 16) {
      uint32_t w[4];
      weights.left_crosswise(w, k, key / 8);
      multiply_wide<T, width / 16>(sums, w, width / 16, [&](uint32_t (&b)[4], int n) {
        rows.right(b, k, column / 8 + 2 * n);
      });
    }
  }

  // Through a tile that nobody reads any more.
  template <class T>
  __device__ __forceinline__ void store(const float (&sums)[width / 8][4], const Backward& a,
                                        const Tile<D>& through, int64_t head, int64_t first,
                                        int64_t left) const {
    const float factor = of_keys ? a.scale : a.seed ? dropout_scale(a.threshold) : 1.0f;
    put_rows<T>(through, key, column, sums, factor, factor);
    const Rows to(of_keys ? a.dk : a.dv, head, a.head_dim, a.wide);
    through.store(to, first + key, key, left - key, column, width);
  }
};

// The plan that the registers are given out by: threads of a block, of several short heads or one,
// and blocks that a multiprocessor is to have room for.
template <int WARPS>
constexpr int most_threads() {
  return WARPS < 4 ? 128 : 32 * WARPS;
}
template <int D, int WARPS>
constexpr int least_blocks() {
  return D > 64 || WARPS == 16 ? 1 : WARPS == 8 ? 2 : WARPS == 4 ? 4 : 3;
}

// dq of a block of queries; and, KEYS, where these are all queries of the sequence, dk and dv.
template <class T, int D, int WARPS, bool KEYS>
__global__ void __launch_bounds__(most_threads<WARPS>(), least_blocks<D, WARPS>())
    queries_kernel(Backward a) {
  constexpr int threads = 32 * WARPS, rows = warp_rows * WARPS;
  const int slot = threadIdx.x / threads, thread = threadIdx.x % threads, warp = thread / 32;
  const int64_t first_head = int64_t{blockIdx.y} * a.heads_together;
  const int64_t head = smaller(first_head + slot, a.heads - 1);
  const bool has_head = first_head + slot < a.heads;
  clear_storage(a.dq, a.cu_seqlens_q, a, a.tokens_q, first_head, a.heads_together);
  if (KEYS) {
    clear_storage(a.dk, a.cu_seqlens_k, a, a.tokens_k, first_head, a.heads_together);
    clear_storage(a.dv, a.cu_seqlens_k, a, a.tokens_k, first_head, a.heads_together);
  }
  int64_t begin = 0;
  const int64_t i = a.batch ? sequence_of(a.cu_seqlens_q, a.batch, a.each, rows, begin) : 0;
  if (i >= a.batch) return;
  const Sequence s(a, i);
  if (begin < 0 || begin >= (KEYS ? int64_t{INT32_MAX} : s.queries)) return;
  const int first = static_cast<int>(begin), row = warp_rows * warp;
  const bool works = first + row < s.queries && has_head;

  const Rows q(a.q, head, a.head_dim, a.wide), k(a.k, head, a.head_dim, a.wide),
      v(a.v, head, a.head_dim, a.wide), dout(a.dout, head, a.head_dim, a.wide),
      out(a.out, head, a.head_dim, a.wide);
  const int buffers = a.ahead ? 2 : 1;
  // In rows of D elements; the scores' rows are of 64.
  constexpr int scores = KEYS ? 2 * rows * key_block / D : 0;
  const Tile<D> queries = Tile<D>{0}.behind(slot * (2 * rows + 2 * buffers * a.key_rows + scores));
  const Tile<D> douts = queries.behind(rows), columns = douts.behind(rows),
                values = columns.behind(buffers * a.key_rows);
  const Tile<key_block> kept{values.behind(buffers * a.key_rows).begin},
      dscores = kept.behind(rows);

  const int end = KEYS ? s.keys : s.seen_by(a, first + rows);
  const auto copy = [&](int key) {
    const int buffer = key / key_block % buffers * a.key_rows;
    columns.behind(buffer).load(k, s.begin_k + key, a.key_rows, s.keys - key, thread, threads);
    values.behind(buffer).load(v, s.begin_k + key, a.key_rows, s.keys - key, thread, threads);
    commit_copies();
  };
  queries.load(q, s.begin_q + first, rows, s.queries - first, thread, threads);
  douts.load(dout, s.begin_q + first, rows, s.queries - first, thread, threads);
  copy(0);

  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  RowFacts facts[2];
  if (works) {
    float dots[2];
    dot_rows<T>(dots, dout, out, s.begin_q + first + row, s.queries - first - row);
    for (int j = 0; j < 2; ++j) {
      const int r = first + row + lane_id() / 4 + 8 * j;
      const int64_t place = head * a.tokens_q + s.begin_q + r;
      const float natural = r < s.queries ? a.logsumexp[place] : -INFINITY;
      facts[j] = {natural == -INFINITY ? INFINITY : natural * log2_e, dots[j]};
      if (!KEYS && lane_id() % 4 == 0 && r < s.queries)
        reinterpret_cast<RowFacts*>(a.facts)[place] = facts[j];
    }
  }
  float sums[D / 8][4];
  clear(sums);
  for (int key = 0; key < end; key += key_block) {
    wait_for_copies<0>();
    // All have finished the block before this one, whose memory the next copies go to.
    __syncthreads();
    if (a.ahead && key + key_block < end) copy(key + key_block);
    const int buffer = key / key_block % buffers * a.key_rows;
    const Tile<D> now = columns.behind(buffer), values_now = values.behind(buffer);
    if (works) {
      const View view(a, s, first + row, key);
      const ScoreMask mask(a, seed, s.begin_q + first + row, head, key);
      BERTFAST_KEEP_LOOP
      for (int half = 0; half < 2; ++half) {
        HalfPacked p, ds;
        score_gradients<T>(p, ds, a, queries, douts, row, now, values_now, half, view, facts, mask);
        if (KEYS) {
          put_packed(kept, row, half, p);
          put_packed(dscores, row, half, ds);
        }
        weigh_rows<T, half_block / 8>(sums, ds, now, half * half_block,
                                      view.pairs() - half * half_block / 16);
      }
    }
    if (KEYS) {
      __syncthreads();
      BERTFAST_UNROLL
      for (int n = 0; n < Share<D, WARPS>::each; ++n) {
        const Share<D, WARPS> share(warp, n);
        if (!has_head || share.key >= s.keys - key) continue;
        float shares[Share<D, WARPS>::width / 8][4];
        clear(shares);
        share.template add<T>(shares, Tile<key_block>{share.of_keys ? dscores.begin : kept.begin},
                              Tile<D>{share.of_keys ? queries.begin : douts.begin},
                              at_most(s.queries, rows));
        // The keys and values themselves have been used.
        share.template store<T>(shares, a, Tile<D>{share.of_keys ? now.begin : values_now.begin},
                                head, s.begin_k + key, s.keys - key);
      }
    }
    if (!a.ahead && key + key_block < end) {
      __syncthreads();
      copy(key + key_block);
    }
  }
  // Where there was no key, the queries are still on their way.
  wait_for_copies<0>();
  // Other warps may still read the queries for dk.
  __syncthreads();
  if (!works) return;
  const Rows dq(a.dq, head, a.head_dim, a.wide);
  put_rows<T>(queries, row, 0, sums, a.scale, a.scale);
  queries.store(dq, s.begin_q + first + row, row, s.queries - first - row, 0, D);
}

// dk and dv of a block of keys.
template <class T, int D, int WARPS>
__global__ void __launch_bounds__(most_threads<WARPS>(), least_blocks<D, WARPS>())
    keys_kernel(Backward a) {
  constexpr int threads = 32 * WARPS, rows = warp_rows * WARPS;
  const int warp = threadIdx.x / 32, row = warp_rows * warp;
  const int64_t head = blockIdx.y;
  clear_storage(a.dk, a.cu_seqlens_k, a, a.tokens_k, head, 1);
  clear_storage(a.dv, a.cu_seqlens_k, a, a.tokens_k, head, 1);
  int64_t begin = 0;
  const int64_t i = a.batch ? sequence_of(a.cu_seqlens_k, a.batch, a.each, key_block, begin) : 0;
  if (i >= a.batch) return;
  const Sequence s(a, i);
  if (begin < 0 || begin >= s.keys) return;
  const int key = static_cast<int>(begin);

  const Rows q(a.q, head, a.head_dim, a.wide), k(a.k, head, a.head_dim, a.wide),
      v(a.v, head, a.head_dim, a.wide), dout(a.dout, head, a.head_dim, a.wide);
  const int buffers = a.ahead ? 2 : 1;
  const Tile<D> columns{0}, values = columns.behind(key_block), queries = values.behind(key_block),
                            douts = queries.behind(buffers * rows);
  const Tile<key_block> kept{douts.behind(buffers * rows).begin}, dscores = kept.behind(rows);

  // The first query that sees the first of these keys.
  int from = 0;
  if (a.causal && key + s.queries - s.keys > 0) from = (key + s.queries - s.keys) / rows * rows;
  const auto copy = [&](int first) {
    const int buffer = first / rows % buffers * rows;
    queries.behind(buffer).load(q, s.begin_q + first, rows, s.queries - first, threadIdx.x,
                                threads);
    douts.behind(buffer).load(dout, s.begin_q + first, rows, s.queries - first, threadIdx.x,
                              threads);
    commit_copies();
  };
  columns.load(k, s.begin_k + key, key_block, s.keys - key, threadIdx.x, threads);
  values.load(v, s.begin_k + key, key_block, s.keys - key, threadIdx.x, threads);
  copy(from);

  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  using Own = Share<D, WARPS>;
  static_assert(Own::each == 1, "one to a warp, in registers from the first query to the last");
  const Own share(warp, 0);
  float sums[Own::width / 8][4];
  clear(sums);
  for (int first = from; first < s.queries; first += rows) {
    wait_for_copies<0>();
    // All have finished the queries before these, whose memory the next copies go to.
    __syncthreads();
    if (a.ahead && first + rows < s.queries) copy(first + rows);
    const int buffer = first / rows % buffers * rows;
    const Tile<D> queries_now = queries.behind(buffer), douts_now = douts.behind(buffer);
    if (first + row < s.queries) {
      RowFacts facts[2];
      for (int j = 0; j < 2; ++j) {
        const int r = first + row + lane_id() / 4 + 8 * j;
        facts[j] = {INFINITY, 0.0f};
        if (r < s.queries)
          facts[j] = reinterpret_cast<const RowFacts*>(a.facts)[head * a.tokens_q + s.begin_q + r];
      }
      const View view(a, s, first + row, key);
      const ScoreMask mask(a, seed, s.begin_q + first + row, head, key);
      BERTFAST_KEEP_LOOP
      for (int half = 0; half < 2; ++half) {
        HalfPacked p, ds;
        score_gradients<T>(p, ds, a, queries_now, douts_now, row, columns, values, half, view,
                           facts, mask);
        put_packed(kept, row, half, p);
        put_packed(dscores, row, half, ds);
      }
    }
    __syncthreads();
    if (share.key < s.keys - key)
      share.template add<T>(sums, Tile<key_block>{share.of_keys ? dscores.begin : kept.begin},
                            Tile<D>{share.of_keys ? queries_now.begin : douts_now.begin},
                            at_most(s.queries - first, rows));
    if (!a.ahead && first + rows < s.queries) {
      __syncthreads();
      copy(first + rows);
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  if (share.key < s.keys - key)
    share.template store<T>(sums, a, Tile<D>{share.of_keys ? columns.begin : values.begin}, head,
                            s.begin_k + key, s.keys - key);
}

template <class T, int D, int WARPS, bool KEYS>
int launch_queries(const Backward& b, const dim3& grid, void* stream) {
  const char* name = KEYS ? "attention_backward_heads" : "attention_backward_queries";
  const dim3 threads(32 * WARPS * b.heads_together);
  return launch(name, queries_kernel<T, D, WARPS, KEYS>, grid, threads, stream, b, b.shared_bytes);
}

}  // namespace

int attention_backward(AttentionPass pass, const Attention& a, void* stream) {
  bool all_wide = true;
  for (const Strided* x : {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv})
    all_wide = all_wide && wide(*x, a.head_dim);
  const bool of_keys = pass == AttentionPass::keys;
  const int rows = warp_rows * a.warps;
  // Of a whole head there is one block for each sequence, even one without queries.
  const Blocks blocks = of_keys ? Blocks(a.tokens_k, a.batch, a.longest_k, key_block)
                        : pass == AttentionPass::heads
                            ? Blocks(a.batch * rows, a.batch, 1, rows)
                            : Blocks(a.tokens_q, a.batch, a.longest_q, rows);
  const Backward b{a, blocks.each, all_wide};
  const dim3 grid(static_cast<unsigned>(blocks.count),
                  static_cast<unsigned>(divide_up(a.heads, a.heads_together)));
  return with_half(a.dtype, [&](auto element) {
    using T = decltype(element);
    return with_width(a.head_dim, [&](auto width) {
      constexpr int D = decltype(width)::value;
      if (of_keys)
        return launch("attention_backward_keys", keys_kernel<T, D, 8>, grid, 256, stream, b,
                      b.shared_bytes);
      if (pass == AttentionPass::queries) return launch_queries<T, D, 8, false>(b, grid, stream);
      if constexpr (D <= 64) {
        if (a.warps == 2) return launch_queries<T, D, 2, true>(b, grid, stream);
        if (a.warps == 4) return launch_queries<T, D, 4, true>(b, grid, stream);
      }
      if constexpr (D == 64)
        if (a.warps == 16) return launch_queries<T, D, 16, true>(b, grid, stream);
      return launch_queries<T, D, 8, true>(b, grid, stream);
    });
  });
}

}  // namespace bertfast
