// attention forward: an online softmax over blocks of 64 keys. A warp has 16 queries of a head, its
// neighbours further ones of the same head, so that a short sequence's keys and values are read once;
// short heads share a block. Products on tensor cores (mma.sync), copies ahead of them (cp.async).
#include "attention.h"

namespace bertfast {
namespace {

struct Forward : Attention {
  int64_t each;  // as Blocks has it
  bool wide;
};

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(256, D > 64 ? 1 : 2) attention_kernel(Forward a) {
  const int threads = 32 * a.warps, slot = threadIdx.x / threads, thread = threadIdx.x % threads;
  const int64_t first_head = int64_t{blockIdx.y} * a.heads_together;
  const int64_t head = smaller(first_head + slot, a.heads - 1);
  clear_storage(a.out, a.cu_seqlens_q, a, a.tokens_q, first_head, a.heads_together);
  for (int64_t r = storage_of(a.cu_seqlens_q, a) + blockIdx.x; r < a.tokens_q; r += gridDim.x)
    a.logsumexp[head * a.tokens_q + r] = 0.0f;
  int64_t begin = 0;
  const int rows = warp_rows * a.warps;
  const int64_t i = a.batch ? sequence_of(a.cu_seqlens_q, a.batch, a.each, rows, begin) : 0;
  if (i >= a.batch) return;
  const Sequence s(a, i);
  if (begin < 0 || begin >= s.queries) return;
  const int first = static_cast<int>(begin), row = warp_rows * (thread / 32);
  const bool works = first + row < s.queries && first_head + slot < a.heads;

  const Rows q(a.q, head, a.head_dim, a.wide), k(a.k, head, a.head_dim, a.wide),
      v(a.v, head, a.head_dim, a.wide);
  const int buffers = a.ahead ? 2 : 1;
  const Tile<D> queries = Tile<D>{0}.behind(slot * (rows + 2 * buffers * a.key_rows));
  const Tile<D> columns = queries.behind(rows), values = columns.behind(buffers * a.key_rows);
  const int end = s.seen_by(a, first + rows);
  const auto copy = [&](int key) {
    const int buffer = key / key_block % buffers * a.key_rows;
    columns.behind(buffer).load(k, s.begin_k + key, a.key_rows, s.keys - key, thread, threads);
    values.behind(buffer).load(v, s.begin_k + key, a.key_rows, s.keys - key, thread, threads);
    commit_copies();
  };
  queries.load(q, s.begin_q + first, rows, s.queries - first, thread, threads);
  copy(0);

  const uint64_t seed = DROPOUT ? static_cast<uint64_t>(*a.seed) : 0;
  const float scale = a.scale * log2_e;
  float largest[2], total[2] = {0.0f, 0.0f}, sums[D / 8][4];
  for (int j = 0; j < 2; ++j) largest[j] = -INFINITY;
  clear(sums);
  for (int key = 0; key < end; key += key_block) {
    wait_for_copies<0>();
    // All have finished the block before this one, whose memory the next copies go to.
    __syncthreads();
    if (a.ahead && key + key_block < end) copy(key + key_block);
    if (works) {
      const int buffer = key / key_block % buffers * a.key_rows;
      const View view(a, s, first + row, key);
      // Before the scores are here: the words it draws take as many registers.
      const ScoreMask mask(a, seed, s.begin_q + first + row, head, key);
      Scores<8> scores;
      rows_by_rows<T, 8>(scores, queries, row, columns, buffer, view.pairs());
      float now[2] = {largest[0], largest[1]};
      BERTFAST_UNROLL
      for (int n = 0; n < 8; ++n)
        for (int e = 0; e < 4; ++e) {
          const bool sees = view.everything || view.sees(n, e);
          scores[n][e] = sees ? scores[n][e] * scale : -INFINITY;
          now[e / 2] = fmaxf(now[e / 2], scores[n][e]);
        }
      float base[2], rescale[2];
      for (int j = 0; j < 2; ++j) {
        now[j] = row_max(now[j]);
        // Minus infinity, where a query has seen no key, must not be subtracted from itself.
        base[j] = now[j] == -INFINITY ? 0.0f : now[j];
        rescale[j] = exp2_of(largest[j] - base[j]);
        largest[j] = now[j];
        total[j] *= rescale[j];
      }
      BERTFAST_UNROLL
      for (int n = 0; n < 8; ++n)
        for (int e = 0; e < 4; ++e) {
          scores[n][e] = exp2_of(scores[n][e] - base[e / 2]);
          total[e / 2] += scores[n][e];
        }
      if (DROPOUT) {
        BERTFAST_UNROLL
        for (int n = 0; n < 8; ++n)
          for (int e = 0; e < 4; ++e) scores[n][e] = mask.keeps(n, e) ? scores[n][e] : 0.0f;
      }
      BERTFAST_UNROLL
      for (int n = 0; n < D / 8; ++n)
        for (int e = 0; e < 4; ++e) sums[n][e] *= rescale[e / 2];
      Packed<8> weights;
      pack_scores<T, 8>(weights, scores);
      weigh_rows<T, 8>(sums, weights, values, buffer, view.pairs());
    }
    if (!a.ahead && key + key_block < end) {
      __syncthreads();
      copy(key + key_block);
    }
  }
  // Where there was no key, the queries are still on their way.
  wait_for_copies<0>();
  __syncthreads();
  if (!works) return;
  const float kept_scale = DROPOUT ? dropout_scale(a.threshold) : 1.0f;
  float factor[2];
  for (int j = 0; j < 2; ++j) {
    total[j] = row_sum(total[j]);
    factor[j] = total[j] == 0.0f ? 0.0f : kept_scale / total[j];
    const int r = first + row + lane_id() / 4 + 8 * j;
    if (lane_id() % 4 == 0 && r < s.queries)
      a.logsumexp[head * a.tokens_q + s.begin_q + r] =
          total[j] == 0.0f ? -INFINITY : largest[j] * ln_2 + logf(total[j]);
  }
  const Rows out(a.out, head, a.head_dim, a.wide);
  put_rows<T>(queries, row, 0, sums, factor[0], factor[1]);
  queries.store(out, s.begin_q + first + row, row, s.queries - first - row, 0, D);
}

}  // namespace

int attention_forward(const Attention& a, void* stream) {
  const Blocks blocks(a.tokens_q, a.batch, a.longest_q, warp_rows * a.warps);
  const bool all_wide = wide(a.q, a.head_dim) && wide(a.k, a.head_dim) && wide(a.v, a.head_dim) &&
                        wide(a.out, a.head_dim);
  const Forward b{a, blocks.each, all_wide};
  const dim3 grid(static_cast<unsigned>(blocks.count),
                  static_cast<unsigned>(divide_up(a.heads, a.heads_together)));
  const dim3 threads(32 * a.warps * a.heads_together);
  return with_half(a.dtype, [&](auto element) {
    using T = decltype(element);
    return with_width(a.head_dim, [&](auto width) {
      constexpr int D = decltype(width)::value;
      const auto kernel = a.seed ? attention_kernel<T, D, true> : attention_kernel<T, D, false>;
      return launch("attention_forward", kernel, grid, threads, stream, b, a.shared_bytes);
    });
  });
}

}  // namespace bertfast
