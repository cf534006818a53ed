// attention: softmax(scale * q k^T) v within each sequence and head, and its gradients.
//
// Nothing of size sequence x sequence exists: keys are taken in blocks of 64, the softmax is
// accumulated online (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018),
// and backward computes the probabilities again from the logsumexp (Dao et al., "FlashAttention",
// 2022). Every sum over keys or queries is taken block by block in one order, whoever computes it.
#include <cmath>

#include "dropout.h"
#include "kernels.h"
#include "matmul.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace bertfast {
namespace {

// Keys of a block, and queries of a block in backward; the dropout mask's blocks, too.
constexpr int64_t block = attention_block;
// Queries that go through the softmax together in forward, so that their scores and outputs stay in
// the first-level cache beside a block of keys and values.
constexpr int64_t queries_together = 4 * tile_rows;

// Where each sequence starts, and which tasks are its own. Whatever cu_seqlens holds, the starts
// never fall and stay inside the tensor.
class Sequences {
 public:
  explicit Sequences(int64_t batch)
      : batch_(batch),
        data_(static_cast<int64_t*>(
            std::malloc(sizeof(int64_t) * 3 * static_cast<size_t>(batch + 1)))) {}
  ~Sequences() { std::free(data_); }
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;

  bool there() const { return data_ != nullptr; }

  void read(const int32_t* cu_seqlens_q, int64_t queries, const int32_t* cu_seqlens_k,
            int64_t keys) {
    clamp(cu_seqlens_q, queries, 0);
    clamp(cu_seqlens_k, keys, 1);
  }

  int64_t start_q(int64_t i) const { return data_[3 * i]; }
  int64_t start_k(int64_t i) const { return data_[3 * i + 1]; }
  int64_t queries(int64_t i) const { return start_q(i + 1) - start_q(i); }
  int64_t keys(int64_t i) const { return start_k(i + 1) - start_k(i); }

  // Numbers the tasks, tasks_of(i) for sequence i, and returns how many there are.
  template <class TasksOf>
  int64_t number(const TasksOf& tasks_of) {
    int64_t tasks = 0;
    for (int64_t i = 0; i < batch_; ++i) {
      data_[3 * i + 2] = tasks;
      tasks += tasks_of(i);
    }
    data_[3 * batch_ + 2] = tasks;
    return tasks;
  }

  // Scores in all: of every head, query and key.
  double scores(int64_t heads) const {
    double count = 0.0;
    for (int64_t i = 0; i < batch_; ++i)
      count += static_cast<double>(queries(i)) * static_cast<double>(keys(i));
    return count * static_cast<double>(heads);
  }

  // The sequence a task belongs to; the task becomes its number within the sequence.
  int64_t find(int64_t* task) const {
    int64_t low = 0, high = batch_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (data_[3 * middle + 2] <= *task ? low : high) = middle;
    }
    *task -= data_[3 * low + 2];
    return low;
  }

 private:
  void clamp(const int32_t* cu_seqlens, int64_t tokens, int which) {
    int64_t last = 0;
    for (int64_t i = 0; i <= batch_; ++i) {
      if (cu_seqlens[i] > last) last = smaller(cu_seqlens[i], tokens);
      data_[3 * i + which] = last;
    }
  }

  int64_t batch_;
  int64_t* data_;
};

// As many threads as have work worth waking them for.
inline int useful_threads(int threads, double scores, int64_t head_dim) {
  constexpr double per_thread = 1 << 18;
  const double useful = 1.0 + scores * static_cast<double>(head_dim) / per_thread;
  return useful < threads ? static_cast<int>(useful) : threads;
}

// How many of a sequence's keys its query i sees: always the first ones.
inline int64_t visible_keys(bool causal, int64_t i, int64_t queries, int64_t keys) {
  if (!causal) return keys;
  const int64_t last = i + keys - queries + 1;
  return last < 0 ? 0 : smaller(last, keys);
}

// Rows of float sums, times `factor`, as rows of a tensor.
template <class T>
inline void write_rows(T* to, int64_t to_stride, const float* from, int64_t from_stride,
                       int64_t rows, int64_t columns, float factor) {
  for (int64_t r = 0; r < rows; ++r)
    for_columns(0, columns, [&](int64_t c, auto io) {
      io.put(to + r * to_stride + c, load(from + r * from_stride + c) * factor);
    });
}

// Rows [begin, end) of a (tokens, heads, head_dim) tensor to zero.
template <class T>
inline void clear_rows(T* x, int64_t token, int64_t head, int64_t begin, int64_t end, int64_t heads,
                       int64_t head_dim) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t h = 0; h < heads; ++h)
      std::memset(x + i * token + h * head, 0, sizeof(T) * static_cast<size_t>(head_dim));
}

// The rows of a tensor that belong to no sequence.
template <class T>
inline void clear_storage(T* x, int64_t token, int64_t head, int64_t first, int64_t last,
                          int64_t tokens, int64_t heads, int64_t head_dim) {
  clear_rows(x, token, head, 0, first, heads, head_dim);
  clear_rows(x, token, head, last, tokens, heads, head_dim);
}

// What forward and backward lay out alike.
template <class Units>
struct Sizes {
  explicit Sizes(int64_t head_dim)
      : head_dim(head_dim),
        head_units(units<Units>(head_dim)),
        left(round_up(head_units, width)),
        sums(round_up(head_dim, width)),
        transposed_panel(head_units * panel_columns),
        transposed(round_up(block, panel_columns) / panel_columns * transposed_panel),
        panel(units<Units>(block) * panel_columns),
        panels(round_up(head_dim, panel_columns) / panel_columns * panel) {}

  int64_t head_dim, head_units;
  int64_t left;                          // of a row of a left operand
  int64_t sums;                          // of a row of sums in float
  int64_t transposed_panel, transposed;  // of a block as B^T: one panel, all panels
  int64_t panel, panels;                 // of a block as B
};

template <class Units, class T>
class Forward {
 public:
  using Unit = typename Units::Unit;

  Forward(const AttentionForward& a, const Sequences& sequences, int64_t chunk)
      : a(a),
        sequences(sequences),
        size(a.head_dim),
        chunk(chunk),
        kept_scale(dropout_scale(a.threshold)),
        seed(a.seed ? static_cast<uint64_t>(*a.seed) : 0) {}

  bool reset(Scratch& scratch) {
    constexpr int64_t scores_size = queries_together * block;
    if (!scratch.reset(Scratch::bytes_for<Unit>(chunk * size.left) +
                       Scratch::bytes_for<Unit>(size.transposed) +
                       Scratch::bytes_for<Unit>(size.panels) +
                       Scratch::bytes_for<float>(chunk * size.sums) +
                       Scratch::bytes_for<float>(chunk * width) + Scratch::bytes_for<float>(chunk) +
                       Scratch::bytes_for<float>(scores_size)))
      return false;
    q_left = scratch.take<Unit>(chunk * size.left);
    k_transposed = scratch.take<Unit>(size.transposed);
    v_panels = scratch.take<Unit>(size.panels);
    outputs = scratch.take<float>(chunk * size.sums);
    totals = scratch.take<float>(chunk * width);
    maxima = scratch.take<float>(chunk);
    scores = scratch.take<float>(scores_size);
    return true;
  }

  void run(int64_t task) {
    const int64_t i = sequences.find(&task);
    const int64_t queries = sequences.queries(i), keys = sequences.keys(i);
    const int64_t chunks = (queries + chunk - 1) / chunk;
    const int64_t head = task / chunks, first = task % chunks * chunk;
    const int64_t rows = smaller(chunk, queries - first);
    const int64_t row = sequences.start_q(i) + first;
    const T* q = static_cast<const T*>(a.q) + row * a.q_token + head * a.q_head;
    const T* k = static_cast<const T*>(a.k) + sequences.start_k(i) * a.k_token + head * a.k_head;
    const T* v = static_cast<const T*>(a.v) + sequences.start_k(i) * a.v_token + head * a.v_head;

    pack_left<Units>(q_left, size.left, q, a.q_token, rows, size.head_dim);
    for (int64_t r = 0; r < rows; ++r) maxima[r] = -__builtin_inff();
    std::memset(totals, 0, sizeof(float) * static_cast<size_t>(rows * width));
    const int64_t end = seen_together(first + rows - 1, queries, keys);
    if (end == 0) std::memset(outputs, 0, sizeof(float) * static_cast<size_t>(rows * size.sums));
    T* out_rows = static_cast<T*>(a.out) + (row * a.heads + head) * size.head_dim;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < size.head_dim; c += static_cast<int64_t>(64 / sizeof(T)))
        __builtin_prefetch(out_rows + r * a.heads * size.head_dim + c, 1, 2);
    for (int64_t key = 0; key < end; key += block) {
      const int64_t count = smaller(block, end - key);
      pack_transposed<Units>(k_transposed, size.transposed_panel, k + key * a.k_token, a.k_token,
                             count, size.head_dim);
      pack_panels<Units>(v_panels, size.panel, v + key * a.v_token, a.v_token, count,
                         size.head_dim);
      for (int64_t r = 0; r < rows; r += queries_together) {
        const int64_t together = smaller(queries_together, rows - r);
        // Only what one of these queries sees is read, so that what they do not see cannot tell
        // how long the chunk is, which depends on the number of threads.
        const int64_t seen =
            smaller(count, seen_together(first + r + together - 1, queries, keys) - key);
        float* sums = outputs + r * size.sums;
        if (seen <= 0) {
          if (key == 0)
            std::memset(sums, 0, sizeof(float) * static_cast<size_t>(together * size.sums));
          continue;
        }
        multiply<Units>(q_left + r * size.left, size.left, 1, together, k_transposed,
                        size.transposed_panel, size.head_units, seen, scores, block, false);
        int64_t visible[queries_together];
        for (int64_t j = 0; j < together; ++j) {
          const int64_t last = visible_keys(a.causal, first + r + j, queries, keys) - key;
          visible[j] = last < 0 ? 0 : smaller(last, seen);
        }
        softmax(r, together, visible, key, seen, row, head);
        multiply<Units>(reinterpret_cast<const Unit*>(scores), block, 1, together, v_panels,
                        size.panel, units<Units>(seen), size.head_dim, sums, size.sums, key > 0);
      }
    }
    finish(row, rows, head);
  }

 private:
  // The keys that queries up to the sequence's query i see, to a whole unit.
  int64_t seen_together(int64_t i, int64_t queries, int64_t keys) const {
    return smaller(round_up(visible_keys(a.causal, i, queries, keys), Units::per_unit), keys);
  }

  // Turns the scores of rows [r, r + together) against one block into unnormalised, masked
  // probabilities in place, as a left operand, and brings maxima, totals and outputs up to date.
  void softmax(int64_t r, int64_t together, const int64_t* visible, int64_t key, int64_t count,
               int64_t row, int64_t head) {
    // Rounding keeps the order, so the largest score is the largest product with its scale; of a
    // negative scale, the smallest one is.
    const Words flip = Words{} + (a.scale < 0.0f ? 0x80000000u : 0u);
    const float magnitude = a.scale < 0.0f ? -a.scale : a.scale;
    // What is subtracted from the scores: the largest so far. It is minus infinity where a query has
    // seen no key yet, or none with a finite score, and must not be subtracted from itself.
    float bases[queries_together], rescale[queries_together + width] = {};
    for (int64_t j = 0; j < together; ++j) {
      const float* s = scores + j * block;
      Floats top = broadcast(-__builtin_inff());
      for (int64_t c = 0; c < visible[j]; c += width) {
        Floats t = bit_cast<Floats>(bit_cast<Words>(load(s + c)) ^ flip);
        if (visible[j] - c < width)
          t = first_lanes(t, visible[j] - c, broadcast(-__builtin_inff()));
        top = top > t ? top : t;
      }
      const float before = maxima[r + j];
      const float now = visible[j] > 0 ? largest(top) * magnitude : before;
      maxima[r + j] = before > now ? before : now;
      bases[j] = maxima[r + j] == -__builtin_inff() ? 0.0f : maxima[r + j];
      rescale[j] = before == maxima[r + j] ? 0.0f : before - bases[j];
    }
    for (int64_t j = 0; j < together; j += width)
      store(rescale + j, power_of_two(load(rescale + j) * log2_e));
    for (int64_t j = 0; j < together; ++j) {
      float* s = scores + j * block;
      Unit* p_row = reinterpret_cast<Unit*>(s);
      uint16_t lanes[block];
      if (a.seed)
        attention_lanes(lanes, key / block, static_cast<uint64_t>((row + r + j) * a.heads + head),
                        a.site, seed);
      Floats total = {};
      for (int64_t c = 0; c < count; c += width) {
        Floats p = {};
        if (c < visible[j]) {
          const Floats score = rounded(load(s + c) * a.scale);
          p = power_of_two((score - bases[j]) * log2_e);
          if (visible[j] - c < width) p = first_lanes(p, visible[j] - c, Floats{});
          total += p;
          if (a.seed) p = keep(p, lanes + c, a.threshold);
        }
        Units::put(p_row, c, p);
      }
      float* kept = totals + (r + j) * width;
      store(kept, load(kept) * rescale[j] + total);
      if (key == 0 || rescale[j] == 1.0f) continue;
      float* out = outputs + (r + j) * size.sums;
      for (int64_t c = 0; c < size.sums; c += width) store(out + c, load(out + c) * rescale[j]);
    }
  }

  void finish(int64_t row, int64_t rows, int64_t head) {
    T* out = static_cast<T*>(a.out) + (row * a.heads + head) * size.head_dim;
    float* logsumexp = a.logsumexp + head * a.queries + row;
    for (int64_t r = 0; r < rows; ++r) {
      const float total = sum(load(totals + r * width));
      const bool sees = total != 0.0f;
      write_rows(out + r * a.heads * size.head_dim, 0, outputs + r * size.sums, 0, 1, size.head_dim,
                 sees ? kept_scale / total : 0.0f);
      logsumexp[r] = sees ? maxima[r] + std::log(total) : -__builtin_inff();
    }
  }

  const AttentionForward& a;
  const Sequences& sequences;
  const Sizes<Units> size;
  const int64_t chunk;
  const float kept_scale;
  const uint64_t seed;
  Unit *q_left, *k_transposed, *v_panels;
  float *outputs, *totals, *maxima, *scores;
};

template <class Units, class T>
bool forward(const AttentionForward& a) {
  Sequences sequences(a.batch);
  if (!sequences.there()) return false;
  sequences.read(a.cu_seqlens_q, a.queries, a.cu_seqlens_k, a.keys);
  // Long chunks pack keys and values less often; short ones keep more threads busy.
  int64_t chunk = 8 * queries_together, tasks = 0;
  while (true) {
    tasks = sequences.number(
        [&](int64_t i) { return (sequences.queries(i) + chunk - 1) / chunk * a.heads; });
    if (tasks >= 4 * static_cast<int64_t>(a.threads) || chunk == queries_together) break;
    chunk /= 2;
  }
  int failures = 0;
  const int useful = useful_threads(a.threads, sequences.scores(a.heads), a.head_dim);
  parallel_tasks(useful, tasks, [&](const auto& take) {
    Scratch& scratch = thread_scratch();
    Forward<Units, T> worker(a, sequences, chunk);
    if (worker.reset(scratch))
      for (int64_t task; (task = take()) < tasks;) worker.run(task);
    else
      __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
    scratch.finish();
  });
  const int64_t first = sequences.start_q(0), last = sequences.start_q(a.batch);
  clear_storage(static_cast<T*>(a.out), a.heads * a.head_dim, a.head_dim, first, last, a.queries,
                a.heads, a.head_dim);
  clear_storage(a.logsumexp, 1, a.queries, first, last, a.queries, a.heads, 1);
  return failures == 0;
}

template <class Units, class T>
class Backward {
 public:
  using Unit = typename Units::Unit;

  Backward(const AttentionBackward& a, const Sequences& sequences, const bool* split)
      : a(a),
        sequences(sequences),
        split(split),
        size(a.head_dim),
        kept_scale(dropout_scale(a.threshold)),
        seed(a.seed ? static_cast<uint64_t>(*a.seed) : 0) {}

  // One task is a head's whole backward, or of a sequence that is too long for one thread a block
  // of keys or of queries. The sums are the same and in the same order, so the bits are, too.
  bool run(int64_t task, Scratch& scratch) {
    const int64_t i = sequences.find(&task);
    queries = sequences.queries(i), keys = sequences.keys(i);
    first_q = sequences.start_q(i), first_k = sequences.start_k(i);
    const int64_t blocks_q = (queries + block - 1) / block, blocks_k = (keys + block - 1) / block;
    if (!split[i]) {
      head = task;
      if (!reset(scratch, blocks_q)) return false;
      for (int64_t b = 0; b < blocks_q; ++b) pack_queries(b * block, b);
      for (int64_t key = 0; key < keys; key += block) {
        pack_keys(key);
        for (int64_t b = 0; b < blocks_q; ++b) add_block(b * block, key, b, true, true);
        write_keys(key);
      }
      for (int64_t b = 0; b < blocks_q; ++b) write_queries(b * block, b);
      return true;
    }
    head = task / (blocks_q + blocks_k);
    const int64_t own = task % (blocks_q + blocks_k);
    if (!reset(scratch, 1)) return false;
    if (own < blocks_k) {
      pack_keys(own * block);
      for (int64_t b = 0; b < blocks_q; ++b) {
        pack_queries(b * block, 0);
        add_block(b * block, own * block, 0, false, true);
      }
      write_keys(own * block);
    } else {
      const int64_t query = (own - blocks_k) * block;
      pack_queries(query, 0);
      for (int64_t key = 0; key < keys; key += block) {
        pack_keys(key);
        add_block(query, key, 0, true, false);
      }
      write_queries(query, 0);
    }
    return true;
  }

 private:
  bool reset(Scratch& scratch, int64_t slots) {
    constexpr int64_t square = block * block, pairs = units<Units>(block) * block;
    const int64_t left = block * size.left, sums = block * size.sums;
    const size_t per_slot = 2 * Scratch::bytes_for<Unit>(left) +
                            2 * Scratch::bytes_for<Unit>(size.panels) +
                            Scratch::bytes_for<float>(sums) + 2 * Scratch::bytes_for<float>(block);
    if (!scratch.reset(static_cast<size_t>(slots) * per_slot +
                       2 * Scratch::bytes_for<Unit>(size.transposed) +
                       Scratch::bytes_for<Unit>(size.panels) + 2 * Scratch::bytes_for<float>(sums) +
                       2 * Scratch::bytes_for<float>(square) + 2 * Scratch::bytes_for<Unit>(pairs)))
      return false;
    q_left = scratch.take<Unit>(slots * left);
    dout_left = scratch.take<Unit>(slots * left);
    q_panels = scratch.take<Unit>(slots * size.panels);
    dout_panels = scratch.take<Unit>(slots * size.panels);
    dq = scratch.take<float>(slots * sums);
    logsumexp = scratch.take<float>(slots * block);
    row_dots = scratch.take<float>(slots * block);
    k_transposed = scratch.take<Unit>(size.transposed);
    v_transposed = scratch.take<Unit>(size.transposed);
    k_panels = scratch.take<Unit>(size.panels);
    dk = scratch.take<float>(sums);
    dv = scratch.take<float>(sums);
    scores = scratch.take<float>(square);
    dscores = scratch.take<float>(square);
    if (Units::per_unit == 1) {
      p_columns = reinterpret_cast<Unit*>(scores);
      ds_columns = reinterpret_cast<Unit*>(dscores);
    } else {
      p_columns = scratch.take<Unit>(pairs);
      ds_columns = scratch.take<Unit>(pairs);
    }
    return true;
  }

  void pack_queries(int64_t query, int64_t slot) {
    const int64_t rows = smaller(block, queries - query), row = first_q + query;
    const T* q = static_cast<const T*>(a.q) + row * a.q_token + head * a.q_head;
    const int64_t token = a.heads * size.head_dim, at = (row * a.heads + head) * size.head_dim;
    const T* dout = static_cast<const T*>(a.dout) + at;
    const T* out = static_cast<const T*>(a.out) + at;
    pack_left<Units>(q_left + slot * block * size.left, size.left, q, a.q_token, rows,
                     size.head_dim);
    pack_left<Units>(dout_left + slot * block * size.left, size.left, dout, token, rows,
                     size.head_dim);
    pack_panels<Units>(q_panels + slot * size.panels, size.panel, q, a.q_token, rows,
                       size.head_dim);
    pack_panels<Units>(dout_panels + slot * size.panels, size.panel, dout, token, rows,
                       size.head_dim);
    std::memset(dq + slot * block * size.sums, 0,
                sizeof(float) * static_cast<size_t>(block * size.sums));
    for (int64_t r = 0; r < rows; ++r) {
      Floats dots = {};
      for_columns(0, size.head_dim, [&](int64_t c, auto io) {
        dots += io.get(dout + r * token + c) * io.get(out + r * token + c);
      });
      row_dots[slot * block + r] = sum(dots);
      logsumexp[slot * block + r] = a.logsumexp[head * a.queries + row + r];
    }
  }

  void pack_keys(int64_t key) {
    const int64_t rows = smaller(block, keys - key), row = first_k + key;
    const T* k = static_cast<const T*>(a.k) + row * a.k_token + head * a.k_head;
    const T* v = static_cast<const T*>(a.v) + row * a.v_token + head * a.v_head;
    pack_transposed<Units>(k_transposed, size.transposed_panel, k, a.k_token, rows, size.head_dim);
    pack_transposed<Units>(v_transposed, size.transposed_panel, v, a.v_token, rows, size.head_dim);
    pack_panels<Units>(k_panels, size.panel, k, a.k_token, rows, size.head_dim);
    const size_t bytes = sizeof(float) * static_cast<size_t>(block * size.sums);
    std::memset(dk, 0, bytes);
    std::memset(dv, 0, bytes);
  }

  // Adds what one block of queries and one block of keys give to dq, or to dk and dv.
  void add_block(int64_t query, int64_t key, int64_t slot, bool to_queries, bool to_keys) {
    const int64_t rows = smaller(block, queries - query), count = smaller(block, keys - key);
    if (visible_keys(a.causal, query + rows - 1, queries, keys) <= key) return;
    multiply<Units>(q_left + slot * block * size.left, size.left, 1, rows, k_transposed,
                    size.transposed_panel, size.head_units, count, scores, block, false);
    multiply<Units>(dout_left + slot * block * size.left, size.left, 1, rows, v_transposed,
                    size.transposed_panel, size.head_units, count, dscores, block, false);
    for (int64_t r = 0; r < rows; r += 2) differentiate_rows(query, key, slot, r, rows, count);
    const int64_t depth = units<Units>(rows);
    if (to_keys) {
      multiply<Units>(p_columns, 1, block, count, dout_panels + slot * size.panels, size.panel,
                      depth, size.head_dim, dv, size.sums, true);
      multiply<Units>(ds_columns, 1, block, count, q_panels + slot * size.panels, size.panel, depth,
                      size.head_dim, dk, size.sums, true);
    }
    if (to_queries)
      multiply<Units>(reinterpret_cast<const Unit*>(dscores), block, 1, rows, k_panels, size.panel,
                      units<Units>(count), size.head_dim, dq + slot * block * size.sums, size.sums,
                      true);
  }

  // Rows r and r + 1 of the block: the masked probabilities and the scores' gradients, as left
  // operands of the products over queries; the gradients over keys, too.
  void differentiate_rows(int64_t query, int64_t key, int64_t slot, int64_t r, int64_t rows,
                          int64_t count) {
    int64_t visible[2];
    uint16_t lanes[2][block];
    for (int64_t j = 0; j < 2; ++j) {
      // Minus infinity: the query sees no key, or none with a finite score.
      const bool sees = r + j < rows && logsumexp[slot * block + r + j] != -__builtin_inff();
      const int64_t seen = sees ? visible_keys(a.causal, query + r + j, queries, keys) - key : 0;
      visible[j] = seen < 0 ? 0 : smaller(seen, count);
      if (a.seed && visible[j] > 0)
        attention_lanes(lanes[j], key / block,
                        static_cast<uint64_t>((first_q + query + r + j) * a.heads + head), a.site,
                        seed);
    }
    for (int64_t c = 0; c < count; c += width) {
      Floats p[2] = {}, ds[2] = {};
      for (int64_t j = 0; j < 2; ++j) {
        if (c >= visible[j]) continue;
        const int64_t at = (r + j) * block + c;
        // Rounded as in forward: where scores are large, their rounding must cancel.
        const Floats score = rounded(load(scores + at) * a.scale);
        Floats probability = power_of_two((score - logsumexp[slot * block + r + j]) * log2_e);
        if (visible[j] - c < width)
          probability = first_lanes(probability, visible[j] - c, Floats{});
        p[j] = probability;
        Floats dp = load(dscores + at);
        if (a.seed) {
          p[j] = keep(probability, lanes[j] + c, a.threshold);
          dp = keep(dp * kept_scale, lanes[j] + c, a.threshold);
        }
        ds[j] = probability * (dp - row_dots[slot * block + r + j]);
      }
      Units::put_rows(p_columns, block, r, c, p[0], p[1]);
      Units::put_rows(ds_columns, block, r, c, ds[0], ds[1]);
      if (Units::per_unit > 1)
        for (int64_t j = 0; j < 2; ++j)
          Units::put(reinterpret_cast<Unit*>(dscores + (r + j) * block), c, ds[j]);
    }
  }

  void write_queries(int64_t query, int64_t slot) {
    T* to = static_cast<T*>(a.dq) + (first_q + query) * a.dq_token + head * a.dq_head;
    write_rows(to, a.dq_token, dq + slot * block * size.sums, size.sums,
               smaller(block, queries - query), size.head_dim, a.scale);
  }

  void write_keys(int64_t key) {
    const int64_t rows = smaller(block, keys - key), row = first_k + key;
    write_rows(static_cast<T*>(a.dk) + row * a.dk_token + head * a.dk_head, a.dk_token, dk,
               size.sums, rows, size.head_dim, a.scale);
    write_rows(static_cast<T*>(a.dv) + row * a.dv_token + head * a.dv_head, a.dv_token, dv,
               size.sums, rows, size.head_dim, kept_scale);
  }

  const AttentionBackward& a;
  const Sequences& sequences;
  const bool* split;
  const Sizes<Units> size;
  const float kept_scale;
  const uint64_t seed;
  int64_t queries, keys, first_q, first_k, head;
  // Of each block of queries, in a slot of its own.
  Unit *q_left, *dout_left, *q_panels, *dout_panels;
  float *dq, *logsumexp, *row_dots;
  // Of one block of keys.
  Unit *k_transposed, *v_transposed, *k_panels;
  float *dk, *dv;
  // Of one block of queries and one of keys.
  float *scores, *dscores;
  Unit *p_columns, *ds_columns;
};

template <class Units, class T>
bool backward(const AttentionBackward& a) {
  Sequences sequences(a.batch);
  bool* split = static_cast<bool*>(std::malloc(static_cast<size_t>(a.batch + 1)));
  if (!sequences.there() || !split) {
    std::free(split);
    return false;
  }
  sequences.read(a.cu_seqlens_q, a.queries, a.cu_seqlens_k, a.keys);
  const double scores = sequences.scores(a.heads);
  const int64_t tasks = sequences.number([&](int64_t i) {
    // Split up, a head costs seven products instead of five. It pays when the thread that has it
    // would be the last by more than that.
    const double own =
        static_cast<double>(sequences.queries(i)) * static_cast<double>(sequences.keys(i));
    split[i] = own * a.threads > 1.4 * scores;
    const int64_t blocks =
        (sequences.queries(i) + block - 1) / block + (sequences.keys(i) + block - 1) / block;
    return (split[i] ? blocks : smaller(blocks, 1)) * a.heads;
  });
  int failures = 0;
  parallel_tasks(useful_threads(a.threads, scores, a.head_dim), tasks, [&](const auto& take) {
    Scratch& scratch = thread_scratch();
    Backward<Units, T> worker(a, sequences, split);
    for (int64_t task; (task = take()) < tasks;)
      if (!worker.run(task, scratch)) __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
    scratch.finish();
  });
  std::free(split);
  const int64_t first_q = sequences.start_q(0), last_q = sequences.start_q(a.batch);
  const int64_t first_k = sequences.start_k(0), last_k = sequences.start_k(a.batch);
  clear_storage(static_cast<T*>(a.dq), a.dq_token, a.dq_head, first_q, last_q, a.queries, a.heads,
                a.head_dim);
  clear_storage(static_cast<T*>(a.dk), a.dk_token, a.dk_head, first_k, last_k, a.keys, a.heads,
                a.head_dim);
  clear_storage(static_cast<T*>(a.dv), a.dv_token, a.dv_head, first_k, last_k, a.keys, a.heads,
                a.head_dim);
  return failures == 0;
}

}  // namespace

namespace BERTFAST_ISA {

bool attention_forward(const AttentionForward& a) {
  return a.dtype == Dtype::float32 ? forward<FloatUnits, float>(a)
                                   : forward<Bfloat16Units, Bfloat16>(a);
}

bool attention_backward(const AttentionBackward& a) {
  return a.dtype == Dtype::float32 ? backward<FloatUnits, float>(a)
                                   : backward<Bfloat16Units, Bfloat16>(a);
}

}  // namespace BERTFAST_ISA
}  // namespace bertfast
